"""Held requests: those of conversations for which the fleet's caches have no room, in the order in which they came.

Routers write that they hold a request, again before `LEASE_SECONDS` are over, and that they released it. So all routers know
one queue, and what a router held that is gone leaves it by itself. It is kept while the policy holds (`hold=1`), in a log of
`HOLD_FORMAT` or a later one; otherwise it is empty, and costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from kvplane.events.types import RequestHeld, RequestReleased

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvplane.projections.contexts import Contexts

HOLD_FORMAT = 4
"""From this format of the log on, requests can be held."""
HOLD_PARAMETER = "hold"
"""The parameter of every policy that says whether."""
LEFT = "left"
"""Why a request is released whose client is gone; for any other reason it was let in."""
LEASE_SECONDS = 60
"""So long after a router's last word a request is held, in seconds of log time."""
HELD_LIMIT = 10_000
"""Most requests that are held at once; beyond it none is."""
RATE_SECONDS = 600
"""Over so many seconds, and up to twice as many, it is counted what was let in."""

_NS = 1_000_000_000


class Held(Struct, frozen=True, gc=False):
    """A request that waits. Times are the log's, in unix nanoseconds: since when, and its router's last word."""

    model: str
    session: str
    tokens: int
    tenant: str
    turns: int
    since: int
    renewed: int


class Queue(OrderedDict[str, Held]):
    """Requests that are held, those that came first before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0
        """Counts what changes the order, so that what is derived from it knows when to be made again."""
        self.let_in = self.let_in_half = 0
        """Tokens of requests that were let in of late, and of those in the younger half of that time."""
        self.half_began = 0
        self.oldest_word = 0
        """No router's last word is older than this; it follows from the queue."""

    def heard(self, event: RequestHeld | RequestReleased, time: int) -> str:
        """A router holds a request, goes on with it, or released it; why that changes nothing, or empty."""
        if isinstance(event, RequestReleased):
            return "" if self.let_go(event.request, time, left=event.reason == LEFT) else "unknown_request"
        before = self.get(event.request)
        if before is not None:
            # It keeps its place.
            self[event.request] = replace(before, renewed=time)
            return ""
        if len(self) >= HELD_LIMIT:
            return "queue_full"
        if not self:
            self.oldest_word = time
        self[event.request] = Held(event.model, event.session, event.tokens, event.tenant, event.turns, time, time)
        self.changes += 1
        return ""

    def let_go(self, request: str, time: int, *, left: bool = False) -> bool:
        """A request waits no longer, since it was let in or has left; whether it did."""
        held = self.pop(request, None)
        if held is None:
            return False
        self.changes += 1
        if not left:
            self._next_half(time)
            self.let_in += held.tokens
            self.let_in_half += held.tokens
        return True

    def _next_half(self, time: int) -> None:
        half = RATE_SECONDS * _NS
        if time - self.half_began < half:
            return
        self.let_in = self.let_in_half if time - self.half_began < 2 * half else 0
        self.let_in_half = 0
        self.half_began = time - time % half

    def rate(self, time: int) -> float:
        """Tokens a second that were let in of late, at this time; 0 when none were."""
        seconds = (time - self.half_began) / _NS
        if seconds >= 2 * RATE_SECONDS:
            return 0.0
        if seconds >= RATE_SECONDS:
            return self.let_in_half / seconds
        return self.let_in / (RATE_SECONDS + max(seconds, 0.0))

    def expire(self, time: int) -> None:
        """Forget those of whom nothing was heard for too long."""
        before = time - LEASE_SECONDS * _NS
        if self.oldest_word > before:
            return
        for request in [request for request, held in self.items() if held.renewed <= before]:
            del self[request]
            self.changes += 1
        self.oldest_word = min((held.renewed for held in self.values()), default=time)

    def set_back(self, by: int) -> None:
        """The log's clock was ahead by so many nanoseconds and is right again."""
        self.update([
            (request, replace(held, since=held.since - by, renewed=held.renewed - by)) for request, held in self.items()
        ])  # fmt: skip
        self.half_began -= by
        self.oldest_word -= by


def begun(queue: Queue, contexts: Contexts, in_force: int, parameters: Mapping[str, float]) -> Queue:
    """Begin or end to hold, as format and policy say; the queue from then on."""
    holding = in_force >= HOLD_FORMAT and bool(parameters.get(HOLD_PARAMETER))
    if holding is contexts.listening:
        return queue
    contexts.listen(listening=holding)
    return Queue()
