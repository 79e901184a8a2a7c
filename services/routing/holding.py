"""Whether a request waits: where live conversations need more than the fleet's caches hold.

A conversation that goes on never waits. A new one, or one that was silent for `IDLE_SECONDS`, waits until its context has room
beside those that go on and those that wait before it; who is silent for so long gives way, the longest silent first, as caches
evict. Nobody waits longer than the policy's `hold_seconds`.

Who waits goes in the order of coming, conversations that have begun before those that have not. A context counts as if it had
come the later the larger it is (`TOKENS_A_SECOND`): a small one finds room soon, and is gone sooner. And no tenant's second
request goes before another tenant's first.

Pure, like the decision that comes after it: from the fold, the overlay, the request and the time.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from kvplane.events.types import RequestHeld
from kvplane.projections.held import HELD_LIMIT, HOLD_PARAMETER, LEASE_SECONDS
from kvplane.services.routing.parameters import Parameter
from kvplane.services.routing.query import HASHES_RECORDED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvplane.projections.fleet import FleetState
    from kvplane.projections.held import Held
    from kvplane.services.routing.overlay import Overlay
    from kvplane.services.routing.query import Query
    from kvplane.services.routing.roster import Roster

ROOM_SHARE = 0.9
"""Contexts may take so much of all caches: they grow, and answers need room as well."""
IDLE_SECONDS = 420.0
"""Who is silent for so long gives way where there is no room for all. Many come back after five minutes; few later."""
TOKENS_A_SECOND = 100
"""So many tokens of a context count as if it had come a second later."""
HOLD_SECONDS = 7200.0
SAY_SECONDS = LEASE_SECONDS / 3
"""How often routers say that they hold a request."""

HOLD = {
    HOLD_PARAMETER: Parameter(
        0, "(0 or 1)", "with 1, who begins waits while live conversations need more than all caches hold", most=1
    ),
    "hold_seconds": Parameter(HOLD_SECONDS, "s", "the longest that anyone waits"),
}
"""Parameters that every policy has, beside its own."""
_NS = 1_000_000_000
_When = tuple[bool, int]


def release_reason(waited: float, state: FleetState) -> str:
    """Why a request is let in that waited for so many seconds."""
    if not state.holding:
        return "off"
    return "bound" if waited >= bound(state) else "room"


def bound(state: FleetState) -> float:
    """The longest that anyone waits, in seconds."""
    return state.parameters.get("hold_seconds", HOLD_SECONDS)


class Hold(NamedTuple):
    """Why a request waits. `place` is counted from 1, `expected` is seconds."""

    place: int
    expected: float
    """Until it is let in: by what was let in of late, and not beyond the bound."""
    live: int
    """Tokens of the contexts of conversations that go on."""
    waiting: int
    """Those of requests that wait before it, and its own."""
    room: int
    """Tokens that all contexts may have."""
    turns: int
    """Requests that its conversation has had, as far as that is known."""

    @property
    def reason(self) -> str:
        """The reason in words."""
        return (
            f"live conversations need {self.live:,} of {self.room:,} tokens, "
            f"{self.place - 1:,} before it and itself {self.waiting:,}"
        )

    def event(self, query: Query, now: int, applied: int, *, first: bool) -> RequestHeld:
        """What the log is told of it at this time and sequence: the decision once, then that it lasts."""
        held = RequestHeld(
            request=query.id, model=query.model, tokens=query.tokens, session=query.session, tenant=query.tenant,
            turns=self.turns, reason=self.reason, place=self.place, expected=round(self.expected, 3),
        )  # fmt: skip
        if not first:
            return held
        blocks = len(query.hashes) >> 3
        with_hashes = query.recorded and blocks <= HASHES_RECORDED
        return replace(
            held, blocks=blocks, hashes=query.hashes if with_hashes else b"", applied=applied, decided=now // 1000,
            trace=query.traceparent,
        )  # fmt: skip


class Line:
    """The queue of a model in its order."""

    def __init__(self, queue: Mapping[str, Held], model: str) -> None:
        waiting = sorted(
            (_when(held.turns, held.since, held.tokens), at, request, held)
            for at, (request, held) in enumerate(queue.items())
            if held.model == model
        )
        self._of_tenant: dict[str, list[_When]] = {}
        ranked = []
        for when, _, request, held in waiting:
            own = self._of_tenant.setdefault(held.tenant, [])
            ranked.append((len(own), when, request, held.tokens))
            own.append(when)
        # Equal ones stay in the order of coming.
        ranked.sort(key=itemgetter(0, 1))
        self._ranks = [(nth, when) for nth, when, _, _ in ranked]
        self.order = [request for _, _, request, _ in ranked]
        self.sums = list(accumulate(tokens for _, _, _, tokens in ranked))
        """Tokens of each and of all before it."""
        self._places = {request: place for place, request in enumerate(self.order)}

    def before(self, request: str, tenant: str, when: _When) -> tuple[int, int]:
        """How many wait before a request, and their tokens; of one that is not here, if it came now."""
        place = self._places.get(request)
        if place is None:
            nth = bisect_right(self._of_tenant.get(tenant, []), when)
            place = bisect_right(self._ranks, (nth, when))
        return place, self.sums[place - 1] if place else 0


def _when(turns: int, since: int, tokens: int) -> _When:
    """By what those who wait are put in order: who goes on first, and then by time."""
    return not turns, since + tokens * _NS // TOKENS_A_SECOND


class Holding:
    """Who waits, by one fold and one overlay. Times are unix nanoseconds."""

    def __init__(self, state: FleetState, overlay: Overlay) -> None:
        self._state = state
        self._overlay = overlay
        self._lines: dict[str, Line] = {}
        self._made = -1
        self._of = state.queue

    def line(self, model: str) -> Line:
        """The queue of a model."""
        queue = self._state.queue
        if self._made != queue.changes or self._of is not queue:
            self._lines.clear()
            self._made, self._of = queue.changes, queue
        found = self._lines.get(model)
        if found is None:
            found = self._lines[model] = Line(queue, model)
        return found

    def live(self, roster: Roster, now: int) -> int:
        """Tokens of the contexts of conversations that go on at a model's nodes."""
        contexts = self._state.load.contexts
        live = int(roster.rows(roster.contexts).sum()) + self._overlay.begun_tokens
        idle = now - int(IDLE_SECONDS * _NS)
        for key, context in contexts.items():
            if context.time > idle:
                break
            if context.node in roster.position and contexts.heard(key) <= idle:
                live -= context.tokens
        return live

    def hold(
        self, roster: Roster, model: str, request: str, tokens: int, key: bytes | int | None, now: int, tenant: str = ""
    ) -> Hold | None:
        """Why a request waits; none when it need not. `key` is that of the conversation that it goes on with, if any."""
        state = self._state
        contexts = state.load.contexts
        if key is not None and contexts.heard(key) > now - int(IDLE_SECONDS * _NS):
            return None
        held = state.queue.get(request)
        if held is None and len(state.queue) >= HELD_LIMIT:
            return None
        left = bound(state) - (0.0 if held is None else (now - held.since) / _NS)
        if left <= 0:
            return None
        room = _room(roster)
        line = self.line(model)
        if not line.order and roster.rows(roster.contexts).sum() + self._overlay.begun_tokens + tokens <= room:
            return None
        turns = 0 if key is None else contexts[key].turns
        place, before = line.before(request, tenant, _when(turns, now, tokens))
        live = self.live(roster, now)
        if live + before + tokens <= room:
            return None
        rate = state.queue.rate(now)
        expected = min((before + tokens) / rate, left) if rate else left
        return Hold(place + 1, expected, live, before + tokens, room, turns)

    def ready(self, roster: Roster, model: str, now: int) -> list[str]:
        """Requests that wait and may go now."""
        line = self.line(model)
        if not line.order:
            return []
        free = _room(roster) - self.live(roster, now)
        found = []
        for request, needed in zip(line.order, line.sums, strict=True):
            if needed > free:
                break
            found.append(request)
        before = now - int(bound(self._state) * _NS)
        for request, held in self._state.queue.items():
            if held.since > before:
                break
            if held.model == model:
                found.append(request)
        return found


def _room(roster: Roster) -> int:
    return int(ROOM_SHARE * float(roster.room.sum()))
