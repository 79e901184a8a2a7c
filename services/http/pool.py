"""Connections to engines: a request out, an answer in piece by piece, connections kept for a while.

A `Call` is one request at an engine. Its answer's data goes to a `sink` as it comes, without a task between; whoever
waits is woken for the head and for the end only. Closing a call closes its connection, upon which engines give up the
request.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import urlsplit

import anyio

from kvplane.services.http import alive
from kvplane.services.http.reader import AnswerReader
from kvplane.services.protocol.errors import BadAnswer, BadRequest, EngineFailed

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from kvplane.services.http.reader import Headers

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""Connections are kept so long: engines close idle ones after 5 s, and a request that meets that is lost."""
LOOK_SECONDS = 0.25
"""How exactly an engine's silence is measured."""
HIGH_WATER = 256 << 10
KEPT_LIMIT = 1024
"""Most idle connections to one engine."""


class Origin(NamedTuple):
    """Where an engine answers."""

    host: str
    port: int
    tls: bool
    path: bytes
    """What comes before an endpoint's path, without the last slash."""

    host_line: bytes
    """The header `host`."""


@lru_cache(maxsize=4096)
def origin(url: str) -> Origin:
    """The origin of a URL. Raises `BadRequest`."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadRequest(f"{url[:80]!r} is no URL: {error}") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise BadRequest(f"{url[:80]!r} is no URL of http or https")
    tls = parts.scheme == "https"
    usual = 443 if tls else 80
    port = port or usual
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port == usual else f"{host}:{port}"
    return Origin(parts.hostname, port, tls, parts.path.rstrip("/").encode(), f"host: {authority}\r\n".encode())


def request_head(where: Origin, method: bytes, target: bytes, size: int, headers: bytes) -> bytes:
    """The head of a request with a body of `size` bytes; `headers` are the lines of all further ones."""
    return b"%b %b%b HTTP/1.1\r\n%baccept-encoding: identity\r\ncontent-length: %d\r\n%b\r\n" % (
        method, where.path, target, where.host_line, size, headers,
    )  # fmt: skip


class Call(asyncio.Protocol):
    """A connection to an engine, and the request that it carries at the moment."""

    def __init__(self, pool: Pool, where: Origin) -> None:
        self._pool = pool
        self._where = where
        self._transport: asyncio.Transport
        self._reader = AnswerReader(self._on_head, self._on_data, self._on_end)
        self._carries = False
        self._sink: Callable[[bytes], None] | None = None
        self._held: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failed: EngineFailed | None = None
        self._fresh = True
        self._received = False
        self._silent_too_long = False
        self._patience = 0.0
        self._last = 0.0
        self._paused = False
        self.closed = False
        self.status = 0
        self.headers: Headers = []
        self.headed = False
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """For the loop."""
        self._transport = cast("asyncio.Transport", transport)
        alive.watch(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        """For the loop."""
        self.closed = True
        self._pool.lost(self, self._where)
        if not self._carries or self.ended:
            return
        try:
            self._reader.close()
        except BadAnswer as broken:
            self._fail(
                f"{broken}" if self.headed else f"it closed the connection ({type(error).__name__ if error else 'EOF'})"
            )

    def data_received(self, data: bytes) -> None:
        """For the loop."""
        if not self._carries or self.ended:
            # Nobody asked for it.
            self._transport.abort()
            return
        self._received = True
        self._last = self._pool.clock()
        try:
            self._reader.feed(data)
        except BadAnswer as error:
            self._fail(str(error))
            self._transport.abort()

    @property
    def stale(self) -> bool:
        """Whether the engine closed a connection that had carried another request, without a word on this one."""
        return not self._fresh and not self._received and not self._silent_too_long

    def send(self, head: bytes, body: bytes, patience: float) -> None:
        """Send a request; its answer must not be silent for longer than `patience` seconds."""
        if not self._fresh:
            self._reader.begin()
        self._carries = True
        self.headed = self.ended = False
        self._failed = None
        self._received = False
        self._held = []
        self._sink = None
        self._patience = patience
        self._last = self._pool.clock()
        self._pool.watch(self)
        # One write of both, unless copying costs more than a further system call.
        if len(body) < HIGH_WATER:
            self._transport.write(head + body)
        else:
            self._transport.writelines([head, body])

    async def head(self) -> None:
        """Wait for the answer's head. Raises `EngineFailed`."""
        while not self.headed:
            await self._wait()

    def relay(self, sink: Callable[[bytes], None]) -> None:
        """Hand the answer's data on as it comes, and what has come already."""
        held, self._held = self._held, []
        self._sink = sink
        for data in held:
            sink(data)

    async def done(self) -> None:
        """Wait until all was read. Raises `EngineFailed` when it breaks off."""
        while not self.ended:
            await self._wait()

    async def read(self, limit: int) -> bytes:
        """The answer's data whole. Raises `EngineFailed`, also for more than `limit` bytes."""
        parts: list[bytes] = []
        size = 0

        def keep(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size <= limit:
                parts.append(data)
            elif not self.ended:
                self._fail(f"its answer has more than {limit:,} bytes")
                self.close()

        self.relay(keep)
        await self.done()
        if size > limit:
            raise EngineFailed(f"its answer has more than {limit:,} bytes")
        return b"".join(parts)

    def patient(self, seconds: float) -> None:
        """Change how long the engine may be silent from now on."""
        self._patience = seconds
        self._last = self._pool.clock()

    def pause(self) -> None:
        """Read no further for now."""
        if not self._paused and not self.closed:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused and not self.closed:
            self._paused = False
            self._last = self._pool.clock()
            self._transport.resume_reading()

    def release(self) -> None:
        """Be done with it: the connection is kept when it can carry another request, else it is closed."""
        if self.ended and self._reader.keep_alive and not self.closed:
            self._pool.unwatch(self)
            self.resume()
            self._carries = False
            self._fresh = False
            self._pool.keep(self, self._where)
        else:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self._pool.unwatch(self)
        if not self.closed:
            self.closed = True
            self._transport.abort()

    def _on_head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers
        self.headed = True
        self._wake()

    def _on_data(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink(data)
        else:
            self._held.append(data)

    def _on_end(self) -> None:
        self.ended = True
        self._wake()

    def _fail(self, why: str) -> None:
        if self._failed is None:
            self._failed = EngineFailed(why)
        self._wake()

    async def _wait(self) -> None:
        self._check()
        self._waiter = self._pool.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        self._check()

    def _check(self) -> None:
        # What is whole counts, even when something was wrong behind it.
        if not self.ended:
            if self._failed is not None:
                raise self._failed
            if self.closed:
                raise EngineFailed("the connection is closed")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def look(self, now: float) -> None:
        """Give up when it was silent for too long. A client that does not read is no silence of the engine's."""
        if self.ended or self._paused or now - self._last < self._patience:
            return
        self._silent_too_long = True
        self._fail(f"it said nothing for {self._patience:g} s")
        self.close()


class Pool:
    """Connections to engines. `tls` is for those at https URLs."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self._tls = tls
        self._kept: dict[Origin, list[tuple[Call, float]]] = {}
        self._open: set[Call] = set()
        self._looking: asyncio.TimerHandle | None = None

    def watch(self, call: Call) -> None:
        """Look now and then whether the call's engine is silent for too long."""
        self._open.add(call)
        # One timer for all of them: one a request would cost as much as reading its head.
        if self._looking is None:
            self._looking = self.loop.call_later(LOOK_SECONDS, self._look)

    def unwatch(self, call: Call) -> None:
        """The call is over."""
        self._open.discard(call)

    def _look(self) -> None:
        now = self.clock()
        for call in list(self._open):
            call.look(now)
        self._looking = self.loop.call_later(LOOK_SECONDS, self._look) if self._open else None

    async def send(
        self, where: Origin, head: bytes, body: bytes, *, patience: float, connect: float = CONNECT_SECONDS,
        sent: Callable[[], None] | None = None,
    ) -> Call:  # fmt: skip
        """Send a request and wait for the head of its answer; `sent` is called between, each time that it is sent.

        Raises `EngineFailed`, with the call closed.
        """
        while True:
            call = self._take(where)
            if call is None:
                call = await self._connect(where, connect)
            call.send(head, body, patience)
            try:
                if sent is not None:
                    sent()
                await call.head()
            except EngineFailed:
                call.close()
                # It closed a connection that was kept just when it was used again.
                if call.stale:
                    continue
                raise
            except BaseException:
                call.close()
                raise
            return call

    def keep(self, call: Call, where: Origin) -> None:
        """Keep a connection that can carry another request."""
        kept = self._kept.setdefault(where, [])
        if len(kept) >= KEPT_LIMIT:
            call.close()
            return
        kept.append((call, self.clock() + IDLE_SECONDS))

    def lost(self, call: Call, where: Origin) -> None:
        """A connection has ended."""
        self._open.discard(call)
        kept = self._kept.get(where)
        if kept:
            self._kept[where] = [entry for entry in kept if entry[0] is not call]

    async def sweep(self) -> None:
        """Close connections that were kept long enough, until cancelled."""
        try:
            while True:
                await anyio.sleep(IDLE_SECONDS / 2)
                now = self.clock()
                for where, kept in list(self._kept.items()):
                    self._kept[where] = [entry for entry in kept if entry[1] > now]
                    for call, until in kept:
                        if until <= now:
                            call.close()
                    if not self._kept[where]:
                        del self._kept[where]
        finally:
            self.close()

    def close(self) -> None:
        """Close all that are kept."""
        for kept in self._kept.values():
            for call, _ in kept:
                call.close()
        self._kept = {}

    def _take(self, where: Origin) -> Call | None:
        kept = self._kept.get(where)
        now = self.clock()
        while kept:
            call, until = kept.pop()
            if not call.closed and until > now:
                return call
            call.close()
        return None

    async def _connect(self, where: Origin, seconds: float) -> Call:
        try:
            with anyio.fail_after(seconds):
                _, call = await self.loop.create_connection(
                    lambda: Call(self, where), where.host, where.port, ssl=(self._tls or True) if where.tls else None
                )
        except TimeoutError:
            raise EngineFailed(f"it takes no connection in {seconds:g} s") from None
        except OSError as error:
            raise EngineFailed(f"it can't be reached ({error.strerror or error})") from None
        return call
