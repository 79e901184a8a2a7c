"""Connections to engines: a request out, an answer in piece by piece, connections kept for a while.

A `Call` is one request at an engine. Its answer's data goes to a `sink` as it comes, without a task between; whoever
waits is woken for the head and for the end only. Closing a call closes its connection, upon which engines give up the
request.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import urlsplit

import anyio

from kvplane.services.http.reader import AnswerReader
from kvplane.services.protocol.errors import BadAnswer, BadRequest, EngineFailed

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from kvplane.services.http.reader import Headers

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""Connections are kept so long: engines close idle ones after 5 s, and a request that meets that is lost."""
HIGH_WATER = 256 << 10
KEPT_LIMIT = 1024
"""Most idle connections to one engine."""


class Origin(NamedTuple):
    """Where an engine answers."""

    host: str
    port: int
    tls: bool
    path: str
    """What comes before an endpoint's path, without the last slash."""

    @property
    def authority(self) -> bytes:
        """For the header `host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = 443 if self.tls else 80
        return (host if self.port == usual else f"{host}:{self.port}").encode()


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
    return Origin(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/"))


def request_head(where: Origin, method: bytes, target: bytes, size: int, headers: bytes) -> bytes:
    """The head of a request with a body of `size` bytes; `headers` are the lines of all further ones."""
    return b"%b %b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\ncontent-length: %d\r\n%b\r\n" % (
        method, where.path.encode() + target, where.authority, size, headers,
    )  # fmt: skip


class Call(asyncio.Protocol):
    """A connection to an engine, and the request that it carries at the moment."""

    def __init__(self, pool: Pool, where: Origin) -> None:
        self._pool = pool
        self._where = where
        self._transport: asyncio.Transport
        self._reader: AnswerReader | None = None
        self._sink: Callable[[bytes], None] | None = None
        self._held: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failed: EngineFailed | None = None
        self._fresh = True
        self._received = False
        self._silent_too_long = False
        self._silent: asyncio.TimerHandle | None = None
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

    def connection_lost(self, error: Exception | None) -> None:
        """For the loop."""
        self.closed = True
        self._stop_timer()
        self._pool.lost(self, self._where)
        if self._reader is None or self.ended:
            return
        try:
            self._reader.close()
        except BadAnswer as broken:
            self._fail(
                f"{broken}" if self.headed else f"it closed the connection ({type(error).__name__ if error else 'EOF'})"
            )

    def data_received(self, data: bytes) -> None:
        """For the loop."""
        reader = self._reader
        if reader is None or self.ended:
            # Nobody asked for it.
            self._transport.abort()
            return
        self._received = True
        self._last = self._pool.clock()
        try:
            reader.feed(data)
        except BadAnswer as error:
            self._fail(str(error))
            self._transport.abort()

    @property
    def stale(self) -> bool:
        """Whether the engine closed a connection that had carried another request, without a word on this one."""
        return not self._fresh and not self._received and not self._silent_too_long

    def send(self, head: bytes, body: bytes, patience: float) -> None:
        """Send a request; its answer must not be silent for longer than `patience` seconds."""
        self._reader = AnswerReader(self._on_head, self._on_data, self._on_end)
        self.headed = self.ended = False
        self._failed = None
        self._received = False
        self._held = []
        self._sink = None
        self._patience = patience
        self._last = self._pool.clock()
        self._silent = self._pool.loop.call_later(patience, self._look)
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
        self._stop_timer()
        reader = self._reader
        if self.ended and reader is not None and reader.keep_alive and not self.closed:
            self.resume()
            self._reader = None
            self._fresh = False
            self._pool.keep(self, self._where)
        else:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self._stop_timer()
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
        self._stop_timer()
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

    def _look(self) -> None:
        """Whether it was silent for too long. A client that does not read is no silence of the engine's."""
        quiet = self._pool.clock() - self._last
        if self._paused or quiet < self._patience:
            wait = self._patience if self._paused else max(0.01, self._patience - quiet)
            self._silent = self._pool.loop.call_later(wait, self._look)
            return
        self._silent_too_long = True
        self._fail(f"it said nothing for {self._patience:g} s")
        self.close()

    def _stop_timer(self) -> None:
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None


class Pool:
    """Connections to engines. `tls` is for those at https URLs."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self._tls = tls
        self._kept: dict[Origin, list[tuple[Call, float]]] = {}

    async def send(
        self, where: Origin, head: bytes, body: bytes, *, patience: float, connect: float = CONNECT_SECONDS
    ) -> Call:
        """Send a request and wait for the head of its answer. Raises `EngineFailed`, with the call closed."""
        while True:
            call = self._take(where)
            if call is None:
                call = await self._connect(where, connect)
            call.send(head, body, patience)
            try:
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
