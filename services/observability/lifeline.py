"""A watch on a service's connection: a client whose read loop has ended hears nothing and says that it is connected.

It ends on any exception that it does not expect. Those that are known are survived (`events.log.client`); for the others the
loop itself is looked at, and a ping is never given up.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import structlog
from nats.errors import Error as NatsError

from kvplane.events.errors import LogError
from kvplane.events.log.stream import open_stream
from kvplane.services.protocol.errors import ConnectionBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nats.aio.client import Client

LOOK_SECONDS = 0.5
PING_SECONDS = 5.0
"""Between two measurements of the round trip, and two looks at the end of the log."""
MENDED = 3
"""So often in `MENDED_SECONDS` a connection is mended; then the service ends, for whoever supervises it to start anew."""
MENDED_SECONDS = 60.0
_FOR_EVER = 1 << 31

_log = structlog.get_logger("kvplane.nats")


class Lifeline:
    """Watches one client, and the one that a follower reads the log with: `reading` gives it, while there is one."""

    def __init__(
        self, client: Client, service: str, *, reading: Callable[[], Client | None] = lambda: None,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:  # fmt: skip
        self.client = client
        self._reading = reading
        self.service = service
        self.failures = 0
        """Read loops that had ended."""
        self.round_trip = math.nan
        """Seconds from a ping to its answer; not a number while there is none."""
        self.log_end = 0
        """Last sequence on the log, as it was a few seconds ago; 0 where it isn't looked at."""
        self._mended: deque[float] = deque(maxlen=MENDED)
        self._ping: asyncio.Task[float] | None = None
        self._pinged = 0.0
        self._look_seconds = look_seconds
        self._reconnects = 0

    @property
    def clients(self) -> Sequence[Client]:
        """All that are watched."""
        reading = self._reading()
        return (self.client,) if reading is None or reading is self.client else (self.client, reading)

    @property
    def deaf(self) -> bool:
        """Whether a client says that it is connected, and nobody reads what the server sends."""
        return any(map(_deaf, self.clients))

    async def run(self) -> None:
        """Watch until cancelled. Raises `ConnectionBroken` when the client can't be mended."""
        while True:
            await anyio.sleep(self._look_seconds)
            if self.client.is_closed:
                raise ConnectionBroken(
                    f"the server does not let {self.service} connect again ({self.client.last_error or 'it gave no reason'}); "
                    "see its log, and check the credentials"
                )
            for client in self.clients:
                if _deaf(client):
                    await self._mend(client)
            self._measure()

    async def watch_log(self, fleet: str) -> None:
        """Look where the log ends, until cancelled: a follower that is held up doesn't know."""
        while True:
            # What is wrong with the log the follower says.
            with suppress(LogError):
                self.log_end = (await open_stream(self.client.jetstream(), fleet)).last_seq
            await anyio.sleep(PING_SECONDS)

    async def _mend(self, client: Client) -> None:
        self.failures += 1
        now = anyio.current_time()
        if len(self._mended) == MENDED and now - self._mended[0] < MENDED_SECONDS:
            raise ConnectionBroken(
                f"the read loop of {self.service} ended {MENDED + 1} times in {MENDED_SECONDS:g} s; start it anew, and report "
                "what its log says before this"
            )
        self._mended.append(now)
        _log.error("read_loop_ended", service=self.service, failures=self.failures, mended_by="reconnecting")
        await client.force_reconnect()

    def _measure(self) -> None:
        """Ping now and then. A ping of a connection that is gone is not waited for."""
        now = anyio.current_time()
        reconnects = self.client.stats["reconnects"]
        ping = self._ping
        if ping is not None and not ping.done() and reconnects == self._reconnects:
            if now - self._pinged > PING_SECONDS:
                self.round_trip = math.nan
            return
        if ping is not None and ping.done():
            self._ping = None
            self.round_trip = math.nan if ping.cancelled() else ping.result()
        if now - self._pinged < PING_SECONDS or not self.client.is_connected:
            return
        if ping is not None:
            ping.cancel()
        self._pinged, self._reconnects = now, reconnects
        self._ping = asyncio.get_running_loop().create_task(self._round_trip())

    async def _round_trip(self) -> float:
        # The client's own figure has the resolution of the loop's clock, milliseconds.
        begin = time.perf_counter()
        try:
            await self.client.rtt(_FOR_EVER)
        except (NatsError, OSError):
            return math.nan
        return time.perf_counter() - begin


def _deaf(client: Client) -> bool:
    reading = client._reading_task  # noqa: SLF001 - nothing public has it
    return bool(client.is_connected and reading is not None and reading.done())
