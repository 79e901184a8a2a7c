"""A recorded fleet, run again from a moment on: its nodes with what they held, its requests in their own times.

`recorded_from` takes the nodes, their caches, sessions and live conversations out of a fold of the log. `run_recorded` gives
them to simulated engines, tells the same to a fold of its own, and sends the recorded requests through a policy. What ran at
that moment does not run here: engines begin idle, and what was routed of late is forgotten. All nodes own their caches, those
too whose evictions a coordinator decided, and only the tier `gpu` is simulated.

Nodes come and go when the log says so. One that was concluded lost for its silence failed as long before as that takes; a
node that is back, or registers again, begins with an empty cache; one that is removed finishes what it runs.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from kvplane.events import types
from kvplane.events.hashing import derive_hash, longest_match, pack_hashes, unpack_hashes
from kvplane.events.subjects import token
from kvplane.projections.load import PREFILL_LABEL, prefill_speed
from kvplane.projections.recency import Recency
from kvplane.services.control.liveness import LEAST_SECONDS, MISSED_HEARTBEATS
from kvplane.services.routing.policies import allow, check
from kvplane.services.routing.query import Query
from kvplane.services.simulation.compare import parse_choice
from kvplane.services.simulation.engine import Engine
from kvplane.services.simulation.hardware import Hardware
from kvplane.services.simulation.trace import Work
from kvplane.services.simulation.world import FLEET, Settings, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kvplane.events.types import NodeRegistered
    from kvplane.projections.contexts import Context
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.prefix import PrefixIndex
    from kvplane.services.simulation.world import Outcome

_NS = 1_000_000_000
_HARDWARE = Hardware()
_EVENTS = 4096
"""Assignments of sessions in one commit."""
_BLOCKS = 65536
"""Blocks in one event."""


class RecordedRequest(Work, frozen=True, kw_only=True):
    """One request as it was recorded. `arrival` is in seconds from the beginning; `exclude` are nodes it would not have."""

    request: str
    model: str
    exclude: tuple[str, ...] = ()


class RecordedNode(Struct, frozen=True, kw_only=True):
    """One node at the beginning. `blocks` are the packed hashes that it holds, least recently used first."""

    registered: types.NodeRegistered
    cordoned: bool = False
    lost: str | None = None
    """Why it is lost; none while it is not."""
    blocks: bytes = b""


class RecordedSession(NamedTuple):
    """A session and the node where it belongs."""

    model: str
    session: str
    node: str


class RecordedContext(NamedTuple):
    """What the next request of a live conversation is known by, and its last prompt."""

    key: bytes | int
    last: Context


class RecordedChange(Struct, frozen=True):
    """What the log says of a node, or of the policy, at a time in seconds from the beginning."""

    time: float
    event: types.NodeEvent | types.PolicyChanged


class Recorded(Struct, frozen=True, kw_only=True):
    """A span of a fleet's log, as far as it can be simulated."""

    start: int
    """Log time of the beginning, in unix nanoseconds."""
    policy: types.PolicyChanged
    nodes: tuple[RecordedNode, ...]
    sessions: tuple[RecordedSession, ...] = ()
    contexts: tuple[RecordedContext, ...] = ()
    """Live conversations, the one silent for longest first."""
    format: int = 1
    """Format of the log at the beginning."""
    speeds: dict[str, float] = {}
    """Tokens per second that each node prefills, as the log measured it; of others, what they say of themselves."""
    changes: tuple[RecordedChange, ...] = ()
    requests: tuple[RecordedRequest, ...]
    """Of several with one id the first is simulated: the others were sent again for a failure."""


def recorded_from(
    state: FleetState, requests: Sequence[RecordedRequest], changes: Iterable[RecordedChange] = (), *,
    used: Iterable[tuple[str, bytes]] = (), start: int | None = None,
) -> Recorded:  # fmt: skip
    """Take a beginning out of a fold; `start` is its log time (unix ns) when it isn't that of the fold's last commit.

    `used` are nodes and hashes of requests that were routed before, oldest first: the order in which nodes that own their
    caches used their blocks. For blocks that it does not name, the last use is taken to be when what is behind them came.
    """
    load = state.load
    orders = _orders(state, requests, used)
    changes = tuple(sorted(changes, key=lambda change: change.time))
    speeds: dict[str, float] = {}
    for node in state.nodes.values():
        at = load.ordinal.get(node.name)
        speed = prefill_speed(node.registered.labels)
        speeds[node.name] = (speed if at is None else load.pace[at]) * load.ratio
    for change in changes:
        if isinstance(change.event, types.NodeRegistered):
            speeds.setdefault(change.event.node, prefill_speed(change.event.labels) * load.ratio)
    asked = {(request.model, request.session) for request in requests if request.session}
    return Recorded(
        start=state.time if start is None else start,
        policy=types.PolicyChanged(state.policy, state.parameters),
        nodes=tuple(
            RecordedNode(
                registered=node.registered, cordoned=node.cordoned, lost=node.lost,
                blocks=pack_hashes(orders.get(node.name, ())),
            )
            for node in state.nodes.values()
        ),
        sessions=tuple(
            RecordedSession(*key, session.node)
            for key, session in state.sessions.items()
            if session.node and key in asked
        ),
        contexts=tuple(RecordedContext(key, context) for key, context in load.contexts.items()),
        format=state.format, speeds=speeds, changes=changes, requests=tuple(requests),
    )  # fmt: skip


def _orders(
    state: FleetState, requests: Sequence[RecordedRequest], used: Iterable[tuple[str, bytes]]
) -> dict[str, Iterable[int]]:
    """Blocks of every node, least recently used first, and of one chain the deepest first."""
    orders = {name: recency.order for name, recency in state.recency.items()}
    owning: dict[str, Recency] = {}
    reported = [node for node in state.nodes.values() if not node.managed and node.lost is None]
    for model in dict.fromkeys(node.model for node in reported):
        index = state.caches.index(model)
        slots = {node.name: node.slots["gpu"] for node in reported if node.model == model}
        last = _last_uses(index, (request.hashes for request in requests))
        for name, slot in slots.items():
            recency = owning[name] = Recency()
            recency.order.update(dict.fromkeys(sorted(index.held(slot), key=lambda block: (last[block], block))))
    running = ((active.node, active.hashes) for active in state.load.running.values())
    for uses in (used, running):
        for name, hashes in uses:
            if name in owning:
                owning[name].use(hashes)
    return {**orders, **{name: recency.order for name, recency in owning.items()}}


def _last_uses(index: PrefixIndex, chains: Iterable[bytes]) -> dict[int, tuple[int, int]]:
    """Estimate of the last use of each block, as what to sort by: when the last that is known behind it came, and its depth."""
    last: dict[int, tuple[int, int]] = {}
    for came, segment in enumerate(index.segments()):
        for depth, block in enumerate(unpack_hashes(segment.packed)):
            last[block] = came, -depth
    for packed in chains:
        latest = 0
        hashes = unpack_hashes(packed)
        for depth in range(len(hashes) - 1, -1, -1):
            known = last.get(hashes[depth])
            if known is not None:
                latest = max(latest, known[0])
                last[hashes[depth]] = latest, -depth
    return last


class RecordedWorld(World):
    """One run of a recorded fleet. `paces` are how many times slower than its speed says a node's engine is."""

    def __init__(self, recorded: Recorded, settings: Settings, paces: Mapping[str, float], *, follow: bool) -> None:
        self.start = recorded.start / _NS
        self._recorded = recorded
        self._paces = paces
        self._follow = follow
        """Whether the policy changes when it did."""
        self._registered: dict[str, NodeRegistered] = {}
        self._sizes: dict[str, int] = {}
        """Block size of each model."""
        once: dict[str, RecordedRequest] = {}
        for request in sorted(recorded.requests, key=lambda request: request.arrival):
            once.setdefault(request.request, request)
        self._requests = list(once.values())
        super().__init__(settings, self._requests)

    def _begin(self) -> None:
        self.ready = 0.0
        recorded = self._recorded
        if recorded.format > 1:
            self._apply(0.0, f"kv.{FLEET}.control", [types.FormatRaised(recorded.format)])
        self._apply(0.0, f"kv.{FLEET}.control", [types.PolicyChanged(self.settings.policy, self.settings.parameters)])
        for node in recorded.nodes:
            self._begin_node(node)
        load = self.state.load
        load.contexts.adopt((each for each in recorded.contexts if each.last.node in load.ordinal), load.ordinal)
        assigned: dict[str, list[types.SessionAssigned]] = {}
        for model, session, name in recorded.sessions:
            assigned.setdefault(model, []).append(types.SessionAssigned(session, model, name))
        for model, events in assigned.items():
            for at in range(0, len(events), _EVENTS):
                self._apply(0.0, f"kv.{FLEET}.session.{token(model)}", events[at : at + _EVENTS])
        self._changes = list(self._planned())

    def _begin_node(self, node: RecordedNode) -> None:
        name = node.registered.node
        where = token(name)
        engine = self._register(node.registered)
        self._apply(0.0, f"kv.{FLEET}.node.{where}", [self._registered[name]])
        if node.cordoned:
            self._apply(0.0, f"kv.{FLEET}.node.{where}", [types.NodeCordoned(name)])
        if node.lost is not None:
            self._apply(0.0, f"kv.{FLEET}.node.{where}", [types.NodeLost(name, node.lost)])
            return
        self._add(name, engine)
        engine.cache.fill(unpack_hashes(node.blocks))
        # The other way round most runs go from parents to children, as the index likes them.
        held = pack_hashes(reversed(engine.cache.blocks))
        for at in range(0, len(held), _BLOCKS * 8):
            self._batch += 1
            piece = held[at : at + _BLOCKS * 8]
            stored = types.BlocksStored(name, self._epochs[name], self._batch, piece)
            self._apply(0.0, f"kv.{FLEET}.cache.{where}", [stored])

    def _register(self, registered: NodeRegistered) -> Engine:
        """A node as it is simulated, and its engine."""
        name = registered.node
        speed = min(max(self._recorded.speeds.get(name) or prefill_speed(registered.labels), 1.0), 1e9)
        self._registered[name] = replace(registered, cache_mode="reported", labels={PREFILL_LABEL: str(speed)})
        self._sizes.update(dict.fromkeys(registered.models, registered.block_size))
        return self._engine(name)

    def _engine(self, name: str) -> Engine:
        registered = self._registered[name]
        hardware = self.settings.hardware
        pace = hardware.prefill_speed / prefill_speed(registered.labels) * self._paces.get(name, 1.0)
        return Engine(hardware, registered.capacity_blocks["gpu"], registered.block_size, pace=pace)

    def _planned(self) -> Iterator[tuple[float, Callable[[], None]]]:
        promises = {node.registered.node: (0.0, node.registered.pulse_seconds) for node in self._recorded.nodes}
        for change in sorted(self._recorded.changes, key=lambda change: change.time):
            time, event = change.time, change.event
            if isinstance(event, types.PolicyChanged):
                if self._follow:
                    yield time, partial(self._put, time, "control", event)
                continue
            since, promise = promises.get(event.node, (0.0, 0.0))
            if isinstance(event, types.NodeRegistered):
                promises[event.node] = time, event.pulse_seconds
            elif isinstance(event, types.NodeLost) and promise:
                failed = max(since, time - max(LEAST_SECONDS, MISSED_HEARTBEATS * promise))
                yield failed, partial(self._fail, event.node, failed)
            yield time, partial(self._happen, event, time)

    def _fail(self, name: str, now: float) -> None:
        self._retry(self._stop(name), now, frozenset([name]))

    def _happen(self, event: types.NodeEvent, now: float) -> None:
        """A node changes, and the log says so."""
        name = event.node
        where = f"node.{token(name)}"
        match event:
            case types.NodeRegistered():
                running = self._stop(name)
                self._add(name, self._register(event))
                self._put(now, where, self._registered[name])
                self._retry(running, now)
            case types.NodeLost():
                self._put(now, where, event)
                self._fail(name, now)
            case types.NodeRecovered():
                if name not in self._alive and name in self._registered:
                    self._add(name, self._engine(name))
                self._put(now, where, event)
            case types.NodeRemoved():
                self._alive.pop(name, None)
                self._registered.pop(name, None)
                self._put(now, where, event)
            case _:
                self._put(now, where, event)

    def _arrive(self, number: int, request: Work, now: float) -> None:
        asked = self._requests[number]
        size = self._sizes.get(asked.model, 1)
        # Not every writer is a router: full blocks alone can be cached.
        hashes = request.hashes[: request.tokens // size * 8]
        blocks = min(len(hashes) >> 3, longest_match(request.tokens, size))
        query = Query(
            asked.request, asked.model, hashes, request.tokens, blocks, size, request.session, frozenset(asked.exclude)
        )
        desk = self._desks[derive_hash(f"{self.settings.seed}.{query.id} router".encode()) % len(self._desks)]
        self._route(query, desk, unpack_hashes(hashes), request.output_tokens, now, now)


def run_recorded(
    recorded: Recorded, policy: str | None = None, parameters: Mapping[str, float] = MappingProxyType({}), *,
    delay: float = 0.002, routers: int = 1, seed: int = 0, hardware: Hardware = _HARDWARE,
    paces: Mapping[str, float] = MappingProxyType({}), modules: Iterable[str] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Send the recorded requests through a policy. Raises `BadRequest` when there is no such policy.

    Without a policy, the recorded one is used and changes when it did. A policy that is given as `module:attr` is
    imported; one that the log names only from `modules`. `seed` decides which router gets which request. Node names, also
    of nodes that lived twice, are in `Outcome.names`; requests that are not in `Outcome.served` were rejected.
    """
    allow(modules)
    chosen = recorded.policy
    if policy is not None:
        parse_choice(policy)
        check(policy, parameters)
        chosen = types.PolicyChanged(policy, dict(parameters))
    settings = Settings(
        nodes=len(recorded.nodes), policy=chosen.policy, parameters=chosen.parameters, seed=seed, delay=delay,
        routers=routers, hardware=hardware,
    )  # fmt: skip
    return RecordedWorld(recorded, settings, paces, follow=policy is None).run(progress)
