"""Leases of requests: who asks where a request should go and may never send it, says for how long it counts.

The router that decided keeps them, and ends what nobody completed in time by a completion of its own, so that the fold needs
no rule for them. A router that is killed takes its leases with it: then the fold's own limit holds
(`projections.load.ACTIVE_SECONDS`).
"""

from __future__ import annotations

import math
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
        self._sooner = anyio.Event()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, request: str, node: str, seconds: float, traceparent: str) -> None:
        """Let a request count on a node for so long."""
        self._held.pop(request, None)
        self._held[request] = Lease(node, anyio.current_time() + seconds, traceparent)
        if len(self._held) > self._limit:
            self._abandon(next(iter(self._held)))
        self._sooner.set()

    def completed(self, request: str) -> None:
        """Somebody completed it."""
        self._held.pop(request, None)

    async def run(self) -> None:
        """End what is over, until cancelled."""
        while True:
            now = anyio.current_time()
            for request in [request for request, lease in self._held.items() if lease.until <= now]:
                self._abandon(request)
            soonest = min((lease.until for lease in self._held.values()), default=math.inf)
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
