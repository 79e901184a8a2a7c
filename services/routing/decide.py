"""The routing decision: which node a request goes to, and why.

`Chooser.decide` is pure: the same state, overlay, request and time give the same decision. Ties of cost are broken by a
hash of request and node. Only nodes that are available, serve the model and may run one more request are candidates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvplane.events.hashing import derive_hash
from kvplane.events.types import Candidate, RequestRouted, SessionAssigned
from kvplane.projections.contexts import session_key
from kvplane.services.protocol.errors import NoNode, Overloaded
from kvplane.services.routing.holding import Holding
from kvplane.services.routing.policies import policy
from kvplane.services.routing.query import HASHES_RECORDED, Query
from kvplane.services.routing.roster import Roster
from kvplane.services.routing.view import Request, View

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from numpy.typing import NDArray

    from kvplane.projections.contexts import Context
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.nodes import Node
    from kvplane.services.routing.holding import Hold
    from kvplane.services.routing.overlay import Overlay
    from kvplane.services.routing.policies import Policy
    from kvplane.services.routing.roster import Column

SORTED_NODES = 64
"""Up to so many candidates are simply sorted."""
ROSTERS_LIMIT = 1_000
"""Most models whose candidates are remembered; beyond it they are made anew."""
FALLBACKS = 3
"""How many further nodes a decision names, next best first."""


class Decision(NamedTuple):
    """Where a request goes. `session` is `kept`, `moved`, `new`, or empty when the request has none."""

    node: Node
    kind: str
    match: int
    session: str
    moved_from: str
    policy: str
    cost: float
    candidates: list[Candidate]
    best: int
    """Longest match of all nodes that could have been chosen."""

    @property
    def fallbacks(self) -> list[str]:
        """Nodes to try when the chosen one does not answer, next best first."""
        return [candidate.node for candidate in self.candidates[1:]]

    def event(self, query: Query, now: int, applied: int, known: Container[str]) -> RequestRouted:
        """A decision for the log, made at this time and sequence, when these nodes were known."""
        blocks = len(query.hashes) >> 3
        hashes = query.hashes if query.recorded and blocks <= HASHES_RECORDED else b""
        return RequestRouted(
            request=query.id, model=query.model, node=self.node.name, match=self.match, blocks=blocks,
            tokens=query.tokens, hashes=hashes, session=query.session,
            policy=self.policy, applied=applied, candidates=self.candidates, best=self.best, decided=now // 1000,
            exclude=sorted(name for name in query.exclude if name in known) if query.exclude else [], trace=query.traceparent,
            tenant=query.key, origin=query.origin, leg=query.leg,
        )  # fmt: skip


def _column(lengths: list[int]) -> NDArray[np.float64]:
    # Packed, it is made in a third of the time.
    return np.frombuffer(_packer(len(lengths))(*lengths))


def _finite(costs: Column) -> bool:
    # What is not a number counts as both the least and the most.
    return math.isfinite(costs.item(costs.argmin())) and math.isfinite(costs.item(costs.argmax()))


@lru_cache(maxsize=16)
def _packer(count: int) -> Callable[..., bytes]:
    return Struct(f"{count}d").pack


class Chooser:
    """Makes decisions on one fold and one overlay."""

    def __init__(self, state: FleetState, overlay: Overlay) -> None:
        self._state = state
        self._overlay = overlay
        self.holding = Holding(state, overlay)
        self._rosters: dict[str, Roster] = {}
        self._policy: Policy | None = None
        self._parameters: dict[str, float] = {}
        self._made = ("", -1)
        """Policy and changes of the fold for which these were made."""
        self.policy_failures = 0
        """Decisions for which the policy failed and the least loaded node was taken."""
        self.last_failure = ""
        """What the policy's last failure was."""

    def roster(self, model: str) -> Roster:
        """Candidates for a model. Raises `UnknownModel`."""
        state = self._state
        roster = self._rosters.get(model)
        if roster is None or roster.made != (state.changes, state.caches.slots_made):
            self._rosters.pop(model, None)
            if len(self._rosters) >= ROSTERS_LIMIT:
                self._rosters.clear()
            roster = self._rosters[model] = Roster(state, model)
        return roster

    def decide(self, query: Query, now: int) -> Decision:
        """Choose a node. Raises `UnknownModel`, `NoNode` or `Overloaded`."""
        roster = self.roster(query.model)
        self._overlay.expire(now)
        if not roster.nodes:
            raise roster.nobody(query.model)
        session, former = self.session_node(query)
        view, costs, name = self.weigh(roster, query, session, now)
        if roster.limited or query.exclude:
            costs = self._barred(roster, query, view, costs)
        ranked = self._rank(costs)
        order = ranked[: FALLBACKS + 1].tolist()
        # One by one: of so few, numpy's indexing by arrays takes longer.
        values = [costs.item(at) for at in order]
        best = values[0]
        if best == math.inf:
            self._refuse(roster, query)
        if len(values) > 1 and values[1] == best:
            ties = (costs == best).nonzero()[0]
            chosen = int(ties[derive_hash(query.id.encode()) % len(ties)])
            order = [chosen, *(at for at in order if at != chosen)][: len(order)]
        candidates = [
            Candidate(roster.names[at], int(view.match.item(at)), cost)
            for at, cost in zip(order, values, strict=True)
            if cost != math.inf
        ]
        node, found = roster.nodes[order[0]], candidates[0].match
        longest = found
        if found < query.blocks:
            longest = int(view.match.item(view.match.argmax()))
            if longest > found and (roster.limited or query.exclude):
                longest = int(view.match[costs != math.inf].max())
        kind = "miss" if not found else "exact" if found >= query.blocks else "prefix"
        outcome = ""
        if query.session:
            outcome = "kept" if session == node.name else "moved" if session or former else "new"
        return Decision(node, kind, found, outcome, session or former, name, best, candidates, longest)

    def weigh(self, roster: Roster, query: Query, session: str, now: int) -> tuple[View, Column, str]:
        """What the policy sees of the candidates, what it makes each of them cost, and its name."""
        match, slow = self.matches(roster, query)
        at = roster.position.get(session, -1) if session else -1
        view = View(
            roster, self._state, self._overlay, match, slow, at, now, self._context(query, match),
            named=bool(query.session),
        )  # fmt: skip
        costs, name = self._costs(view, Request(query.id, query.tokens, query.blocks, query.block_size))
        return view, costs, name

    def hold(self, query: Query, now: int) -> Hold | None:
        """Why a request has to wait; none when it need not. Raises `UnknownModel`."""
        state = self._state
        if not state.holding or query.id in state.load.running:
            return None
        roster = self.roster(query.model)
        if not roster.nodes:
            return None
        contexts = state.load.contexts
        key: bytes | int | None = session_key(query.model, query.session)
        if key not in contexts:
            key = self._conversation(query, self.matches(roster, query)[0])
        return self.holding.hold(roster, query.model, query.id, query.tokens, key, now, query.tenant)

    def ready(self, model: str, now: int) -> list[str]:
        """Requests of a model that wait and may go now. Raises `UnknownModel`."""
        return self.holding.ready(self.roster(model), model, now) if self._state.queue else []

    def _context(self, query: Query, match: Column) -> Context | None:
        """The context of the conversation that a request goes on with."""
        contexts = self._state.load.contexts
        if not contexts:
            return None
        key = self._conversation(query, match)
        return None if key is None else contexts[key]

    def _conversation(self, query: Query, match: Column) -> bytes | int | None:
        """The key of the conversation that a request goes on with, if one is known."""
        known = int(match.item(match.argmax())) if len(match) else 0
        return self._state.load.contexts.key(query.model, query.session, query.hashes, known)

    def count_in(
        self, query: Query, decision: Decision, now: int, applied: int
    ) -> tuple[RequestRouted, SessionAssigned | None]:
        """Count a decision that was made at sequence `applied` in the overlay; returns what has to go to the log."""
        node = decision.node.name
        routed = decision.event(query, now, applied, self._state.nodes)
        at = self._state.load.ordinal.get(node)
        if at is not None:
            # Otherwise the node was lost since the decision; the fold will ignore the event.
            predict = "" if decision.node.managed else decision.node.model
            self._overlay.decided(
                routed, at, query.block_size, now, predict=predict, begins=self._state.holding and self.begins(routed)
            )
        if decision.session not in {"new", "moved"}:
            return routed, None
        self._overlay.sessions[query.model, query.session] = node
        reason = f"from {decision.moved_from}" if decision.session == "moved" else "new"
        return routed, SessionAssigned(session=query.session, model=query.model, node=node, reason=reason)

    def begins(self, event: RequestRouted) -> bool:
        """Whether a request that is sent somewhere goes on with no conversation that is known."""
        contexts = self._state.load.contexts
        return contexts.key(event.model, event.session, event.hashes, max(event.best, event.match)) is None

    @staticmethod
    def _barred(roster: Roster, query: Query, view: View, costs: Column) -> Column:
        """Costs, infinite for candidates that must not be chosen."""
        costs = costs.copy()
        if roster.limited:
            costs[view.active >= roster.limits] = math.inf
        for excluded in query.exclude:
            if excluded in roster.position:
                costs[roster.position[excluded]] = math.inf
        return costs

    @staticmethod
    def _rank(costs: Column) -> NDArray[np.intp]:
        """Candidates by cost."""
        if len(costs) > SORTED_NODES:
            # Only the first few are needed. Selected by value, not by argpartition: its order differs between machines.
            few = (costs <= np.partition(costs, FALLBACKS)[FALLBACKS]).nonzero()[0]
            first: NDArray[np.intp] = few[costs[few].argsort(kind="stable")]
            return first
        return costs.argsort(kind="stable")

    def _costs(self, view: View, request: Request) -> tuple[Column, str]:
        state = self._state
        name = state.policy
        try:
            if self._policy is None or self._made != (name, state.changes):
                self._policy = policy(name)
                self._parameters = self._policy.complete(state.parameters)
                self._made = (name, state.changes)
            costs = np.asarray(self._policy.score(view, request, dict(self._parameters)), dtype=np.float64)
            if costs.shape != view.active.shape or not _finite(costs):
                raise ValueError("one finite cost a candidate is needed")  # noqa: TRY301
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a policy may be anybody's code; routing goes on
            self.policy_failures += 1
            self.last_failure = f"{type(error).__name__}: {error}"[:200]
            return view.active, "least_loaded"
        return costs, name

    @staticmethod
    def _refuse(roster: Roster, query: Query) -> None:
        if query.exclude and all(name in query.exclude for name in roster.names):
            raise NoNode(f"every available node of model {query.model[:80]!r} is excluded by the request")
        raise Overloaded(
            f"every node of model {query.model[:80]!r} runs as many requests as it may (max_active); try again later, "
            "or add nodes"
        )

    def session_node(self, query: Query) -> tuple[str, str]:
        """Node of the request's session, and the node that it had before when that is gone."""
        if not query.session:
            return "", ""
        own = self._overlay.sessions.get((query.model, query.session))
        if own is not None:
            return own, ""
        known = self._state.sessions.get(query.model, query.session)
        if known is None:
            return "", ""
        return known.node, known.was

    def matches(self, roster: Roster, query: Query) -> tuple[Column, Column | None]:
        """Match of every candidate, predicted blocks included, and the part of it that lies in slower tiers."""
        hashes, blocks = query.hashes, query.blocks
        if not blocks:
            return np.zeros(len(roster.nodes)), None
        if roster.aligned:
            model, index, _, _ = roster.indexes[0]
            lengths = index.match(hashes, blocks)
            self._overlay.lift(model, hashes, blocks, lengths)
            return _column(lengths), None
        match = np.zeros(len(roster.nodes))
        slow: Column | None = None
        for _, index, having, slots in roster.indexes:
            match[having] = _column(index.match(hashes, blocks))[slots]
        if roster.hybrid:
            self._through_groups(roster, query, match)
        if roster.tiered:
            slow = np.zeros(len(roster.nodes))
            for position in roster.tiered:
                match[position], slow[position] = self._through_tiers(
                    roster.nodes[position], query, int(match[position])
                )
        for cache_model, _, having, _ in roster.indexes:
            lengths = [0] * len(self._state.load.active)
            if not self._overlay.lift(cache_model, hashes, blocks, lengths):
                continue
            soon = _column(lengths)[roster.ordinals[having]]
            if roster.hybrid:
                # What a hybrid model keeps of a prompt is known when it is told.
                soon[np.isin(having, roster.hybrid)] = 0
            if slow is not None:
                slow[having] *= soon <= match[having]
            match[having] = np.maximum(match[having], soon)
        return match, slow

    def _through_groups(self, roster: Roster, query: Query, match: Column) -> None:
        """Leave of the matches of nodes with further KV cache groups what all of these can serve."""
        for _, _, having, _ in roster.indexes:
            places = [at for at in having.tolist() if roster.nodes[at].groups is not None]
            nodes = [roster.nodes[at] for at in places]
            lengths = [int(match[at]) for at in places]
            match[places] = self._state.caches.groups.limit(nodes, lengths, query.hashes)

    def _through_tiers(self, node: Node, query: Query, match: int) -> tuple[int, int]:
        """Match of a node whose blocks lie in several tiers, going from tier to tier; and how many are not on `gpu`."""
        index = self._state.caches.index(node.model)
        below = 0
        moved = True
        while moved and match < query.blocks:
            moved = False
            for tier, slot in node.slots.items():
                step = index.extent(slot, query.hashes, match, query.blocks)
                if step:
                    match += step
                    below += step if tier != "gpu" else 0
                    moved = True
        return match, below
