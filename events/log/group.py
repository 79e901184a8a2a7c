"""Writing at high rates: events gather while a commit is in flight, and go out together.

`GroupWriter` writes one subject. `Writers` runs several and, when its service is stopped, sees to it that what was handed
over is on disk before it leaves.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio
import structlog

from kvplane.events import codec
from kvplane.events.allowance import BLOCKS_A_SECOND, cost
from kvplane.events.cutting import cut
from kvplane.events.log.append import HEADERS_BYTES
from kvplane.events.types import EVENTS_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import TaskGroup

    from kvplane.events.allowance import Pace
    from kvplane.events.log.append import Appender
    from kvplane.events.types import Event

ENOUGH_EVENTS = 256
"""So many waiting events are sent without lingering."""
LIMIT_BYTES = 256 << 20
"""So many bytes of events wait at the most, for each subject."""
PACED_BLOCKS = BLOCKS_A_SECOND // 4
"""A commit of a writer with a pace ends at the event that reaches this."""
CLOSE_SECONDS = 3.0
"""How long a service that is stopped waits for the log to take what it still has."""

_log = structlog.get_logger("kvplane.log")


class GroupWriter:
    """Gathers events for one subject and appends them in groups, in the order in which they were given.

    A group is sent when the one before it is acknowledged and `linger` seconds have passed or enough events wait. At
    most `limit` events and `limit_bytes` wait; `put` drops the oldest beyond that and counts it, `send` waits instead.
    With a `pace` it waits so that it writes no more than a node may.
    """

    def __init__(
        self, appender: Appender, subject: str, *, linger: float = 0.002, limit: int = 100_000,
        limit_bytes: int = LIMIT_BYTES, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self._appender = appender
        self._subject = subject
        self._linger = linger
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._pace = pace
        self._waiting: deque[bytes] = deque()
        self._blocks: deque[int] = deque()
        """What each of those counts for the pace, if there is one."""
        self._bytes = 0
        self._in_flight = 0
        self._wake = anyio.Event()
        self._enough = anyio.Event()
        self._progress = anyio.Event()
        self.acknowledged = 0
        """Events on disk."""
        self.dropped = 0
        """Events that could not wait any longer for the log."""
        self.available = True
        """Whether the log acknowledged the last try."""
        self.last_sequence = 0

    @property
    def waiting(self) -> int:
        """Events that are not yet acknowledged."""
        return len(self._waiting) + self._in_flight

    def put(self, event: Event) -> None:
        """Hand over an event without waiting. One that is larger than a message is cut."""
        encoded = codec.encode_one(event)
        if len(encoded) <= self._space:
            self._keep(event, encoded)
        else:
            for part, piece in cut(event, self._space):
                self._keep(part, piece)
        while len(self._waiting) > self._limit or (self._bytes > self._limit_bytes and len(self._waiting) > 1):
            self._leave()
            self.dropped += 1
            # At the first one, and when they have doubled: it may go on for hours.
            if not self.dropped & (self.dropped - 1):
                _log.error("events_dropped", subject=self._subject, dropped=self.dropped, waiting=self.waiting)
        if not self._wake.is_set():
            self._wake.set()
        if len(self._waiting) >= ENOUGH_EVENTS and not self._enough.is_set():
            self._enough.set()

    def _keep(self, event: Event, encoded: bytes) -> None:
        self._waiting.append(encoded)
        self._bytes += len(encoded)
        if self._pace is not None:
            self._blocks.append(cost(event))

    async def send(self, event: Event) -> None:
        """Hand over an event; wait while too many are waiting."""
        while len(self._waiting) >= self._limit or self._bytes > self._limit_bytes // 2:
            await self._progress.wait()
        self.put(event)

    async def flush(self) -> None:
        """Wait until everything handed over so far is on disk or dropped."""
        goal = self.acknowledged + self.dropped + self.waiting
        while self.acknowledged + self.dropped < goal:
            await self._progress.wait()

    async def run(self) -> None:
        """Append groups until cancelled."""
        while True:
            if not self._waiting:
                self._wake = anyio.Event()
                await self._wake.wait()
            # Small commits cost as much as large ones: a group waits even when the one before it took long.
            if self._linger and len(self._waiting) < ENOUGH_EVENTS:
                self._enough = anyio.Event()
                with anyio.move_on_after(self._linger):
                    await self._enough.wait()
            if self._pace is not None:
                await anyio.sleep(max(0.0, self._pace.wait(anyio.current_time())))
            group = self._take()
            if group:
                await self._append(group)
                self.acknowledged += len(group)
            self._in_flight = 0
            self._progress.set()
            self._progress = anyio.Event()

    @property
    def _space(self) -> int:
        """Bytes of events that a message of this connection has room for."""
        return self._appender.client.max_payload - HEADERS_BYTES - 8

    def _take(self) -> list[bytes]:
        space = self._space
        group: list[bytes] = []
        waiting, blocks = self._waiting, 0
        while waiting and len(group) < EVENTS_LIMIT and blocks < PACED_BLOCKS:
            size = len(waiting[0])
            if size > space:
                if group:
                    break
                self._leave()
                self.dropped += 1
                _log.error("event_too_large", subject=self._subject, bytes=size)
                space = self._space
                continue
            space -= size
            if self._pace is not None:
                blocks += self._blocks[0]
            group.append(self._leave())
        if self._pace is not None:
            self._pace.wrote(blocks, anyio.current_time())
        self._in_flight = len(group)
        return group

    def _leave(self) -> bytes:
        """The oldest event that waits, which waits no longer."""
        event = self._waiting.popleft()
        self._bytes -= len(event)
        if self._pace is not None:
            self._blocks.popleft()
        return event

    async def _append(self, group: list[bytes]) -> None:
        """Append until acknowledged: the writer's counter stays the same, however long the log is away."""
        self.last_sequence = await self._appender.append_forever(self._subject, codec.join(group), self._set_available)

    def _set_available(self, *, available: bool, error: str) -> None:
        if available is not self.available:
            self.available = available
            event, why = ("log_is_back", {}) if available else ("log_is_away", {"error": error})
            _log.warning(event, subject=self._subject, waiting=self.waiting, dropped=self.dropped, **why)


class Writers:
    """Runs group writers of one service. `run` in a task of it, `close` when the service ends."""

    def __init__(self) -> None:
        self._writers: list[GroupWriter] = []
        self._group: TaskGroup | None = None
        self._scope = anyio.CancelScope(shield=True)

    def __iter__(self) -> Iterator[GroupWriter]:
        return iter(self._writers)

    def add(self, writer: GroupWriter) -> GroupWriter:
        """Run this writer, too, now or as soon as `run` is called."""
        self._writers.append(writer)
        if self._group is not None:
            self._group.start_soon(writer.run)
        return writer

    async def run(self) -> None:
        """Run the writers until `close`: cancelling the service does not reach them."""
        with self._scope:
            async with anyio.create_task_group() as self._group:
                for writer in self._writers:
                    self._group.start_soon(writer.run)
                await anyio.sleep_forever()

    async def flush(self) -> None:
        """Wait until everything handed over so far is on disk or dropped."""
        for writer in self._writers:
            await writer.flush()

    async def close(self) -> None:
        """Flush for `CLOSE_SECONDS` at the most, and stop."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS) as scope:
            await self.flush()
        if scope.cancelled_caught:
            _log.error("events_not_recorded", events=sum(writer.waiting for writer in self._writers))
        self._scope.cancel()
