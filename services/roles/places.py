"""Requests that wait for a place: all nodes of their model run as many as they may.

Tenants take turns: whoever has had fewest is next, and one that comes is level with those that wait, so a flood of one tenant's
costs the others no more than one place each round. Of a tenant's own requests the most urgent is first, then the first to come:
what a client says of its priority orders its own requests and no one else's. The queue is bounded. Where it is full, the tenant
that has most in it gives up its last for one that has fewer.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import contextmanager
from heapq import heappop, heappush
from time import monotonic
from typing import TYPE_CHECKING

import anyio

from kvplane.services.protocol.errors import Overloaded, QueueFull

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WAITING_LIMIT = 1024
"""Most requests of a model that wait at one router."""
WAITING_BYTES = 256 << 20
"""Most bytes of their bodies."""
RATE_SECONDS = 30.0
"""Over so long it is measured how fast a queue drains."""
MEASURED_SECONDS = 3.0
"""What was measured for less long says nothing."""
LONGEST_RETRY_SECONDS = 60.0


class Turn:
    """One that waits. `mine` waits until it may try to get a place; one that tried in vain calls it again."""

    __slots__ = ("_queue", "in_queue", "number", "priority", "ready", "refused", "size", "tenant")

    def __init__(self, queue: _Queue, tenant: str, priority: int, number: int, size: int) -> None:
        self._queue = queue
        self.tenant = tenant
        self.priority = priority
        self.number = number
        self.size = size
        self.ready = anyio.Event()
        self.refused = False
        self.in_queue = False

    def __lt__(self, other: Turn) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    async def mine(self) -> None:
        """Wait for the turn. Raises `QueueFull` when others need the place in the queue more."""
        if self.ready.is_set():
            # It had its turn, and somebody else was faster.
            self.ready = anyio.Event()
            self._queue.put(self, again=True)
        await self.ready.wait()
        if self.refused:
            raise QueueFull("more requests wait than may, and most of them are yours; send fewer at once")


class _Line:
    """The requests of one tenant, and how many turns it has had."""

    __slots__ = ("heap", "turns")

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.heap: list[Turn] = []


class _Queue:
    """Those who wait for one model."""

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        self.rate = _Rate(monotonic())
        self.inside = 0
        """Those in a block of `Places.turn`."""
        self.count = 0
        self.bytes = 0
        self._level = 0
        """Turns that the last one who had one had had."""

    def put(self, turn: Turn, *, again: bool = False) -> None:
        """Let one in."""
        line = self.lines.get(turn.tenant)
        if line is None:
            line = self.lines[turn.tenant] = _Line(self._level)
        if again:
            line.turns = max(0, line.turns - 1)
        heappush(line.heap, turn)
        turn.in_queue = True
        self.count += 1
        self.bytes += turn.size

    def remove(self, turn: Turn) -> None:
        """One leaves, wherever it stands."""
        line = self.lines[turn.tenant]
        line.heap.remove(turn)
        line.heap.sort()
        self._left(turn, line)

    def _left(self, turn: Turn, line: _Line) -> None:
        turn.in_queue = False
        self.count -= 1
        self.bytes -= turn.size
        if not line.heap:
            del self.lines[turn.tenant]

    def next(self) -> Turn | None:
        """Whose turn it is; it leaves the queue."""
        if not self.lines:
            return None
        line = min(self.lines.values(), key=lambda line: (line.turns, line.heap[0].number))
        turn = heappop(line.heap)
        self._level = line.turns
        line.turns += 1
        self._left(turn, line)
        return turn

    def give_up(self, tenant: str) -> Turn | None:
        """The last of the tenant that has most, for one of this tenant; none when that has as many."""
        most = max(self.lines, key=lambda name: len(self.lines[name].heap), default=tenant)
        own = self.lines.get(tenant)
        if most == tenant or len(self.lines[most].heap) <= (0 if own is None else len(own.heap)) + 1:
            return None
        last = max(self.lines[most].heap)
        self.remove(last)
        return last

    def before(self, tenant: str) -> int:
        """How many have their turn before one of this tenant that comes now, if none comes after it."""
        own = self.lines.get(tenant)
        rounds = 1 if own is None else len(own.heap) + 1
        return sum(min(len(line.heap), rounds) for name, line in self.lines.items() if name != tenant) + rounds - 1


class _Rate:
    """How fast a queue drains, as far back as it has not been empty."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._times: deque[float] = deque(maxlen=WAITING_LIMIT)

    def add(self, now: float) -> None:
        """One got its place."""
        self._times.append(now)

    def a_second(self, now: float) -> float:
        """Places a second of late; 0 where that is not known yet."""
        times = self._times
        while times and times[0] < now - RATE_SECONDS:
            times.popleft()
        seconds = min(now - self._since, RATE_SECONDS)
        if len(times) == WAITING_LIMIT:
            seconds = min(seconds, now - times[0])
        return len(times) / seconds if seconds >= MEASURED_SECONDS else 0.0


class Places:
    """Who waits, by model."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._number = 0
        self.refused = 0
        """Requests for which there was no room in the queue."""

    def __bool__(self) -> bool:
        return bool(self._queues)

    def waits_for(self, model: str) -> bool:
        """Whether anyone waits for a place of a model."""
        return model in self._queues

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(queue.count for queue in self._queues.values())

    @contextmanager
    def turn(self, model: str, tenant: str = "", priority: int = 0, size: int = 0) -> Iterator[Turn]:
        """Stand in the queue of a model for the length of a block; who leaves the block leaves the queue.

        A lower `priority` is more urgent; `size` is what waiting takes of memory, in bytes. Raises `QueueFull`.
        """
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = _Queue()
        queue.inside += 1
        try:
            turn = self._join(queue, model, tenant, priority, size)
            try:
                yield turn
                queue.rate.add(monotonic())
            except BaseException:
                if turn.in_queue:
                    queue.remove(turn)
                elif not turn.refused and (following := queue.next()) is not None:
                    # It had its turn and made nothing of it.
                    following.ready.set()
                raise
        finally:
            queue.inside -= 1
            if not queue.inside:
                del self._queues[model]

    def _join(self, queue: _Queue, model: str, tenant: str, priority: int, size: int) -> Turn:
        while queue.count >= WAITING_LIMIT or (queue.count and queue.bytes + size > WAITING_BYTES):
            last = queue.give_up(tenant)
            if last is None:
                self.refused += 1
                full = QueueFull(
                    f"{queue.count:,} requests wait for model {model[:80]!r}, as many as may; try again later"
                )
                full.retry_after = self.expected(model, tenant)
                raise full
            self.refused += 1
            last.refused = True
            last.ready.set()
        self._number += 1
        turn = Turn(queue, tenant, priority, self._number, size)
        queue.put(turn)
        return turn

    def expected(self, model: str, tenant: str = "") -> float:
        """Seconds until one that comes now had its turn, as fast as the queue drains; 0 where that is not known."""
        queue = self._queues.get(model)
        a_second = 0.0 if queue is None else queue.rate.a_second(monotonic())
        return (queue.before(tenant) + 1) / a_second if queue is not None and a_second else 0.0

    def told(self, error: Overloaded, model: str, tenant: str) -> Overloaded:
        """The error, with when it may go again."""
        error.retry_after = min(math.ceil(self.expected(model, tenant)), LONGEST_RETRY_SECONDS)
        return error

    def free(self, models: Iterable[str]) -> None:
        """A place of a node that serves these models is free: one request of each may try."""
        for model in models:
            queue = self._queues.get(model)
            turn = None if queue is None else queue.next()
            if turn is not None:
                turn.ready.set()

    def changed(self) -> None:
        """A node has come or changed: everyone may try, each in its turn."""
        for queue in self._queues.values():
            while (turn := queue.next()) is not None:
                turn.ready.set()
