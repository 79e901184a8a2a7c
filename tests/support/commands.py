"""The command line in processes of its own, as a person or a script meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.protocol.messages import ListRequest, StatusRequest
from kvplane.services.rpc.client import ask
from tests.support.fork_server import Program
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PATIENCE_SECONDS = 60
MAIN = "\nfrom kvplane.services.cli import main\nmain()"


def started(*arguments: str, before: str = "") -> list[str]:
    """What starts a command; `before` is Python that its process runs first, to be where things are otherwise."""
    return [sys.executable, *(["-c", before + MAIN] if before else ["-m", "kvplane"]), *arguments]


def run(*arguments: str, before: str = "", folder: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, in a folder; further names are its environment."""
    command = started(*arguments, before=before)
    environment = {**os.environ, "COLUMNS": "100", **environment}
    with Program(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder or None,
        env=environment,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def up(folder: Path, *options: str, before: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`kvplane up`, until the end of the block; its URL and process."""
    port = free_port()
    # Others may have the ports that are taken without a word, or take them just now.
    off = [part for name in ("--http", "--gateway") if name not in options for part in (name, "off")]
    command = started("up", "--data", str(folder), "--port", str(port), *off, *options, before=before)
    process = Program(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    else:
        pytest.fail("".join(lines))
    try:
        yield f"nats://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def asked(url: str, *arguments: str) -> Any:
    """What a command answers as JSON."""
    done = run(*arguments, "--json", KVPLANE_SERVER=url)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def all_there(url: str, nodes: int) -> None:
    """Wait for so many nodes of `kvplane up` and for its history: both are started after it says its URL."""

    async def wait() -> None:
        async def there() -> bool:
            with suppress(ServiceFault):
                listed: Any = await ask(client, "kv.default.coordinator.node.list", ListRequest())
                await ask(client, "kv.default.history.status", StatusRequest())
                return len(listed["nodes"]) == nodes
            return False

        async with connected([url], "test") as client:
            await until(there, PATIENCE_SECONDS, every=0.05)

    anyio.run(wait)
