"""What is shown of a simulation while it runs: soon, on standard error, and on a terminal only."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.processes import cpu_seconds

if TYPE_CHECKING:
    from pathlib import Path

LINE = '{"timestamp": %d, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, %d]}\n'
CPU_SECONDS = 1.0
PATIENCE = 60.0


def shown(terminal: int, text: bytes) -> bytes:
    """What a terminal shows, up to a text."""
    output = b""
    deadline = time.monotonic() + PATIENCE
    while text not in output:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            pytest.fail(f"{text!r} was not shown: {output!r}")
        output += os.read(terminal, 65536)
    return output


def drain(terminal: int) -> None:
    """Read what comes until the process is gone; it would wait for a reader otherwise."""
    with suppress(OSError):
        while os.read(terminal, 65536):
            pass


def test_progress_is_shown_before_the_trace_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "slow.jsonl"
    os.mkfifo(trace)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvplane", "simulate", str(trace), "--policy", "ttft", "--nodes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    try:
        shown(ours, b"starting")
        # Processor time, since the machine may be busy with others.
        assert cpu_seconds(process.pid) < CPU_SECONDS
        shown(ours, b"reading slow.jsonl")
        trace.write_text("".join(LINE % (at, at + 3) for at in range(20)))
        shown(ours, b"simulating")
        drain(ours)
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    assert out.startswith(b"policy\t")
    assert b"simulating" not in out
    assert b"\x1b" not in out


def test_nothing_is_shown_where_no_terminal_is(tmp_path: Path) -> None:
    trace = tmp_path / "slow.jsonl"
    trace.write_text("".join(LINE % (at, at + 3) for at in range(20)))
    command = [sys.executable, "-m", "kvplane", "simulate", str(trace), "--policy", "ttft", "--nodes", "2"]
    ended = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
    assert ended.stderr.startswith(b"20 requests")
    assert b"simulating" not in ended.stderr
    assert b"\x1b" not in ended.stderr
    assert ended.stdout.startswith(b"policy\t")
