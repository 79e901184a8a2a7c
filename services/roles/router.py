"""The router: answers `kv.<fleet>.route`, and records what it decided.

Decisions are made from memory and committed behind the reply. While the log is away the router goes on, says
`degraded` in its answers, keeps a bounded buffer and counts what it must drop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import structlog

from kvplane.events import types
from kvplane.events.durations import MICRO, Durations
from kvplane.events.errors import BadHashes
from kvplane.events.hashing import block_hashes, longest_match
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.group import GroupWriter, Writers
from kvplane.events.subjects import subject
from kvplane.services.protocol import labels
from kvplane.services.protocol.errors import BadRequest, NoTokenizer, Overloaded
from kvplane.services.protocol.hashing import Hashing
from kvplane.services.protocol.held import Held
from kvplane.services.protocol.messages import (
    CompleteRequest,
    RouteAnswer,
    RouteRequest,
    StatusRequest,
    names,
    one_of,
)
from kvplane.services.protocol.status import RouterStatus
from kvplane.services.replication.checkpoints import SCHEDULE, Schedule
from kvplane.services.replication.replica import RECENT_SECONDS, Replica
from kvplane.services.roles.holding import HeldRequests
from kvplane.services.roles.large import Large
from kvplane.services.roles.leases import ABANDONED, Leases
from kvplane.services.roles.places import Places
from kvplane.services.roles.shares import Shares
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.query import Query
from kvplane.services.rpc.asker import asker
from kvplane.services.rpc.readiness import Readiness, readiness
from kvplane.services.rpc.server import serve, serving, stop
from kvplane.services.rpc.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup, TaskStatus
    from nats.aio.client import Client
    from nats.micro.service import Service

    from kvplane.events.codec import Commit, Message
    from kvplane.projections.skips import Applied
    from kvplane.services.routing.decide import Decision
    from kvplane.services.routing.holding import Hold
    from kvplane.services.routing.roster import Roster

BUFFER_EVENTS = 100_000
"""Decisions that may wait for the log; `group.LIMIT_BYTES` bounds their size as well."""
LINGER_SECONDS = 0.005

_log = structlog.get_logger("kvplane.router")
_HASH_BYTES = 8
_WARN_NS = 60 * 10**9
"""Between two warnings that the policy fails."""


def _bytes(roster: Roster) -> bool:
    """Whether prompts' bytes are their tokens."""
    return {node.registered.labels.get(labels.TOKENIZER, "") for node in roster.nodes} == {"bytes"}


class Router:
    """One router of a fleet."""

    role = "router"

    def __init__(
        self, client: Client, fleet: str, *, recent_seconds: float = RECENT_SECONDS, schedule: Schedule = SCHEDULE,
        completed: Callable[[Commit], None] | None = None, observed: Callable[[Commit, int], None] | None = None,
    ) -> None:  # fmt: skip
        self._completed = completed
        """Told of commits, those of others included."""
        self._observed = observed
        """The same with their time, and of those as well that were there before."""
        self.client = client
        self.fleet = fleet
        self.writer = new_writer("router")
        self.overlay = Overlay()
        self.replica = Replica(
            client, fleet, self._observe, before=self.record_pending, writer=self.writer, recent_seconds=recent_seconds,
            schedule=schedule,
        )  # fmt: skip
        self.state = self.replica.state
        self.chooser = Chooser(self.state, self.overlay)
        self.decisions = {"exact": 0, "prefix": 0, "miss": 0, "refused": 0}
        self.sessions = {"kept": 0, "moved": 0, "new": 0}
        """Decisions about requests with a session."""
        self.matched_blocks = 0
        self.asked_blocks = 0
        """Blocks that decisions could have matched at the most."""
        self.seconds = Durations(MICRO)
        """How long decisions took."""
        self.tally = Tally()
        self.serving = False
        self.appender = Appender(client, fleet, self.writer)
        self.writers = Writers()
        self._access = self._writer(subject(fleet, "access", self.writer))
        self.leases = Leases(self._record_end)
        self.large = Large(self._prepare)
        self.shares = Shares(self.state, self.overlay)
        self._session_writers: dict[str, GroupWriter] = {}
        self._requests = 0
        self._warned = 0
        self._pending: tuple[Query, Decision, int, int] | None = None
        self.places = Places()
        self.held = HeldRequests(self.state, self.chooser, self._access.put)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled. Started means: the log is read and requests are taken."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.replica.run)
            group.start_soon(self.writers.run)
            group.start_soon(self.leases.run)
            group.start_soon(self.held.run)
            try:
                service = await self._serve(group)
                self.serving = True
                task_status.started()
                try:
                    await anyio.sleep_forever()
                finally:
                    self.serving = False
                    # Nothing may be answered any more that could not be recorded.
                    await stop(service)
            finally:
                self.record_pending()
                self.large.close()
                self.leases.close()
                await self.writers.close()

    async def _serve(self, group: TaskGroup) -> Service:
        await self.replica.follower.caught_up.wait()
        service = await serve(
            self.client, group, "kvplane-router", f"routes requests of fleet {self.fleet}",
            serving(
                "router", self.fleet, self.writer,
                {"route": self.route, "complete": self.complete, "status": self.status, "flush": self.flush},
                in_turn={"route", "complete"}, after={"route": self.record_pending}, large={"route": self.large.decode},
            ),
            {"fleet": self.fleet, "writer": self.writer}, self.tally,
        )  # fmt: skip
        _log.info("router_ready", fleet=self.fleet, writer=self.writer, applied=self.state.sequence)
        return service

    def route(self, request: RouteRequest, traceparent: str = "") -> RouteAnswer:
        """Decide and answer; `record_pending` records. Raises the faults of `services.protocol.errors`."""
        self.record_pending()
        # In microseconds, as it is recorded: a decision must be the same when it is made again.
        now = time.time_ns() // 1000 * 1000
        client = asker()
        query, roster = self._query(request, traceparent, client)
        failures = self.chooser.policy_failures
        begin = time.perf_counter()
        try:
            if roster.limited:
                self.shares.check(client, query.model, roster, now)
            # While nothing can be recorded, nobody would know of a queue.
            hold = self.chooser.hold(query, now) if self.state.holding and not request.dry_run else None
            if hold is not None and not self.degraded:
                return self._held(query, hold, now)
            decision = self.chooser.decide(query, now)
        except Exception as error:
            self.decisions["refused"] += 1
            if isinstance(error, Overloaded):
                for surplus in self.shares.surplus(client, query.model, now):
                    self._give_up(surplus)
            raise
        self.seconds.add(time.perf_counter() - begin)
        if self.chooser.policy_failures > failures and now - self._warned > _WARN_NS:
            self._warned = now
            _log.warning(
                "policy_failed", policy=self.state.policy, error=self.chooser.last_failure,
                failures=self.chooser.policy_failures, instead=decision.policy,
            )  # fmt: skip
        if not request.dry_run:
            self.decisions[decision.kind] += 1
            self.matched_blocks += decision.match
            self.asked_blocks += query.blocks
            if decision.session:
                self.sessions[decision.session] += 1
            self._pending = (query, decision, now, self.state.sequence)
            kept = len(query.hashes) if query.recorded else 0
            self.shares.add(query.id, client, query.model, now, decision.node.name, kept)
            if request.lease_seconds:
                self.leases.add(query.id, decision.node.name, request.lease_seconds, traceparent)
        return RouteAnswer(
            request=query.id,
            node=decision.node.name,
            address=decision.node.registered.address,
            rank=decision.node.registered.labels.get(labels.RANK, ""),
            kind=decision.kind,
            matched_blocks=decision.match,
            matched_tokens=decision.match * query.block_size,
            blocks=len(query.hashes) // _HASH_BYTES,
            tokens=query.tokens,
            policy=decision.policy,
            cost=decision.cost,
            applied=self.state.sequence,
            session=decision.session,
            moved_from=decision.moved_from if decision.session == "moved" else "",
            fallbacks=decision.fallbacks,
            degraded=self.degraded,
            hashing=self._hashing(request, roster) if request.dry_run and not query.hashes else None,
        )

    def _hashing(self, request: RouteRequest, roster: Roster) -> Hashing:
        return Hashing(
            block_size=roster.block_size, lora=self._lora(request, roster), tokenizer="bytes" if _bytes(roster) else ""
        )

    def _held(self, query: Query, hold: Hold, now: int) -> RouteAnswer:
        ask_again = self.held.hold(query, hold, now, self.state.sequence)
        return RouteAnswer(
            request=query.id, node="", address="", kind="hold", matched_blocks=0, matched_tokens=0,
            blocks=len(query.hashes) // _HASH_BYTES, tokens=query.tokens, policy=self.state.policy, cost=0.0,
            applied=self.state.sequence,
            held=Held(reason=hold.reason, place=hold.place, expected=round(hold.expected, 3), ask_again=ask_again),
        )  # fmt: skip

    def _give_up(self, request: str) -> None:
        """End a request of which nothing was heard: somebody else needs its place."""
        self._record_end(types.RequestCompleted(request=request, node=self.shares.node_of(request), status=ABANDONED))
        self.shares.over(request)

    def record_pending(self) -> None:
        """Record the last decision: behind its answer, and before anything else is decided or read from the log."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._record(*pending)

    @property
    def degraded(self) -> bool:
        """Whether decisions can't be recorded at the moment."""
        return not (self._access.available and self.client.is_connected and self.replica.follower.healthy)

    def readiness(self) -> Readiness:
        """Whether it can answer. It can while the log is away: then it is degraded, and still better than none."""
        return readiness(
            self.replica.follower, serving=self.serving, degraded=self.degraded,
            waiting=sum(writer.waiting for writer in self.writers), unrecorded=sum(w.dropped for w in self.writers),
        )  # fmt: skip

    def _query(self, request: RouteRequest, traceparent: str, client: str) -> tuple[Query, Roster]:
        form = one_of(request)
        pairs = [(request.model, "model")]
        if request.session:
            pairs.append((request.session, "session"))
        if request.request:
            pairs.append((request.request, "request"))
        if request.tenant:
            pairs.append((request.tenant, "tenant"))
        names(*pairs)
        roster = self.chooser.roster(request.model)
        size = roster.block_size
        if form == "hashes":
            hashes = request.hashes or b""
            count = len(hashes) // _HASH_BYTES
            tokens = count * size + 1 if request.tokens_count is None else request.tokens_count
            if tokens < count * size:
                raise BadRequest(f"tokens_count {tokens} is less than {count} full blocks of {size} tokens")
        else:
            ids = request.tokens
            if form == "prompt":
                self._check_tokenizer(request, roster)
                ids = list((request.prompt or "").encode())
            lora = self._lora(request, roster)
            try:
                hashes = block_hashes(ids or [], size, lora=lora, salt=request.salt)
            except BadHashes as error:
                raise BadRequest(str(error)) from None
            count, tokens = len(hashes) // _HASH_BYTES, len(ids or [])
        if tokens > types.LENGTH_LIMIT:
            raise BadRequest(f"the prompt has {tokens} tokens; the limit is {types.LENGTH_LIMIT}")
        blocks = min(count, longest_match(tokens, size))
        self._requests += 1
        identity = request.request or f"{self.writer}.{self._requests:x}"
        exclude = frozenset(request.exclude)
        recorded = count <= roster.most_blocks and self.shares.has_room(client, request.model, len(hashes))
        query = Query(
            identity,
            request.model,
            hashes,
            tokens,
            blocks,
            size,
            request.session,
            exclude,
            traceparent,
            recorded,
            request.tenant or client,
            request.tenant,
            request.origin,
            request.leg,
        )
        return query, roster

    def hashing(self, model: str) -> Hashing:
        """How the blocks of a model's prompts are hashed. Raises `BadRequest` for what is no name, `NoNode`."""
        names((model, "model"))
        roster = self.chooser.roster(model)
        if not roster.nodes:
            raise roster.nobody(model)
        return Hashing(block_size=roster.block_size, lora=model if roster.is_lora else "")

    def base(self, model: str) -> str:
        """The model whose cache and tokenizer a LoRA or an alias has. Raises `BadRequest` for what is no name, `NoNode`."""
        names((model, "model"))
        roster = self.chooser.roster(model)
        if not roster.nodes:
            raise roster.nobody(model)
        return roster.nodes[0].registered.models[0]

    def _prepare(self, request: RouteRequest) -> tuple[int, str]:
        """What a prompt's hashes are made with: block size and LoRA."""
        names((request.model, "model"))
        roster = self.chooser.roster(request.model)
        if request.prompt is not None:
            self._check_tokenizer(request, roster)
        return roster.block_size, self._lora(request, roster)

    @staticmethod
    def _lora(request: RouteRequest, roster: Roster) -> str:
        return request.adapter or (request.model if roster.is_lora else "")

    @staticmethod
    def _check_tokenizer(request: RouteRequest, roster: Roster) -> None:
        """Raise `NoTokenizer` unless it is known how to make tokens of a prompt: only simulated nodes' bytes are built in."""
        if not roster.nodes:
            # Who would know how to make tokens is not known, and does not matter.
            raise roster.nobody(request.model)
        if not _bytes(roster):
            raise NoTokenizer(
                f"no tokenizer is known for model {request.model[:80]!r}; send tokens, or hashes with tokens_count"
            )

    def _record(self, query: Query, decision: Decision, now: int, applied: int) -> None:
        if self.state.queue or self.held:
            self.held.let_in(query, now)
        routed, assigned = self.chooser.count_in(query, decision, now, applied)
        self._access.put(routed)
        if assigned is not None:
            self._session_writer(query.model).put(assigned)

    def _session_writer(self, model: str) -> GroupWriter:
        writer = self._session_writers.get(model)
        if writer is None:
            writer = self._session_writers[model] = self._writer(subject(self.fleet, "session", model))
        return writer

    def _writer(self, target: str) -> GroupWriter:
        return self.writers.add(GroupWriter(self.appender, target, linger=LINGER_SECONDS, limit=BUFFER_EVENTS))

    def complete(self, request: CompleteRequest, traceparent: str = "") -> dict[str, object]:
        """Record how a request ended, for clients that can't write to the log."""
        names((request.request, "request"), (request.node, "node"))
        self._record_end(
            types.RequestCompleted(
                request=request.request, node=request.node, status=request.status[:512],
                prompt_tokens=request.prompt_tokens, cached_tokens=request.cached_tokens,
                output_tokens=request.output_tokens, ttft=request.ttft, duration=request.duration, trace=traceparent,
            )
        )  # fmt: skip
        return {"request": request.request, "degraded": self.degraded}

    def _record_end(self, event: types.RequestCompleted) -> None:
        # Though its decision may not be on the log yet, or for long while that is away: what has ended is no load.
        self.overlay.on_log(event.request)
        self._access.put(event)

    def _observe(self, message: Message, applied: Applied) -> None:
        if applied.commit is not None:
            self.overlay.observe(applied.commit, message.time, self.state, self.writer, time.time_ns())
            if applied.commit.place.topic == "access":
                for event in applied.commit.events:
                    if type(event) is types.RequestCompleted:
                        self.shares.over(event.request)
                        self.leases.completed(event.request)
                        node = self.state.nodes.get(event.node) if self.places else None
                        if node is not None:
                            self.places.free(node.registered.models)
                if self._observed is not None:
                    self._observed(applied.commit, message.time)
            elif self.places and applied.commit.place.topic == "node":
                self.places.changed()
            self.held.look()
            if self._completed is not None and self.replica.ready:
                self._completed(applied.commit)

    async def status(self, request: StatusRequest) -> RouterStatus:
        """What this router is and knows."""
        self.record_pending()
        return await self.replica.about(
            RouterStatus,
            digests=request.digest,
            degraded=self.degraded,
            decisions=self.decisions,
            policy_failures=self.chooser.policy_failures,
            policy_failure=self.chooser.last_failure,
            recorded=sum(writer.acknowledged for writer in self.writers),
            waiting=sum(writer.waiting for writer in self.writers),
            unrecorded=sum(writer.dropped for writer in self.writers),
        )

    async def flush(self, request: StatusRequest) -> RouterStatus:
        """Wait until everything decided so far is on disk and read back."""
        self.record_pending()
        await self.writers.flush()
        for writer in self.writers:
            await self.replica.reached(writer.last_sequence)
        return await self.status(request)
