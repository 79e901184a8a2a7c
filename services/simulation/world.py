"""The loop that joins simulated nodes, the log and routers, in virtual time.

Nothing here decides: requests go through the fold, the overlay and the policies that a router uses, and what nodes and
routers say travels as encoded commits. A commit is visible to routers `delay` seconds after it was made. All routers
see one log, so one fold serves them; each has an overlay of its own and is asked for its share of the requests.

A node that fails takes its requests with it; their clients ask again at once, as they do when a connection breaks. The
log says that the node is lost `detection` seconds later; until then a router may still name it, and the client excludes
it and asks again.
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from kvplane.events import types
from kvplane.events.codec import WRITER, Message, encode
from kvplane.events.hashing import derive_hash, longest_match, pack_hashes, unpack_hashes
from kvplane.events.subjects import token
from kvplane.events.versions import FORMAT
from kvplane.projections.fleet import FleetState
from kvplane.projections.load import PREFILL_LABEL
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.routing.holding import SAY_SECONDS, release_reason
from kvplane.services.routing.query import Query
from kvplane.services.simulation.arrivals import Arrivals
from kvplane.services.simulation.desk import Router
from kvplane.services.simulation.engine import Engine, Job
from kvplane.services.simulation.hardware import Hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvplane.services.simulation.desk import Desk
    from kvplane.services.simulation.trace import Work

LOOK_SECONDS = 0.5
"""How often routers look whether a request that they hold may go."""
FLEET = "sim"
MODEL = "sim"
START = 1_000_000
"""Virtual time of the first moment, in unix seconds: before it nothing has happened."""
_NS = 1_000_000_000


class Change(Struct, frozen=True):
    """A node fails or joins at a time, in seconds from the beginning."""

    time: float
    node: str
    joins: bool


class Settings(Struct, frozen=True, kw_only=True):
    """One simulated fleet."""

    nodes: int = 8
    capacity: int = 10_000
    """Blocks that each node can hold."""
    block_size: int = 512
    policy: str = "ttft"
    parameters: dict[str, float] = {}
    speedup: float = 1.0
    """How many times closer than recorded requests arrive; in a closed loop, sessions begin."""
    seed: int = 0
    """Decides ties, and which router gets which request."""
    delay: float = 0.002
    """Seconds until what is committed is seen by routers."""
    routers: int = 1
    most_active: int = 0
    """Most requests at once on a node; 0 is no limit."""
    changes: tuple[Change, ...] = ()
    detection: float = 3.0
    """Seconds until a failed node is concluded to be lost."""
    hardware: Hardware = Hardware()


class _Waiting(Struct):
    """A request that its router holds, since when, and when that was last said on the log. Times in seconds."""

    query: Query
    desk: Desk
    hashes: tuple[int, ...]
    output: int
    arrival: float
    since: float
    said: float = -math.inf


class Served(Struct, gc=False):
    """One request as it went: node (its place in `Outcome.names`), times in seconds, lengths and hits in tokens, its id."""

    node: int
    arrival: float
    first: float
    end: float
    tokens: int
    cached: int
    predicted: int
    """Tokens that the router expected to be cached."""
    request: str
    session: str = ""
    recomputed: int = 0
    """Tokens that were computed before on any node, and are computed again: they were evicted, or lie elsewhere."""


class Outcome(Struct):
    """What a simulated fleet did. `names` are its nodes, `busy` their seconds of prefill."""

    settings: Settings
    names: list[str]
    served: list[Served]
    rejected: int
    retried: int
    busy: list[float]
    policy_failures: int
    failure: str
    """What the policy's last failure was."""
    decisions: int = 0
    """How often the policy was asked."""
    held_twice: int = 0
    """Tokens that lie in the caches at the end beside an equal one on another node."""
    waited: list[float] = []
    """How long each request was held that was, in seconds."""


class World:
    """One run."""

    start: float = START
    """Unix time of the beginning, in seconds."""

    def __init__(
        self, settings: Settings, work: Sequence[Work], desk: Callable[[FleetState, str], Desk] = Router
    ) -> None:
        self.settings = settings
        self.ready = settings.delay
        """When requests may come, in seconds from the beginning: routers see the nodes by then."""
        self.state = FleetState(FLEET)
        self._work = sorted(work, key=lambda request: request.arrival)
        self._names: list[str] = []
        self._engines: list[Engine] = []
        self._alive: dict[str, int] = {}
        self._epochs: dict[str, int] = {}
        """Sequence of each node's last registration that is visible."""
        self._due: list[tuple[float, int]] = []
        """Ends of steps, with the engine's number; stale when the engine's own `ends` differs."""
        self._log: deque[tuple[float, str, types.Event, str]] = deque()
        self._late: list[tuple[float, str, types.NodeLost]] = []
        """Losses that are not concluded yet, with the time when that is going to be visible."""
        self._sequence = 0
        self._writers = [f"router-{number}" for number in range(settings.routers)]
        self._headers = {name: {WRITER: name} for name in self._writers}
        self._desks = [desk(self.state, name) for name in self._writers]
        self._predicted: dict[str, int] = {}
        self._queries: dict[str, tuple[Query, Desk]] = {}
        self._served: list[Served] = []
        self._seen: set[int] = set()
        """Blocks that were ever computed."""
        self._batch = 0
        self._changes: list[tuple[float, Callable[[], None]]] = []
        """What happens to nodes, and when."""
        self._held: dict[str, _Waiting] = {}
        """Requests that routers hold, those that came first before the others."""
        self._look_again = math.inf
        """When routers look whether one of them may go."""
        self._waited: list[float] = []
        """How long each request waited that was held, in seconds."""
        self.rejected = 0
        self.retried = 0
        self._begin()
        self._arrivals = Arrivals(self._work, ready=self.ready, speedup=settings.speedup)

    def _begin(self) -> None:
        """Make the nodes of the beginning known, and plan what happens to nodes later."""
        settings = self.settings
        self._put(0.0, "control", types.FormatRaised(FORMAT))
        self._put(0.0, "control", types.PolicyChanged(settings.policy, settings.parameters))
        for number in range(settings.nodes):
            self._join(f"node-{number + 1}", 0.0)
        self._see(settings.delay)
        self._changes = [(change.time, partial(self._change, change)) for change in settings.changes]

    def run(self, progress: Callable[[int], None] = lambda _: None) -> Outcome:
        """Serve all requests. `progress` is called with how many have arrived, now and then."""
        try:
            return self._run(progress)
        finally:
            for desk in self._desks:
                # A peer's selector holds threads and sockets.
                close = getattr(desk, "close", None)
                if close is not None:
                    close()

    def _run(self, progress: Callable[[int], None]) -> Outcome:
        settings = self.settings
        changes = deque(sorted(self._changes, key=lambda change: change[0]))
        arrivals = self._arrivals
        arrived = 0
        while True:
            change = min(changes[0][0] if changes else math.inf, self._look_again)
            self._until(change)
            # An answer may have brought a request that comes first.
            if self._look_again <= min(change, arrivals.next) and self._look_again < math.inf:
                self._let_in(self._look_again)
            elif arrivals.next < change:
                now, number = arrivals.take()
                self._arrive(number, self._work[number], now)
                if not arrived % 256:
                    progress(arrived)
                arrived += 1
            elif changes and (self._queries or self._held or arrivals.next < math.inf):
                changes.popleft()[1]()
            else:
                break
        progress(len(self._work))
        return Outcome(
            settings, self._names, self._served, self.rejected, self.retried, [engine.busy for engine in self._engines],
            sum(desk.policy_failures for desk in self._desks),
            next((desk.last_failure for desk in self._desks if desk.last_failure), ""),
            sum(desk.decisions for desk in self._desks), self._held_twice(), self._waited,
        )  # fmt: skip

    def _held_twice(self) -> int:
        caches = [self._engines[number].cache.blocks for number in self._alive.values()]
        return (sum(map(len, caches)) - len(set().union(*caches))) * self.settings.block_size

    def _put(self, now: float, topic: str, event: types.Event, writer: str = "") -> None:
        self._log.append((now + self.settings.delay, f"kv.{FLEET}.{topic}", event, writer))

    def _see(self, now: float) -> None:
        """Apply what has become visible."""
        log = self._log
        event: types.Event
        while (log and log[0][0] <= now) or (self._late and self._late[0][0] <= now):
            if self._late and (not log or self._late[0][0] <= log[0][0]):
                visible, where, event = self._late.pop(0)
                writer = ""
            else:
                visible, where, event, writer = log.popleft()
            if isinstance(event, (types.BlocksStored, types.BlocksRemoved)):
                # Losses come in between, so which sequence a registration gets is known only when it is visible.
                event = replace(event, epoch=self._epochs[event.node])
            self._apply(visible, where, [event], self._headers[writer] if writer else None)

    def _apply(
        self, visible: float, where: str, events: Sequence[types.Event], headers: dict[str, str] | None = None
    ) -> None:
        self._sequence += 1
        if isinstance(events[0], types.NodeRegistered):
            self._epochs[events[0].node] = self._sequence
        time = int((self.start + visible - self.settings.delay) * _NS)
        applied = self.state.apply(Message(self._sequence, where, time, headers, encode(events)))
        if applied.commit is None:
            return
        for desk in self._desks:
            desk.observe(applied.commit, time, int((self.start + visible) * _NS))

    def _add(self, name: str, engine: Engine) -> None:
        self._alive[name] = len(self._engines)
        self._names.append(name)
        self._engines.append(engine)

    def _join(self, name: str, now: float) -> None:
        settings = self.settings
        self._add(name, Engine(settings.hardware, settings.capacity, settings.block_size))
        # A node that is back so soon is never concluded to be lost.
        self._late = [late for late in self._late if late[2].node != name]
        registered = types.NodeRegistered(
            node=name, address=f"sim.{name}", models=[MODEL], block_size=settings.block_size,
            capacity_blocks={"gpu": settings.capacity}, cache_mode="reported", engine="simulated",
            max_active=settings.most_active, labels={PREFILL_LABEL: f"{settings.hardware.prefill_speed:.0f}"},
        )  # fmt: skip
        self._put(now, f"node.{token(name)}", registered)

    def _change(self, change: Change) -> None:
        if change.joins:
            if change.node not in self._alive:
                self._join(change.node, change.time)
            return
        if change.node not in self._alive:
            return
        lost = types.NodeLost(change.node, "failed")
        visible = change.time + self.settings.detection + self.settings.delay
        self._late.append((visible, f"kv.{FLEET}.node.{token(change.node)}", lost))
        self._retry(self._stop(change.node), change.time, frozenset([change.node]))

    def _stop(self, name: str) -> list[Job]:
        """A node serves no more, if it did; what ran there, oldest first."""
        number = self._alive.pop(name, None)
        if number is None:
            return []
        engine = self._engines[number]
        engine.ends = math.inf
        return sorted(engine.jobs(), key=lambda job: job.arrival)

    def _retry(self, jobs: Iterable[Job], now: float, exclude: frozenset[str] = frozenset()) -> None:
        """Clients ask again for what was cut off."""
        for job in jobs:
            query, desk = self._queries[job.request]
            self.retried += 1
            query = query._replace(exclude=query.exclude | exclude)
            self._route(query, desk, job.hashes, job.output, job.arrival, now)

    def _arrive(self, number: int, request: Work, now: float) -> None:
        settings = self.settings
        identity = f"{settings.seed}.{number}"
        hashes = request.hashes
        blocks = min(len(hashes) >> 3, longest_match(request.tokens, settings.block_size))
        query = Query(identity, MODEL, hashes, request.tokens, blocks, settings.block_size, request.session)
        desk = self._desks[derive_hash(f"{identity} router".encode()) % len(self._desks)]
        self._arrivals.sent(number, identity)
        self._route(query, desk, unpack_hashes(hashes), request.output_tokens, now, now)

    def _route(
        self, query: Query, desk: Desk, hashes: tuple[int, ...], output: int, arrival: float, now: float
    ) -> None:
        self._see(now)
        self._decide(_Waiting(query, desk, hashes, output, arrival, now), now)

    def _decide(self, waiting: _Waiting, now: float) -> None:
        """Send a request to a node, or hold it."""
        query, desk = waiting.query, waiting.desk
        # In microseconds, as a router's.
        clock = int((self.start + now) * 1_000_000) * 1000
        if (self.state.holding or query.id in self._held) and self._holds(waiting, now, clock):
            return
        while True:
            try:
                decision = desk.decide(query, clock)
            except ServiceFault:
                self._reject(query, now)
                return
            name = decision.node.name
            engine = self._alive.get(name)
            if engine is not None:
                break
            query = query._replace(exclude=query.exclude | {name})
        job = Job(query.id, waiting.hashes, query.tokens, waiting.output, waiting.arrival)
        if not self._engines[engine].fits(job):
            self._reject(query, now)
            return
        writer = self._writers[self._desks.index(desk)]
        routed, assigned = desk.count_in(query, decision, clock, self.state.sequence)
        self._put(now, f"access.{writer}", routed, writer)
        if assigned is not None:
            self._put(now, f"session.{token(query.model)}", assigned, writer)
        self._queries[query.id] = query, desk
        self._predicted[query.id] = decision.match * query.block_size
        self._engines[engine].arrive(job, now)
        heappush(self._due, (self._engines[engine].ends, engine))

    def _holds(self, waiting: _Waiting, now: float, clock: int) -> bool:
        """Whether a request has to wait."""
        query, desk = waiting.query, waiting.desk
        hold = desk.hold(query, clock)
        writer = self._writers[self._desks.index(desk)]
        if hold is None:
            if self._held.pop(query.id, None) is not None:
                waited = now - waiting.since
                self._waited.append(waited)
                reason = release_reason(waited, self.state)
                self._put(now, f"access.{writer}", types.RequestReleased(query.id, query.model, reason, waited), writer)
            return False
        if self._held.setdefault(query.id, waiting) is waiting and now >= waiting.said + SAY_SECONDS:
            held = hold.event(query, clock, self.state.sequence, first=waiting.said == -math.inf)
            waiting.said = now
            self._put(now, f"access.{writer}", held, writer)
        self._look_again = min(self._look_again, now + LOOK_SECONDS)
        return True

    def _let_in(self, now: float) -> None:
        """Look which of the requests that are held may go, and say of the others that they still wait."""
        self._see(now)
        self._look_again = now + LOOK_SECONDS
        clock = int((self.start + now) * 1_000_000) * 1000
        ready = {request for desk in self._desks for request in desk.ready(MODEL, clock)}
        for request, waiting in list(self._held.items()):
            if request in ready or now >= waiting.said + SAY_SECONDS:
                self._decide(waiting, now)
        if not self._held:
            self._look_again = math.inf

    def _reject(self, query: Query, now: float) -> None:
        self.rejected += 1
        self._arrivals.answered(query.id, now)
        self._queries.pop(query.id, None)
        self._predicted.pop(query.id, None)

    def _until(self, time: float) -> None:
        """Let engines run up to a time, or to the next arrival."""
        due = self._due
        while due and due[0][0] <= min(time, self._arrivals.next):
            ends, number = heappop(due)
            engine = self._engines[number]
            if engine.ends != ends:
                continue
            report = engine.run()
            name = self._names[number]
            # One that was removed finishes what it runs, but speaks for no node any more.
            speaks = self._alive.get(name) == number
            for job in report.prefilled:
                self._note_recomputed(job)
                self._queries[job.request][1].computed(job.request, int((self.start + ends) * _NS))
                if job.stored and speaks:
                    self._batch += 1
                    stored = types.BlocksStored(name, 0, self._batch, pack_hashes(job.stored), job.parent)
                    self._put(ends, f"cache.{token(name)}", stored)
            # What is evicted makes room for what begins now: it may have been stored in this very step.
            if report.evicted and speaks:
                self._batch += 1
                removed = types.BlocksRemoved(name, 0, self._batch, pack_hashes(report.evicted))
                self._put(ends, f"cache.{token(name)}", removed)
            for job in report.finished:
                self._finish(job, number, ends)
            if engine.ends < math.inf:
                heappush(due, (engine.ends, number))

    def _note_recomputed(self, job: Job) -> None:
        """Find out what of a prompt that is computed now was computed before, on whatever node."""
        seen = self._seen
        known = 0
        for block in job.hashes[: longest_match(job.tokens, self.settings.block_size)]:
            if block not in seen:
                break
            known += 1
        job.recomputed = max(0, known * self.settings.block_size - job.cached)
        seen.update(job.hashes)

    def _finish(self, job: Job, number: int, now: float) -> None:
        self._served.append(
            Served(
                number, job.arrival, job.first, now, job.tokens, job.cached, self._predicted.pop(job.request),
                job.request, self._queries[job.request][0].session, job.recomputed,
            )
        )  # fmt: skip
        del self._queries[job.request]
        self._arrivals.answered(job.request, now)
        completed = types.RequestCompleted(
            request=job.request, node=self._names[number], prompt_tokens=job.tokens, cached_tokens=job.cached,
            output_tokens=job.output, ttft=job.first - job.started, duration=now - job.started,
        )  # fmt: skip
        self._put(now, f"access.{token(self._names[number])}", completed)
