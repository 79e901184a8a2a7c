"""An engine that does what a test says: it reads a request, and a script writes what comes back, byte by byte if need be."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio

from kvplane.services.protocol.messages import RegisterRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet

MODEL = "m"
OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


class ScriptedEngine:
    """One engine. `scripts` are used one a request, the last one for all that follow; `/tokenize` and the like answer 404."""

    kind = ""
    """What it says it is."""

    def __init__(self, name: str, *scripts: Callable[[SocketStream], Awaitable[None]]) -> None:
        self.name = name
        self.scripts = list(scripts)
        self.requests: list[bytes] = []
        self.closed = 0
        """Requests whose connection the other side closed before their script had ended."""
        self.port = 0
        self.blocks = 1000
        self.aliases: list[str] = []
        """Further models, as LoRAs are."""

    async def serve(self, stream: SocketStream) -> None:
        async with stream:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                while True:
                    request = await read_request(stream)
                    if b"/render " in request or b"/tokenize " in request:
                        await stream.send(whole(b"{}", b"404 Not Found"))
                        continue
                    self.requests.append(request)
                    script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                    if not await self._play(stream, script):
                        return

    async def _play(self, stream: SocketStream, script: Callable[[SocketStream], Awaitable[None]]) -> bool:
        """Run a script; whether the other side was there until its end."""
        before = self.closed
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch, stream, group.cancel_scope)
            try:
                await script(stream)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.closed += self.closed == before
            group.cancel_scope.cancel()
        return self.closed == before

    async def _watch(self, stream: SocketStream, scope: anyio.CancelScope) -> None:
        try:
            await stream.receive(1)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            self.closed += 1
            scope.cancel()
        except anyio.ClosedResourceError:
            # The script itself has closed it.
            pass


async def read_request(stream: SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += await stream.receive()
    return head + b"\r\n\r\n" + body


@asynccontextmanager
async def engines(fleet: Fleet, *all_engines: ScriptedEngine) -> AsyncIterator[None]:
    """Engines that listen, each a node of the fleet."""
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        for engine in all_engines:
            listener = await stack.enter_async_context(await anyio.create_tcp_listener(local_host="127.0.0.1"))
            engine.port = listener.extra(anyio.abc.SocketAttribute.local_port)
            group.start_soon(listener.serve, engine.serve)
            await fleet.ask(
                "coordinator.node.register",
                RegisterRequest(
                    node=engine.name, address=f"http://127.0.0.1:{engine.port}", models=[MODEL, *engine.aliases], block_size=4,
                    capacity_blocks={"gpu": engine.blocks}, engine=engine.kind,
                ),
            )  # fmt: skip
        yield
        group.cancel_scope.cancel()
