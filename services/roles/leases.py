"""Leases of requests: who asks where a request should go and may never send it, says for how long it counts.

The router that decided keeps them, and ends what nobody completed in time by a completion of its own, so that the fold needs
no rule for them. A router that is killed takes its leases with it: then the fold's own limit holds
(`projections.load.ACTIVE_SECONDS`).
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import anyio

from kvplane.events import types

if TYPE_CHECKING:
    from collections.abc import Callable

ABANDONED = "abandoned"
"""Status of a request that nobody completed while its lease ran."""
LEASES_LIMIT = 10_000
"""Most leases of a router; beyond it the one that was given first ends."""


class Lease(NamedTuple):
    """Of a request: the node that it counts on, until when by the event loop's clock, and its traceparent."""

    node: str
    until: float
    traceparent: str


class Leases:
    """The leases of one router, `limit` at the most. `end` is called with the completion of a request whose lease has ended."""

    def __init__(self, end: Callable[[types.RequestCompleted], None], *, limit: int = LEASES_LIMIT) -> None:
        self._end = end
        self._limit = limit
        self._held: dict[str, Lease] = {}
        self._ends: list[tuple[float, str]] = []
        """When each ends, the soonest first (a heap); those of leases that are over, or were given again, lie there as well."""
        self._sooner = anyio.Event()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, request: str, node: str, seconds: float, traceparent: str) -> None:
        """Let a request count on a node for so long."""
        self._held.pop(request, None)
        until = anyio.current_time() + seconds
        self._held[request] = Lease(node, until, traceparent)
        if len(self._held) > self._limit:
            self._abandon(next(iter(self._held)))
        if len(self._ends) > 2 * self._limit:
            self._ends = [(lease.until, held) for held, lease in self._held.items()]
            heapify(self._ends)
        else:
            heappush(self._ends, (until, request))
        if self._ends[0][0] == until:
            self._sooner.set()

    def completed(self, request: str) -> None:
        """Somebody completed it."""
        self._held.pop(request, None)

    async def run(self) -> None:
        """End what is over, until cancelled."""
        while True:
            now = anyio.current_time()
            while self._ends and self._ends[0][0] <= now:
                until, request = heappop(self._ends)
                lease = self._held.get(request)
                if lease is not None and lease.until <= until:
                    self._abandon(request)
            soonest = self._ends[0][0] if self._ends else math.inf
            with anyio.move_on_after(soonest - anyio.current_time()):
                await self._sooner.wait()
                self._sooner = anyio.Event()

    def close(self) -> None:
        """End all: whoever would do it later is leaving."""
        for request in list(self._held):
            self._abandon(request)

    def _abandon(self, request: str) -> None:
        lease = self._held.pop(request)
        self._end(types.RequestCompleted(request=request, node=lease.node, status=ABANDONED, trace=lease.traceparent))
