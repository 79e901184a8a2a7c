"""A past decision made again, from the log alone, and compared with what was recorded of it.

A router's decision follows from the fold at the sequence that it had applied, from its overlay, and from the request and
the time, which are recorded. The overlay follows from what this router decided before and from the commits it read. So
`Past` goes along the log, puts the router's own decisions in between where they were made, and decides once more. What comes
out must be what was recorded; where it isn't, somebody's code is not what it was, or the router knew more than the log.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from kvplane.events.hashing import longest_match
from kvplane.events.types import RequestCompleted, RequestRouted
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import PREDICTION_SECONDS, Overlay
from kvplane.services.routing.policies import policy
from kvplane.services.routing.query import Query
from kvplane.services.routing.view import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvplane.events.codec import Message
    from kvplane.events.types import RequestHeld
    from kvplane.projections.fleet import FleetState
    from kvplane.services.protocol.errors import ServiceFault
    from kvplane.services.routing.holding import Hold
    from kvplane.services.routing.roster import Column

BEFORE_SECONDS = 2 * PREDICTION_SECONDS
"""How long before a decision the log is read again for the router's overlay. Of what is in it, only decisions that were not on
the log yet can be older."""
TOLERANCE = 1e-9
"""Relative difference up to which costs are the same: machines sum up floats in different orders."""


class Weight(Struct, kw_only=True):
    """One candidate as the decision saw it. Matches are blocks, `queue` is seconds, `speed` tokens per second."""

    node: str
    cost: float | None
    """In the policy's unit; none when the node may not be chosen: it is full, or the request excludes it."""
    terms: dict[str, float]
    """The parts of the cost, where the policy names them."""
    match: int
    match_on_log: int
    """Of the match, what the log had confirmed; the rest was predicted."""
    slow: int
    active: int
    on_the_way: int
    """Of the running requests, those that this router had sent and not yet read back."""
    queue: float
    speed: float
    session: bool


class Difference(Struct):
    """Something that came out otherwise than it was recorded."""

    what: str
    recorded: Any
    recomputed: Any


class Explanation(Struct, kw_only=True):
    """A decision made again."""

    node: str
    policy: str
    parameters: dict[str, float]
    candidates: list[Weight]
    """All of them, the chosen one first, then by cost."""
    differences: list[Difference]
    failure: str = ""
    """What the policy raised, when the least loaded node was taken instead."""


def query_of(event: RequestRouted, block_size: int) -> Query:
    """The request as the decision had it."""
    blocks = min(event.blocks, longest_match(event.tokens, block_size))
    return Query(
        event.request,
        event.model,
        event.hashes,
        event.tokens,
        blocks,
        block_size,
        event.session,
        frozenset(event.exclude),
        tenant=event.tenant,
        key=event.tenant,
    )


class Past:
    """A router at a moment of the past: a fold that goes along, and the overlay that the router had.

    `own` are the decisions and the ends of requests that this router recorded from the fold's sequence on, in its order, before
    the decision to be explained.
    """

    def __init__(
        self, state: FleetState, router: str, own: Sequence[RequestRouted | RequestCompleted], event: RequestRouted
    ) -> None:
        self.state = state
        self.overlay = Overlay()
        self.chooser = Chooser(state, self.overlay)
        self._router = router
        self._own = list(own)
        self._at = 0
        self.event = event

    def _count_in(self) -> None:
        """Count the decisions that were made at this sequence, and what had ended before each."""
        state = self.state
        while self._at < len(self._own):
            event = self._own[self._at]
            if isinstance(event, RequestCompleted):
                self._at += 1
                self.overlay.on_log(event.request)
                continue
            if event.applied > state.sequence:
                return
            self._at += 1
            now = event.decided * 1000
            self.overlay.expire(now)
            node = state.nodes.get(event.node)
            at = state.load.ordinal.get(event.node)
            if node is None or at is None:
                continue
            size = node.registered.block_size
            if event.session and self.chooser.session_node(query_of(event, size))[0] != event.node:
                self.overlay.sessions[event.model, event.session] = event.node
            begins = state.holding and self.chooser.begins(event)
            self.overlay.decided(event, at, size, now, predict="" if node.managed else node.model, begins=begins)

    def apply(self, message: Message) -> None:
        """Read the next commit, as the router did. Not to be called beyond the sequence that the decision had applied."""
        self._count_in()
        applied = self.state.apply(message)
        if applied.commit is not None:
            self.overlay.observe(applied.commit, message.time, self.state, self._router, message.time)

    def explain(self) -> Explanation:
        """Decide again and compare. Raises what the decision raises now."""
        self._count_in()
        event, chooser, state = self.event, self.chooser, self.state
        roster = chooser.roster(event.model)
        query = query_of(event, roster.block_size)
        now = event.decided * 1000
        self.overlay.expire(now)
        session, _ = chooser.session_node(query)
        view, costs, name = chooser.weigh(roster, query, session, now)
        logged, _ = Chooser(state, Overlay()).matches(roster, query)
        terms: Mapping[str, Column] = {}
        parameters = dict(state.parameters)
        if name == state.policy:
            known = policy(name)
            parameters = known.complete(state.parameters)
            if known.terms is not None:
                request = Request(query.id, query.tokens, query.blocks, query.block_size)
                terms = known.terms(view, request, parameters)
        on_the_way = np.zeros(len(roster.nodes))
        if self.overlay.pending:
            on_the_way = self.overlay.columns.active[roster.ordinals]
        queue, speed = view.queue, view.speed
        barred = (view.active >= roster.limits) | np.isin(roster.names, list(query.exclude))
        weights = [
            Weight(
                node=name_of, cost=None if barred[at] else float(costs[at]),
                terms={term: float(column[at]) for term, column in terms.items()},
                match=int(view.match[at]), match_on_log=int(logged[at]),
                slow=0 if view.slow is None else int(view.slow[at]), active=int(view.active[at]),
                on_the_way=int(on_the_way[at]), queue=float(queue[at]), speed=float(speed[at]), session=at == view.session,
            )
            for at, name_of in enumerate(roster.names)
        ]  # fmt: skip
        # The decision itself, by the router's own way through it.
        failures = chooser.policy_failures
        hold = chooser.hold(query, now)
        decision = chooser.decide(query, now)
        failure = chooser.last_failure if chooser.policy_failures > failures else ""
        again = decision.event(query, now, event.applied, state.nodes)
        first = {candidate.node: place for place, candidate in enumerate(again.candidates)}
        weights.sort(
            key=lambda weight: (
                first.get(weight.node, len(first)), math.inf if weight.cost is None else weight.cost, weight.node
            )
        )  # fmt: skip
        return Explanation(
            node=again.node, policy=again.policy, parameters=parameters, candidates=weights,
            differences=[*differences(event, again), *_held(hold)], failure=failure,
        )  # fmt: skip


def _held(hold: Hold | None) -> list[Difference]:
    """A request that was sent somewhere is not held when the decision is made again."""
    return [] if hold is None else [Difference("held", "no", hold.reason)]


class PastHold(Past):
    """A router at the moment at which it held a request for the first time."""

    def __init__(
        self, state: FleetState, router: str, own: Sequence[RequestRouted | RequestCompleted], held: RequestHeld
    ) -> None:
        super().__init__(state, router, own, RequestRouted(held.request, held.model, "", 0, 0, 0, applied=held.applied))
        self.held = held

    def differences(self) -> list[Difference]:
        """Decide again, and compare. Raises what the decision raises now."""
        self._count_in()
        held, chooser = self.held, self.chooser
        now = held.decided * 1000
        self.overlay.expire(now)
        size = chooser.roster(held.model).block_size
        query = Query(
            held.request, held.model, held.hashes, held.tokens, min(held.blocks, longest_match(held.tokens, size)), size,
            held.session, tenant=held.tenant,
        )  # fmt: skip
        hold = chooser.hold(query, now)
        if hold is None:
            return [Difference("held", held.reason, "no")]
        again = hold.event(query, now, held.applied, first=True)
        return [
            Difference(what, getattr(held, what), getattr(again, what))
            for what in ("reason", "place", "expected", "turns")
            if getattr(held, what) != getattr(again, what)
        ]


def differences(recorded: RequestRouted, again: RequestRouted) -> list[Difference]:
    """Where a decision that was made again is not the one that was recorded."""
    found = [
        Difference(what, getattr(recorded, what), getattr(again, what))
        for what in ("node", "policy", "match", "best")
        if getattr(recorded, what) != getattr(again, what)
    ]
    before = {candidate.node: candidate for candidate in recorded.candidates}
    made = {candidate.node: candidate for candidate in again.candidates}
    for node in dict.fromkeys([*before, *made]):
        one, other = before.get(node), made.get(node)
        if one is None or other is None:
            found.append(
                Difference(f"{node} among the best", "no" if one is None else "yes", "no" if other is None else "yes")
            )
            continue
        if one.match != other.match:
            found.append(Difference(f"match of {node}", one.match, other.match))
        if not math.isclose(one.cost, other.cost, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            found.append(Difference(f"cost of {node}", one.cost, other.cost))
    return found


def refused(error: ServiceFault) -> Difference:
    """The decision can't be made again at all."""
    return Difference("decision", "made", f"refused: {error}")
