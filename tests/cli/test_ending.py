"""A command that nobody wants any more ends without an account of where it was: real processes, pipes and signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import all_there, asked, up

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
CHATTER = ("Traceback", "Exception ignored", "BrokenPipe", "KeyboardInterrupt", "Error")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with up(tmp_path_factory.mktemp("up"), "--simulate", "2", "--http", "off") as (found, _):
        all_there(found, nodes=2)
        yield found


def started(*arguments: str, stdout: int, stderr: int = subprocess.PIPE, url: str = "") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "KVPLANE_SERVER": url} if url else dict(os.environ)
    return subprocess.Popen(
        [sys.executable, "-m", "kvplane", *arguments], stdout=stdout, stderr=stderr, env=environment, start_new_session=True,
    )  # fmt: skip


UNREAD = [
    ["--help"], ["node", "list"], ["node", "list", "--json"], ["policy", "list"], ["state"], ["report"], ["events", "tail"],
    ["events", "tail", "--json"], ["sql", "SELECT * FROM range(100000)"], ["sql", "SELECT * FROM range(100000)", "--json"],
    ["sql", "SELECT * FROM range(100000)", "--csv"], ["doctor"], ["workload", "agent", "--requests", "5000"],
    ["simulate", "agent", "--limit", "20", "--nodes", "2", "--policy", "blocks", "--processes", "1"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", UNREAD, ids=" ".join)
def test_nobody_reads(url: str, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started(*arguments, stdout=writing, url=url)
    os.close(writing)
    try:
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    # The help is written by a library, which has a code of its own for it.
    assert process.returncode in ({0, 1} if arguments in (["--help"], ["doctor"]) else {0}), stderr.decode()
    assert not [word for word in CHATTER if word in stderr.decode()], stderr.decode()


def test_nobody_reads_any_more(url: str) -> None:
    process = started("sql", "SELECT * FROM range(1000000)", stdout=subprocess.PIPE, url=url)
    assert process.stdout is not None
    assert process.stdout.readline() == b"range\n"
    process.stdout.close()
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, b"")


def test_nobody_reads_the_error(url: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started("node", "cordon", "nobody", stdout=writing, stderr=writing, url=url)
    os.close(writing)
    assert process.wait(timeout=30) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_is_a_sentence(url: str) -> None:
    for arguments in (["node", "list"], ["sql", "SELECT * FROM range(100000)"], ["workload", "agent"]):
        with Path("/dev/full").open("wb") as full:
            process = started(*arguments, stdout=full.fileno(), url=url)
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == 1
        assert stderr.decode() == "kvplane: the output can't be written: No space left on device [output_failed]\n"


def _handed_over(process: subprocess.Popen[bytes]) -> None:
    """Wait until the interpreter is up and kvplane's first line has run; nobody can do anything about what is before."""
    begun = False
    # On a busy machine the moment may pass unseen; then the process is up as well.
    deadline = time.monotonic() + 3
    while process.poll() is None and time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"SigCgt:\s*(\w+)", status)
        caught = found is not None and bool(int(found[1], 16) & 1 << signal.SIGINT - 1)
        # Python catches the signal as it starts, then kvplane gives it up; the fork of this process catches it, too.
        if begun and not caught:
            return
        begun = begun or (caught and b"kvplane" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        time.sleep(0.001)


INTERRUPTED = [
    ["--help"], ["node", "list"], ["events", "tail"], ["sql", "SELECT 1"], ["report"], ["router"],
    ["simulate", "agent", "--limit", "500", "--processes", "2"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", INTERRUPTED, ids=" ".join)
def test_control_c_at_any_time(url: str, arguments: list[str]) -> None:
    """In steps from where Python hands over, most of them in the first quarter second, to all that a terminal sends it to."""
    # Whoever started the tests in the background may have had them ignore it, and processes would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for delay in (0, 0.05, 0.1, 0.15, 0.25, 0.6):
        process = started(*arguments, stdout=subprocess.PIPE, url=url)
        try:
            _handed_over(process)
            time.sleep(delay)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
        # Some had ended before; a service that ran ends in good order.
        assert process.returncode in {0, 1, 130, -signal.SIGINT}, (delay, stderr.decode())
        assert not [word for word in CHATTER if word in stderr.decode()], (delay, stderr.decode())


IMPORTS = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["kvplane", {command!r}, *{rest!r}]
import runpy
runpy.run_module("kvplane", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "name", ["cyclopts", "msgspec", "kvplane.services.cli", "kvplane.services.cli.ask", "nats.aio.client"]
)
def test_control_c_in_an_import(name: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = IMPORTS.format(name=name, command="node", rest=["list"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_who_ignores_control_c_goes_on_ignoring_it(url: str) -> None:
    """`nohup`, or a script's `&`."""
    command = [sys.executable, "-m", "kvplane", "state"]
    code = f"import signal, os; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv({command[0]!r}, {command!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "KVPLANE_SERVER": url},
        start_new_session=True,
    )  # fmt: skip
    for _ in range(5):
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, asked(url, "state")["digest"] in out.decode()) == (0, True)
