"""An HTTP/1.1 server: whole requests in, answers out piece by piece.

A connection carries one request after another; each is an `Exchange`, handled in a task of its own. A piece that is
written goes to the kernel at once. When a client reads slower than is written, the exchange says so (`on_slow`,
`on_ready`), and whoever writes has its source wait. When a client leaves, the exchange's handler is cancelled.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import anyio
import structlog

from kvplane.services.http import alive
from kvplane.services.http.listener import BACKLOG, take_no_more
from kvplane.services.http.reader import BODY_BYTES, Request, RequestReader
from kvplane.services.process.descriptors import spared
from kvplane.services.protocol.errors import BadHttp

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

CONNECTIONS_LIMIT = 20_000
"""Most connections of a server, if the process may have as many descriptors. One more takes the place of the one that has been
without a whole request for the longest time; where all are at work, it is answered 503 and closed."""
HEAD_SECONDS = 10.0
"""How long the head of a request may take, from its first byte, or from the connection's start the handshake of TLS."""
BODY_SECONDS = 300.0
"""How long a request may take, from its first byte."""
SLOW_SECONDS = 120.0
"""How long a client may read nothing of its answer while more of it waits."""
MADE_ROOM = 16
"""So many parts of all connections go at once where there is no place for a new one, one at least."""
IDLE_SECONDS = 75.0
"""How long a connection may be without a request."""
PIPELINED_LIMIT = 16
"""Requests of one connection that may wait for their turn; beyond that it is not read."""
PIPELINED_BYTES = 1 << 20
HIGH_WATER = 256 << 10
"""Bytes that may wait for a client before its source is stopped."""
SWEEP_SECONDS = 1.0
FIRST_SECONDS = 2.0
"""How long a server that stops waits for the first request of a connection that has just come."""
DRAIN_SECONDS = 15.0
"""How long a server that stops waits for what is on its way."""
ACCEPT_SECONDS = 0.1
"""How long a server that stops takes connections that have begun."""
DRAIN_LOOK_SECONDS = 0.1
LEAVE_SECONDS = 1.0
"""How long what is then cancelled may take to let go."""

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}

_log = structlog.get_logger("kvplane.http")


def head_of(status: int, headers: Iterable[tuple[bytes, bytes]], framing: bytes) -> bytes:
    """An answer's head as it travels; `framing` are the header lines that say how the body ends."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (status, _REASONS.get(status, b"Status"), lines, framing)


class Exchange:
    """A request, and its answer on the way: `send`, or `begin`, `write` and `end`. Nothing is sent to one who has left."""

    __slots__ = (
        "_chunked",
        "_connection",
        "_keep_alive",
        "answered",
        "begun",
        "on_ready",
        "on_slow",
        "request",
        "status",
        "task",
    )

    def __init__(self, connection: _Connection, request: Request) -> None:
        self._connection = connection
        self._keep_alive = request.keep_alive
        self._chunked = False
        self.request = request
        self.begun = False
        """The answer's head was sent."""
        self.answered = False
        """The answer was sent whole, or was given up."""
        self.status = 0
        self.task: asyncio.Task[None] | None = None
        self.on_slow: Callable[[], None] | None = None
        self.on_ready: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self._connection.closed

    @property
    def slow(self) -> bool:
        """Whether more waits for the client than should."""
        return self._connection.slow

    @property
    def peer(self) -> str:
        """Where the client is."""
        return self._connection.peer

    def send(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer."""
        self.begun = True
        self.status = status
        length = b"content-length: %d\r\n" % len(body)
        shown = b"" if self.request.method == b"HEAD" else body
        self._connection.write(head_of(status, headers, length + self._ending()) + shown)
        self._finish()

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], length: int | None = None) -> None:
        """Begin an answer of `length` bytes, or of a length that is not known yet."""
        self.begun = True
        self.status = status
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        else:
            framing, self._chunked = b"transfer-encoding: chunked\r\n", True
        self._connection.write(head_of(status, headers, framing + self._ending()))

    def write(self, data: bytes) -> None:
        """Send a piece."""
        if not data:
            return
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """Say that this was all."""
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._finish()

    def abort(self) -> None:
        """Break the connection off, so that the client sees that the answer is not whole."""
        self.answered = True
        self._connection.break_off()

    def _ending(self) -> bytes:
        if self._connection.keeps_alive(self):
            return b""
        self._keep_alive = False
        return b"connection: close\r\n"

    def _finish(self) -> None:
        self.answered = True
        self._connection.finished(keep_alive=self._keep_alive)


class _Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader = RequestReader(self.write, body_bytes=server.body_bytes)
        self._waiting: deque[Request] = deque()
        self._waiting_bytes = 0
        self._transport: asyncio.Transport
        self._refused: BadHttp | None = None
        self._paused = False
        self._served = False
        """It has carried a request."""
        self.exchange: Exchange | None = None
        self.closed = False
        self.slow = False
        self.peer = ""
        self.since = server.now
        """Since when it has been as it is: idle, or with a request that has begun and is not whole."""
        self._slow_since = server.now

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        alive.watch(self._transport)
        address = self._transport.get_extra_info("peername")
        self.peer = str(address[0]) if isinstance(address, tuple) else "local"
        if not self._server.add(self):
            self._refuse(BadHttp(503, "this server has as many connections as it takes; try again later"))

    def connection_lost(self, _: Exception | None) -> None:
        self.closed = True
        self._server.remove(self)
        self._waiting.clear()
        exchange = self.exchange
        if exchange is not None and exchange.task is not None and not exchange.answered:
            exchange.task.cancel()

    def eof_received(self) -> bool:
        # A client that sent all and still reads looks like one that left, and engines are busy: it counts as gone.
        return False

    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            return
        inside = self._reader.inside
        try:
            requests = self._reader.feed(data)
        except BadHttp as error:
            self._refused = error
            if self.exchange is None:
                self._refuse(error)
            return
        # Not at every piece: who sends a byte now and then would have all the time in the world.
        if self.exchange is None and (requests or not inside):
            self.since = self._server.now
        for request in requests:
            self._waiting.append(request)
            self._waiting_bytes += len(request.body)
        if len(self._waiting) > PIPELINED_LIMIT or self._waiting_bytes > PIPELINED_BYTES + len(data):
            self._pause()
        self._next()

    def pause_writing(self) -> None:
        self.slow = True
        self._slow_since = self._server.now
        if self.exchange is not None and self.exchange.on_slow is not None:
            self.exchange.on_slow()

    def resume_writing(self) -> None:
        self.slow = False
        if self.exchange is not None and self.exchange.on_ready is not None:
            self.exchange.on_ready()

    def write(self, data: bytes) -> None:
        if not self.closed:
            self._transport.write(data)

    def break_off(self) -> None:
        self.closed = True
        self._transport.abort()

    def keeps_alive(self, exchange: Exchange) -> bool:
        return exchange.request.keep_alive and not self._server.draining and self._refused is None

    def finished(self, *, keep_alive: bool) -> None:
        """The answer was written."""
        self.exchange = None
        self.since = self._server.now
        if not keep_alive and not self.closed:
            if self._refused is not None:
                self._refuse(self._refused)
            else:
                self._transport.close()
            return
        if self._refused is not None:
            self._refuse(self._refused)
            return
        if self._paused and not self._waiting:
            self._paused = False
            self._transport.resume_reading()
        self._next()

    def sweep(self, now: float) -> None:
        """Leave when nothing was asked for too long, or when the answer is not taken."""
        if self.closed:
            return
        if self.slow and now - self._slow_since > SLOW_SECONDS:
            self.break_off()
        if self.exchange is not None:
            return
        quiet = now - self.since
        if not self._reader.inside:
            # A request may be on its way: one that has been connected for a moment is about to send its first.
            patience = IDLE_SECONDS if not self._server.draining else 0.0 if self._served else FIRST_SECONDS
            if quiet >= patience:
                self._transport.close()
        elif quiet > (BODY_SECONDS if self._reader.in_body else HEAD_SECONDS):
            self._refuse(BadHttp(408, "the request did not come whole in time"))

    def make_room(self) -> None:
        """Leave, so that another has a place."""
        if self._reader.inside:
            self._refuse(BadHttp(408, "the request did not come whole in time, and others want its place"))
        else:
            self._transport.close()
        self.closed = True

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _next(self) -> None:
        if self.exchange is not None or not self._waiting or self.closed:
            return
        request = self._waiting.popleft()
        self._waiting_bytes -= len(request.body)
        self._served = True
        self.exchange = Exchange(self, request)
        self._server.handle(self.exchange)

    def _refuse(self, error: BadHttp) -> None:
        self._refused = error
        body = self._server.refusal(error)
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        self.write(head_of(error.status, headers, b"content-length: %d\r\n" % len(body)) + body)
        if not self.closed:
            self._transport.close()


class Server:
    """Serves HTTP with a handler. `refusal` makes the body of an answer to what can't be read.

    A connection takes `descriptors` descriptors, those that the handler uses for it included.
    """

    def __init__(
        self, handler: Callable[[Exchange], Awaitable[None]], refusal: Callable[[BadHttp], bytes], *,
        connections: int = CONNECTIONS_LIMIT, descriptors: int = 1, body_bytes: int = BODY_BYTES,
    ) -> None:  # fmt: skip
        self._handler = handler
        self.refusal = refusal
        self.limit = spared(connections, descriptors)
        """Most connections."""
        self.body_bytes = body_bytes
        self.draining = False
        self.now = 0.0
        self.open = 0
        """Exchanges that are on their way."""
        self.refused_connections = 0
        self._connections: set[_Connection] = set()
        self._loop: asyncio.AbstractEventLoop
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = anyio.Event()

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    @asynccontextmanager
    async def listening(
        self, where: socket.socket, *, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[tuple[str, int]]:
        """Listen for the length of a block, then take no more and let what is on its way end; gives where it listens."""
        self._loop = loop = asyncio.get_running_loop()
        self.now = loop.time()
        async with anyio.create_task_group() as group:
            make: Any = loop.create_unix_server if where.family == socket.AF_UNIX else loop.create_server
            server = await make(
                lambda: _Connection(self), sock=where, backlog=BACKLOG, ssl=tls,
                ssl_handshake_timeout=HEAD_SECONDS if tls is not None else None,
            )  # fmt: skip
            group.start_soon(self._sweep)
            try:
                yield where.getsockname()[:2]
            finally:
                self.draining = True
                with anyio.move_on_after(DRAIN_SECONDS, shield=True):
                    take_no_more(where)
                    await anyio.sleep(ACCEPT_SECONDS)
                    server.close()
                    await self._drained()
                server.close()
                group.cancel_scope.cancel()
                for task in list(self._tasks):
                    task.cancel()
                if self._tasks:
                    with anyio.move_on_after(LEAVE_SECONDS, shield=True):
                        await asyncio.wait(self._tasks)
                for connection in list(self._connections):
                    connection.break_off()

    async def _drained(self) -> None:
        """Wait until nothing is on its way; who is connected and asks nothing is sent away."""
        while self._connections:
            self.now = self._loop.time()
            for connection in list(self._connections):
                connection.sweep(self.now)
            with anyio.move_on_after(DRAIN_LOOK_SECONDS):
                self._idle = anyio.Event()
                await self._idle.wait()

    def add(self, connection: _Connection) -> bool:
        """A connection has come; whether it is taken."""
        if len(self._connections) >= self.limit:
            # Several at once: looking for them again for each that comes would be work.
            waiting = sorted((each for each in self._connections if each.exchange is None), key=lambda each: each.since)
            for each in waiting[: len(self._connections) // MADE_ROOM or 1]:
                each.make_room()
                self._connections.discard(each)
        if len(self._connections) >= self.limit:
            self.refused_connections += 1
            return False
        self._connections.add(connection)
        return True

    def remove(self, connection: _Connection) -> None:
        """A connection has gone."""
        self._connections.discard(connection)
        if self.draining and not self._connections:
            self._idle.set()

    def handle(self, exchange: Exchange) -> None:
        """Have an exchange handled."""
        self.open += 1
        # A task of the loop's own: in a task group it costs as much again as a decision.
        exchange.task = self._loop.create_task(self._run(exchange))
        self._tasks.add(exchange.task)

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._handler(exchange)
            if not exchange.answered:
                exchange.abort()
        except asyncio.CancelledError:
            # The client has left, or the server stops; whoever wrote to it has let go already.
            if not exchange.answered:
                exchange.abort()
        except Exception as error:  # noqa: BLE001 - one request's defect is not the others'
            _log.exception("exchange_failed", error=repr(error))
            if not exchange.begun:
                body = self.refusal(BadHttp(500, "a defect; see the log"))
                exchange.send(500, [(b"content-type", b"application/json")], body)
            elif not exchange.answered:
                exchange.abort()
        finally:
            self.open -= 1
            if exchange.task is not None:
                self._tasks.discard(exchange.task)

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(SWEEP_SECONDS)
            self.now = asyncio.get_running_loop().time()
            for connection in list(self._connections):
                connection.sweep(self.now)
