"""The requests that one router holds: what it says of them on the log, and those in this process that wait.

Who asks over NATS is told to ask again (`ask_again`). Who waits in this process, as a gateway's clients do, is woken as soon as
its turn comes. Nothing is held for a client that is gone: it is released, or leaves the queue as its router is silent.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import structlog

from kvplane.events.durations import Durations
from kvplane.events.types import RequestReleased
from kvplane.projections.held import HELD_LIMIT, LEASE_SECONDS, LEFT
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.routing.holding import SAY_SECONDS, release_reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplane.events.types import Event
    from kvplane.projections.fleet import FleetState
    from kvplane.services.routing.decide import Chooser
    from kvplane.services.routing.holding import Hold
    from kvplane.services.routing.query import Query

ASK_AGAIN_SECONDS = (1.0, 10.0)
"""Who is held asks again after so long: no sooner than the first, no later than the second."""
LOOK_SECONDS = 0.05
"""So often at the most it is looked who may go, while commits come."""
IDLE_LOOK_SECONDS = 1.0
"""So often while none do: contexts become idle by themselves."""
WAITED_SECONDS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Buckets of how long requests were held."""
_NS = 1_000_000_000

_log = structlog.get_logger("kvplane.router")


class HeldRequests:
    """Those of one router. `put` writes to the log."""

    def __init__(self, state: FleetState, chooser: Chooser, put: Callable[[Event], object]) -> None:
        self._state = state
        self._chooser = chooser
        self._put = put
        self._said: dict[str, tuple[str, int, int]] = {}
        """Of each: its model, since when it is held, and when that was said last, by this process's clock in nanoseconds."""
        self._waiting: dict[str, tuple[str, anyio.Event]] = {}
        """Of those who wait here: the model, and what wakes them."""
        self._looked = 0.0
        self.holds = 0
        """Requests that were held."""
        self.released: dict[str, int] = {}
        """How many were released, by reason."""
        self.seconds = Durations(WAITED_SECONDS)
        """How long they were held."""

    def __len__(self) -> int:
        return len(self._said)

    def hold(self, query: Query, hold: Hold, now: int, applied: int) -> float:
        """A request is held; after how many seconds whoever waits for it is to ask again."""
        model, since, said = self._said.get(query.id, (query.model, now, 0))
        first = query.id not in self._said and query.id not in self._state.queue
        if now - said >= SAY_SECONDS * _NS:
            said = now
            self._put(hold.event(query, now, applied, first=first))
        if first:
            self.holds += 1
            if len(self._said) >= HELD_LIMIT:
                del self._said[next(iter(self._said))]
        self._said[query.id] = model, since, said
        least, most = ASK_AGAIN_SECONDS
        return min(max(hold.expected / 4, least), most)

    def let_in(self, query: Query, now: int) -> None:
        """A request is sent somewhere. If it was held, it is so no more."""
        if query.id in self._said or query.id in self._state.queue:
            self._release(query.id, query.model, now, "")

    def left(self, request: str) -> None:
        """Whoever waited for a request is gone."""
        if request in self._said:
            self._release(request, self._said[request][0], time.time_ns(), LEFT)

    def _release(self, request: str, model: str, now: int, reason: str) -> None:
        _, since, _ = self._said.pop(request, (model, now, 0))
        held = self._state.queue.get(request)
        waited = max(0.0, (now - (since if held is None else held.since)) / _NS)
        reason = reason or release_reason(waited, self._state)
        self._put(RequestReleased(request, model, reason, round(waited, 6)))
        self.released[reason] = self.released.get(reason, 0) + 1
        self.seconds.add(waited)

    async def wait(self, request: str, model: str, seconds: float) -> None:
        """Wait for a request's turn, or until it is time to ask again all the same."""
        turn = anyio.Event()
        self._waiting[request] = model, turn
        try:
            with anyio.move_on_after(seconds):
                await turn.wait()
        finally:
            self._waiting.pop(request, None)

    def look(self) -> None:
        """Wake those whose turn it is; to be called after each commit."""
        if self._waiting and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        now = time.time_ns()
        for model in {model for model, _ in self._waiting.values()}:
            try:
                ready = self._chooser.ready(model, now) if self._state.holding else list(self._waiting)
            except ServiceFault:
                # Its nodes are gone: they are told when they ask.
                ready = [request for request, (other, _) in self._waiting.items() if other == model]
            for request in ready:
                if request in self._waiting:
                    self._waiting[request][1].set()

    async def run(self) -> None:
        """Look now and then, and forget those who asked no more."""
        while True:
            await anyio.sleep(IDLE_LOOK_SECONDS)
            if self._waiting:
                self._look()
            before = time.time_ns() - int(LEASE_SECONDS * _NS)
            for request in [request for request, (_, _, said) in self._said.items() if said < before]:
                del self._said[request]
