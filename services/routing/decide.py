"""The routing decision: which node a request goes to, and why.

`Chooser.decide` is pure: the same state, overlay, request and time give the same decision. Ties of cost are broken by a
hash of request and node. Only nodes that are available, serve the model and have room for one more request are candidates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from events.hashing import derive_hash
from events.types import Candidate
from services.errors import NoNode, Overloaded, UnknownModel
from services.routing.policies import Request, View, policy

if TYPE_CHECKING:
    from projections.fleet import FleetState
    from projections.nodes import Node
    from projections.prefix import PrefixIndex
    from services.routing.overlay import Overlay
    from services.routing.policies import Column, Score

FALLBACKS = 3
"""How many further nodes a decision names, next best first."""


MASKS_KNOWN = 4096


class Query(NamedTuple):
    """A request as the decision needs it. `hashes` are packed; `blocks` bounds the match."""

    id: str
    model: str
    hashes: bytes
    tokens: int
    blocks: int
    block_size: int
    session: str = ""
    exclude: frozenset[str] = frozenset()


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

    @property
    def fallbacks(self) -> list[str]:
        """Nodes to try when the chosen one does not answer, next best first."""
        return [candidate.node for candidate in self.candidates[1:]]


class SlotMap:
    """Candidates of a mask of slots. Remembered, since the same few sets of holders come again and again."""

    def __init__(self, index: PrefixIndex, candidates: list[int]) -> None:
        self._index = index
        self._candidates = candidates
        self._known: dict[int, list[int]] = {}

    def of(self, mask: int) -> list[int]:
        """Candidates whose fastest tier is a slot of the mask."""
        found = self._known.get(mask)
        if found is None:
            found = [c for slot in self._index.slots(mask) if (c := self._candidates[slot]) >= 0]
            if len(self._known) >= MASKS_KNOWN:
                self._known.clear()
            self._known[mask] = found
        return found


class Roster:
    """The candidates for a model as columns. Made anew when nodes change, not for each request."""

    def __init__(self, state: FleetState, model: str) -> None:
        serving = [node for node in state.nodes.values() if model in node.registered.models]
        if not serving:
            raise UnknownModel(
                f"no node serves model {model[:80]!r}; `kvplane node list` shows which models are served"
            )
        self.made = (state.changes, state.caches.slots_made)
        self.nodes = [node for node in serving if node.available]
        self.serving = len(serving)
        self.names = [node.name for node in self.nodes]
        self.ordinals = np.array([state.load.ordinal[node.name] for node in self.nodes], dtype=np.intp)
        self.speed = np.array(state.load.speed)[self.ordinals]
        self.position = {node.name: position for position, node in enumerate(self.nodes)}
        self.limits = np.array([node.registered.max_active or math.inf for node in self.nodes])
        self.limited = bool(np.isfinite(self.limits).any())
        self.tiered = [position for position, node in enumerate(self.nodes) if len(node.slots) > 1]
        self.block_size = serving[0].registered.block_size
        self.indexes: list[tuple[PrefixIndex, SlotMap]] = []
        self.cache_models = list(dict.fromkeys(node.model for node in serving))
        for cache_model in self.cache_models:
            owners = state.caches.owners(cache_model)
            candidates = [-1] * len(owners)
            for position, node in enumerate(self.nodes):
                if node.model == cache_model and "gpu" in node.slots:
                    candidates[node.slots["gpu"]] = position
            index = state.caches.index(cache_model)
            self.indexes.append((index, SlotMap(index, candidates)))


class Chooser:
    """Makes decisions on one fold and one overlay."""

    def __init__(self, state: FleetState, overlay: Overlay) -> None:
        self._state = state
        self._overlay = overlay
        self._rosters: dict[str, Roster] = {}
        self._policy: tuple[str, Score] | None = None
        self.policy_failures = 0
        """Decisions for which the policy failed and the least loaded node was taken."""

    def roster(self, model: str) -> Roster:
        """Candidates for a model. Raises `UnknownModel`."""
        state = self._state
        roster = self._rosters.get(model)
        if roster is None or roster.made != (state.changes, state.caches.slots_made):
            self._rosters.pop(model, None)
            roster = self._rosters[model] = Roster(state, model)
        return roster

    def decide(self, query: Query, now: int) -> Decision:
        """Choose a node. Raises `UnknownModel`, `NoNode` or `Overloaded`."""
        roster = self.roster(query.model)
        if not roster.nodes:
            raise NoNode(
                f"none of the {roster.serving} nodes of model {query.model[:80]!r} is available (lost or cordoned); "
                "`kvplane node list` shows why"
            )
        session, former = self._session(query)
        view = self._view(roster, query, session, now)
        costs, name = self._costs(view, Request(query.id, query.tokens, query.blocks, query.block_size))
        if roster.limited:
            costs[view.active >= roster.limits] = math.inf
        for excluded in query.exclude:
            if excluded in roster.position:
                costs[roster.position[excluded]] = math.inf
        ranked = costs.argsort(kind="stable")[: FALLBACKS + 1]
        order, values = ranked.tolist(), costs[ranked].tolist()
        best = values[0]
        if best == math.inf:
            self._refuse(roster, query)
        if len(values) > 1 and values[1] == best:
            ties = np.flatnonzero(costs == best)
            chosen = int(ties[derive_hash(query.id.encode()) % len(ties)])
            order = [chosen, *(at for at in order if at != chosen)][: len(order)]
        candidates = [
            Candidate(roster.names[at], match, cost)
            for at, match, cost in zip(order, view.match[order].tolist(), values, strict=True)
            if cost != math.inf
        ]
        node, found = roster.nodes[order[0]], candidates[0].match
        kind = "miss" if not found else "exact" if found >= query.blocks else "prefix"
        outcome = ""
        if query.session:
            outcome = "kept" if session == node.name else "moved" if session or former else "new"
        return Decision(node, kind, found, outcome, session or former, name, best, candidates)

    def _view(self, roster: Roster, query: Query, session: str, now: int) -> View:
        load, overlay, position_of = self._state.load, self._overlay, roster.position
        match, slow = self._matches(roster, query)
        # Columns of the fold are read in place; picking the candidates makes copies.
        active = np.frombuffer(load.active, np.int64)[roster.ordinals]
        queue = np.maximum(np.frombuffer(load.prefill_done, np.int64)[roster.ordinals] - now, 0) * 1e-9
        if overlay.extra:
            extra = [(position_of[n], e.active, e.tokens) for n, e in overlay.extra.items() if n in position_of]
            if extra:
                positions, requests, tokens = np.array(extra).T
                active[positions] += requests
                queue[positions] += tokens / roster.speed[positions]
        return View(roster.names, match, slow, active, queue, roster.speed, position_of.get(session, -1))

    def _costs(self, view: View, request: Request) -> tuple[Column, str]:
        state = self._state
        name = state.policy
        try:
            if self._policy is None or self._policy[0] != name:
                self._policy = (name, policy(name))
            costs = np.array(self._policy[1](view, request, state.parameters), dtype=np.float64)
            if costs.shape != (len(view.names),) or np.isnan(costs).any():
                raise ValueError("a cost a candidate is needed, and none may be NaN")  # noqa: TRY301
        except Exception:  # noqa: BLE001 - a policy may be anybody's code; routing goes on
            self.policy_failures += 1
            return view.active.astype(np.float64), "least_loaded"
        return costs, name

    @staticmethod
    def _refuse(roster: Roster, query: Query) -> None:
        if query.exclude and all(name in query.exclude for name in roster.names):
            raise NoNode(f"every available node of model {query.model[:80]!r} is excluded by the request")
        raise Overloaded(
            f"every node of model {query.model[:80]!r} runs as many requests as it may (max_active); try again later, "
            "or add nodes"
        )

    def _session(self, query: Query) -> tuple[str, str]:
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

    def _matches(self, roster: Roster, query: Query) -> tuple[Column, Column | None]:
        """Match of every candidate, and the part of it that lies in slower tiers."""
        match = [0] * len(roster.nodes)
        slow: dict[int, int] = {}
        hashes, blocks = query.hashes, query.blocks
        if not blocks:
            return np.array(match), None
        for index, slot_map in roster.indexes:
            for length, mask in index.match(hashes, blocks).items():
                for position in slot_map.of(mask):
                    match[position] = length
        for position in roster.tiered:
            total, below = self._through_tiers(roster.nodes[position], query, match[position])
            match[position] = total
            if below:
                slow[position] = below
        for model in roster.cache_models:
            for predictions in self._overlay.predictions(model):
                for length, mask in predictions.index.match(hashes, blocks).items():
                    for slot in predictions.index.slots(mask):
                        position = roster.position.get(predictions.nodes[slot], -1)
                        if position >= 0 and match[position] < length:
                            match[position] = length
                            slow.pop(position, None)
        return np.array(match), np.array([slow.get(at, 0) for at in range(len(match))]) if slow else None

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
