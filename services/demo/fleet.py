"""Processes of the demonstration: real ones, started with the command line, killed with SIGKILL."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from subprocess import STDOUT
from typing import TYPE_CHECKING, Protocol

import anyio
from nats.errors import Error as NatsError

from kvplane.services.embedded.server import start_server
from kvplane.services.protocol.errors import StepFailed
from kvplane.services.rpc.client import instances

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server
    from kvplane.services.process.owner import Owner

READY_SECONDS = 30.0
ANSWER_SECONDS = 0.3


class Process(Protocol):
    """A process that was started, as anyio has it."""

    def send_signal(self, signal: signal.Signals) -> None:
        """Send it a signal."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""

    async def wait(self) -> int:
        """Wait until it has ended; its exit code."""


class Fleet:
    """A server and the processes around it, by name. All logs lie in `folder`, whose `data` may have an owner already.

    `open_process` starts a process, for who has a faster way than anyio's.
    """

    def __init__(
        self, folder: Path, port: int, fleet: str, owner: Owner | None = None,
        open_process: Callable[..., Awaitable[Process]] = anyio.open_process,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._owner = owner
        self._open_process = open_process
        self.port = port
        self.name = fleet
        self.url = f"nats://127.0.0.1:{port}"
        self.urls = [self.url]
        """Where the processes connect."""
        self.server: Server | None = None
        self._processes: dict[str, Process] = {}

    async def start_server(self) -> None:
        """Start the server on its data, which may be from a life before."""
        self.server = await start_server(self.folder / "data", port=self.port, owner=self._owner)

    async def start(self, name: str, *arguments: str, program: str = "kvplane") -> None:
        """Start a process of the command line, such as `router`; `program` is the module that runs it."""
        command = [sys.executable, "-m", program, *arguments]
        command += [option for url in self.urls for option in ("--server", url)]
        command += ["--fleet", self.name, "--log-format", "json"]
        log = await anyio.open_file(self.folder / f"{name}.log", "ab")
        async with log:
            self._processes[name] = await self._open_process(
                command, stdin=None, stdout=log.wrapped, stderr=STDOUT, start_new_session=True
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process."""
        self._processes[name].send_signal(number)

    async def ended(self, name: str) -> int:
        """Wait until a process has ended by itself; its exit code."""
        return await self._processes[name].wait()

    async def kill(self, *names: str) -> None:
        """SIGKILL processes, and wait until they are gone."""
        for name in names:
            if name == "server" and self.server:
                process: Process = self.server.process
                self.server.kill()
            else:
                process = self._processes[name]
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
            await process.wait()

    async def stop(self) -> None:
        """Stop everything: the processes first, the server last."""
        with anyio.CancelScope(shield=True):
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    process.terminate()
            for process in self._processes.values():
                with anyio.move_on_after(5) as scope:
                    await process.wait()
                if scope.cancelled_caught:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            if self.server is not None:
                await self.server.stop()

    async def routers(self, client: Client, count: int) -> list[str]:
        """Writers of the routers, once `count` of them answer."""
        return await self._instances(client, "kvplane-router", count)

    async def coordinators(self, client: Client, count: int) -> list[str]:
        """Writers of the coordinators, once `count` of them answer."""
        return await self._instances(client, "kvplane-coordinator", count)

    async def _instances(self, client: Client, service: str, count: int) -> list[str]:
        """Ask until enough of them answer. Raises `StepFailed`."""
        with anyio.move_on_after(READY_SECONDS):
            while True:
                found: list[str] = []
                with suppress(NatsError, OSError):
                    answers = await instances(client, service, seconds=ANSWER_SECONDS, enough=count)
                    found = [metadata["writer"] for metadata in answers]
                if len(found) >= count:
                    return found
                await anyio.sleep(0.02)
        raise StepFailed(f"{count} of {service} did not answer in {READY_SECONDS:g} s; see the logs in {self.folder}")
