"""Reads the counts of running services when somebody scrapes, so that counting costs nothing where it matters."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.registry import Collector

from kvplane.events.codec import REASONS as MALFORMED
from kvplane.events.log.connection import errors_of
from kvplane.projections.skips import REASONS as ILLEGAL
from kvplane.services.dataplane.measured import OUTCOMES
from kvplane.services.engines.translate import UNKNOWN
from kvplane.services.history.kept import Kept
from kvplane.services.observability.scrape import Scrape
from kvplane.services.process.version import package_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from anyio.abc import TaskStatus
    from nats.aio.client import Client
    from prometheus_client.core import Metric

    from kvplane.events.log.append import Appender
    from kvplane.events.log.follow import Follower
    from kvplane.events.log.group import GroupWriter
    from kvplane.projections.fleet import FleetState
    from kvplane.services.dataplane.measured import Measured
    from kvplane.services.engines.adapters import Adapters
    from kvplane.services.history.historian import Historian
    from kvplane.services.observability.lifeline import Lifeline
    from kvplane.services.replication.replica import Replica
    from kvplane.services.roles.coordinator import Coordinator
    from kvplane.services.roles.router import Router
    from kvplane.services.rpc.readiness import Readiness
    from kvplane.services.rpc.tally import Tally
    from kvplane.services.simulation.simnode import SimNodes
    from kvplane.services.tenancy.doors import Doors


class Service(Protocol):
    """What every service has."""

    role: str
    client: Client
    fleet: str
    tally: Tally

    async def run(self, *, task_status: TaskStatus[None] = ...) -> None:
        """Do its work until cancelled."""

    def readiness(self) -> Readiness:
        """Whether it can do its work now."""


class Observed(NamedTuple):
    """A service and the watch on its connection."""

    service: Service
    lifeline: Lifeline


class Services(Collector):
    """The collector of the services of one process."""

    def __init__(self, observed: Sequence[Observed]) -> None:
        self._observed = observed

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: names are the catalog's."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics of all services."""
        scrape = Scrape()
        scrape.put("kvplane_build_info", 1, version=package_version())
        for service, lifeline in self._observed:
            own = scrape.of(fleet=service.fleet, service=service.role)
            _service(own, service, lifeline)
            if isinstance(service, Kept):
                if service.working is None:
                    own.put("kvplane_historian_failing", 1)
                    continue
                service = service.working  # noqa: PLW2901 - it is what counts
            _ROLES[service.role](own, service)
            if service.role in FOLLOWING:
                _reading(own, *FOLLOWING[service.role](service), lifeline.log_end)
        return scrape.families()


def registry(observed: Sequence[Observed]) -> CollectorRegistry:
    """The services of this process, and the process itself."""
    made = CollectorRegistry()
    made.register(Services(observed))
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    return made


def _service(scrape: Scrape, service: Service, lifeline: Lifeline) -> None:
    put, clients, tally = scrape.put, lifeline.clients, service.tally
    put("kvplane_ready", not service.readiness().reason)
    for (endpoint, outcome), count in tally.answers.items():
        put("kvplane_requests_total", count, endpoint=endpoint, outcome=outcome)
    for endpoint, durations in tally.seconds.items():
        # Most endpoints are never asked, and each would have a dozen buckets.
        if any(durations.counts):
            scrape.put_durations("kvplane_request_seconds", durations, endpoint=endpoint)
    put("kvplane_bad_traceparents_total", tally.bad_traceparents)
    put("kvplane_nats_connected", all(client.is_connected for client in clients))
    put("kvplane_nats_round_trip_seconds", lifeline.round_trip)
    put("kvplane_nats_reconnects_total", sum(client.stats["reconnects"] for client in clients))
    errors = sum(map(errors_of, clients), Counter[str]())
    for kind in ("slow_consumer", "permission", "other"):
        put("kvplane_nats_errors_total", errors[kind], kind=kind)
    put("kvplane_nats_read_loop_failures_total", lifeline.failures)
    for direction in ("in", "out"):
        for what, name in (("msgs", "messages"), ("bytes", "bytes")):
            total = sum(client.stats[f"{direction}_{what}"] for client in clients)
            put(f"kvplane_nats_{name}_total", total, direction=direction)


def _reading(scrape: Scrape, follower: Follower, state: FleetState, log_end: int) -> None:
    put = scrape.put
    put("kvplane_log_applied_sequence", state.sequence)
    put("kvplane_log_applied_timestamp_seconds", state.time / 1e9)
    put("kvplane_log_lag_commits", max(follower.behind, log_end - state.sequence))
    put("kvplane_log_follower_healthy", follower.healthy)
    put("kvplane_log_follower_restarts_total", follower.restarts)
    put("kvplane_fold_commits_total", state.commits)
    for reason in dict.fromkeys((*MALFORMED, *ILLEGAL, *state.skipped)):
        put("kvplane_fold_skipped_commits_total", state.skipped.get(reason, 0), reason=reason)
    put("kvplane_fold_time_set_back_total", state.set_back)
    put("kvplane_log_format", state.format)
    for reason, count in state.ignored.items():
        put("kvplane_fold_ignored_events_total", count, reason=reason)


def _holding(scrape: Scrape, replica: Replica) -> None:
    put, state = scrape.put, replica.state
    states = {"up": 0, "cordoned": 0, "lost": 0}
    for node in state.nodes.values():
        states[node.state] += 1
    for name, count in states.items():
        put("kvplane_fleet_nodes", count, state=name)
    put("kvplane_fleet_memberships", sum(index.block_copies for index in state.caches.by_model.values()))
    put("kvplane_fleet_sessions", len(state.sessions))
    put("kvplane_fleet_active_requests", len(state.load.running))
    put("kvplane_snapshot_loaded_sequence", replica.began)
    put("kvplane_replica_differs_sequence", replica.checkpoints.differs)
    put("kvplane_replica_mismatches_total", replica.checkpoints.mismatches)
    put("kvplane_replica_fork_pause_seconds", replica.checkpoints.worst_pause)


def _appending(scrape: Scrape, *appenders: Appender) -> None:
    scrape.put("kvplane_log_appended_commits_total", sum(appender.commits for appender in appenders))
    scrape.put("kvplane_log_append_retries_total", sum(appender.retries for appender in appenders))
    together = appenders[0].seconds.empty()
    for appender in appenders:
        together.join(appender.seconds)
    scrape.put_durations("kvplane_log_append_seconds", together)


def _grouping(scrape: Scrape, writers: Sequence[GroupWriter]) -> None:
    scrape.put("kvplane_log_appended_events_total", sum(writer.acknowledged for writer in writers))
    scrape.put("kvplane_log_waiting_events", sum(writer.waiting for writer in writers))
    scrape.put("kvplane_log_dropped_events_total", sum(writer.dropped for writer in writers))
    scrape.put("kvplane_log_available", all(writer.available for writer in writers))


def _router(scrape: Scrape, router: Router) -> None:
    put = scrape.put
    _holding(scrape, router.replica)
    _appending(scrape, router.appender)
    _grouping(scrape, list(router.writers))
    for kind in ("exact", "prefix", "miss"):
        put("kvplane_router_decisions_total", router.decisions[kind], kind=kind)
    scrape.put_durations("kvplane_router_decision_seconds", router.seconds)
    put("kvplane_router_matched_blocks_total", router.matched_blocks)
    put("kvplane_router_asked_blocks_total", router.asked_blocks)
    for outcome, count in router.sessions.items():
        put("kvplane_router_session_decisions_total", count, outcome=outcome)
    put("kvplane_router_degraded", router.degraded)
    put("kvplane_router_policy_failures_total", router.chooser.policy_failures)
    put("kvplane_router_policy", 1, policy=router.state.policy)
    put("kvplane_fleet_held_requests", len(router.state.queue))
    if router.state.holding:
        put("kvplane_router_held_total", router.held.holds)
        for reason, count in router.held.released.items():
            put("kvplane_router_released_total", count, reason=reason)
        scrape.put_durations("kvplane_router_held_seconds", router.held.seconds)
    put("kvplane_router_unseen_decisions", len(router.overlay.pending))


class _Gateway(Protocol):
    """What is read of a gateway, which lies above this room."""

    router: Router
    measured: Measured
    breaker: _Breaker
    server: _Server
    guard: _Guard
    kept: _Kept

    @property
    def local(self) -> _LocalPrompts: ...


class _Guard(Protocol):
    doors: Doors | None


class _Kept(Protocol):
    bytes: int


class _LocalPrompts(Protocol):
    compared: int
    differed: int

    def states(self) -> dict[str, tuple[bool, str]]: ...

    def held_bytes(self) -> int: ...


class _Breaker(Protocol):
    tripped: int


class _Server(Protocol):
    refused_connections: int

    @property
    def connections(self) -> int: ...


def _gateway(scrape: Scrape, gateway: _Gateway) -> None:
    _router(scrape, gateway.router)
    put, measured = scrape.put, gateway.measured
    put("kvplane_gateway_connections", gateway.server.connections)
    put("kvplane_gateway_refused_connections_total", gateway.server.refused_connections)
    put("kvplane_gateway_open_requests", measured.open)
    for ending in ("ok", "cancelled", "refused", "failed"):
        put("kvplane_gateway_requests_total", measured.requests.get(ending, 0), ending=ending)
    for source, count in measured.sources.items():
        put("kvplane_gateway_prompts_total", count, source=source)
    local = gateway.local
    for model, (believed, _) in local.states().items():
        put("kvplane_gateway_local_tokens", int(believed), model=model)
    put("kvplane_gateway_local_bytes", local.held_bytes())
    put("kvplane_gateway_compared_prompts_total", local.compared - local.differed, result="same")
    put("kvplane_gateway_compared_prompts_total", local.differed, result="different")
    put("kvplane_gateway_retries_total", measured.retries)
    put("kvplane_gateway_migrations_total", measured.migrations)
    for outcome in OUTCOMES:
        put("kvplane_gateway_legs_total", measured.legs.get(outcome, 0), outcome=outcome)
    put("kvplane_gateway_kept_bytes", gateway.kept.bytes)
    put("kvplane_gateway_queued_requests", measured.queued)
    put("kvplane_gateway_nodes_left_out_total", gateway.breaker.tripped)
    for what, count in (
        ("prompt", measured.prompt_tokens), ("cached", measured.cached_tokens), ("output", measured.output_tokens),
    ):  # fmt: skip
        put("kvplane_gateway_tokens_total", count, kind=what)
    doors = gateway.guard.doors
    if doors is not None:
        put("kvplane_gateway_unauthorized_total", measured.unauthorized)
        put("kvplane_gateway_keys", len(doors.keys.all))
        for tenant, counted in doors.measured.all.items():
            for ending, count in counted.requests.items():
                put("kvplane_gateway_tenant_requests_total", count, tenant=tenant, ending=ending)
            for kind, count in counted.tokens.items():
                put("kvplane_gateway_tenant_tokens_total", count, tenant=tenant, kind=kind)
            for limit, count in counted.limited.items():
                put("kvplane_gateway_tenant_limited_total", count, tenant=tenant, limit=limit)
    scrape.put_durations("kvplane_gateway_seconds", measured.duration)
    scrape.put_durations("kvplane_gateway_ttft_seconds", measured.ttft)
    scrape.put_durations("kvplane_gateway_between_seconds", measured.between)


def _coordinator(scrape: Scrape, coordinator: Coordinator) -> None:
    put, state, snapshots = scrape.put, coordinator.state, coordinator.compaction
    _holding(scrape, coordinator.replica)
    _appending(scrape, coordinator.appender)
    put("kvplane_coordinator_races_lost_total", coordinator.races_lost)
    for conclusion, count in coordinator.conclusions.items():
        put("kvplane_coordinator_conclusions_total", count, conclusion=conclusion)
    put("kvplane_coordinator_bad_pulses_total", coordinator.bad_heartbeats)
    for name, node in state.nodes.items():
        for tier, capacity in node.registered.capacity_blocks.items():
            put("kvplane_node_used_blocks", state.caches.held(node, tier), node=name, tier=tier)
            put("kvplane_node_capacity_blocks", capacity, node=name, tier=tier)
        load = state.load.of(name)
        put("kvplane_node_active_requests", load.active if load else 0, node=name)
    put("kvplane_snapshots_taken_total", snapshots.taken)
    put("kvplane_snapshots_failed_total", snapshots.failed)
    if snapshots.last:
        put("kvplane_snapshot_sequence", snapshots.last["sequence"])
        put("kvplane_snapshot_bytes", snapshots.last["bytes"])
        put("kvplane_snapshot_pause_seconds", snapshots.last["pause"])
        put("kvplane_snapshot_duration_seconds", snapshots.last["seconds"])


def _historian(scrape: Scrape, historian: Historian) -> None:
    put, ingest = scrape.put, historian.ingest
    put("kvplane_historian_stored_sequence", ingest.stored)
    put("kvplane_historian_unstored_commits", max(0, ingest.state.sequence - ingest.stored))
    put("kvplane_historian_failing", bool(ingest.failure))
    put("kvplane_historian_failures_total", ingest.failures)
    put("kvplane_historian_rows_total", ingest.rows_stored)
    scrape.put_durations("kvplane_historian_batch_seconds", ingest.seconds)
    put("kvplane_historian_open_results", historian.pages.open)
    put("kvplane_historian_live_bytes", historian.live_bytes)
    put("kvplane_historian_disk_free_bytes", shutil.disk_usage(ingest.store.folder).free)


def _simnode(scrape: Scrape, service: SimNodes) -> None:
    put = scrape.put
    _appending(scrape, *(node.appender for node in service.nodes))
    _grouping(scrape, [writer for node in service.nodes for writer in node.writers])
    for node in service.nodes:
        name = node.config.name
        put("kvplane_simnode_active_requests", node.active, node=name)
        put("kvplane_simnode_waiting_requests", node.waiting, node=name)
        put("kvplane_simnode_used_blocks", len(node.cache.blocks), node=name)
        put("kvplane_simnode_registrations_total", node.member.registrations, node=name)
        put("kvplane_simnode_not_admitted_total", node.not_admitted, node=name)


def _adapter(scrape: Scrape, service: Adapters) -> None:
    put = scrape.put
    if service.adapters:
        _appending(scrape, *(adapter.appender for adapter in service.adapters))
        _grouping(scrape, [writer for adapter in service.adapters for writer in adapter.writers])
    for adapter in service.adapters:
        name, track = adapter.config.node, adapter.track
        put("kvplane_adapter_engine_well", adapter.well, node=name)
        put("kvplane_adapter_publishers", adapter.published.live, node=name)
        put("kvplane_adapter_registrations_total", adapter.member.registrations, node=name)
        put("kvplane_adapter_batches_total", track.applied, node=name)
        put("kvplane_adapter_last_batch", track.position, node=name)
        put("kvplane_adapter_waiting_batches", len(adapter.published.waiting), node=name)
        for tier in track.translator.tiers() or ["gpu"]:
            put("kvplane_adapter_blocks", track.translator.used(tier), node=name, tier=tier)
        put("kvplane_adapter_replays_total", adapter.replays, node=name)
        put("kvplane_adapter_gaps_total", track.gaps, node=name)
        put("kvplane_adapter_told_anew_total", adapter.repeated_reports, node=name)
        put("kvplane_adapter_overflows_total", adapter.outbox.overflows, node=name)
        put("kvplane_adapter_malformed_messages_total", adapter.published.malformed, node=name)
        for what, count in track.translator.counts.items():
            if what in {"stored", "removed"}:
                put("kvplane_adapter_copies_total", count, node=name, change=what)
            elif what == "cleared":
                put("kvplane_adapter_clears_total", count, node=name)
            elif what.startswith(UNKNOWN):
                put("kvplane_adapter_unknown_events_total", count, node=name, type=what.removeprefix(UNKNOWN))
            else:
                put("kvplane_adapter_not_followed_total", count, node=name, reason=what)


_ROLES: dict[str, Callable[..., None]] = {
    "router": _router,
    "gateway": _gateway,
    "coordinator": _coordinator,
    "historian": _historian,
    "simnode": _simnode,
    "adapter": _adapter,
}
FOLLOWING: dict[str, Callable[..., tuple[Follower, FleetState]]] = {
    "router": lambda router: (router.replica.follower, router.state),
    "gateway": lambda gateway: (gateway.router.replica.follower, gateway.router.state),
    "coordinator": lambda coordinator: (coordinator.replica.follower, coordinator.state),
    "historian": lambda historian: (historian.ingest.follower, historian.ingest.state),
}
"""Services that follow the log: their follower and what it is folded into."""


def reading(service: Service) -> Client | None:
    """The client with which a service reads the log, if it does now."""
    working = service.working if isinstance(service, Kept) else service
    return FOLLOWING[service.role](working)[0].client if working is not None and service.role in FOLLOWING else None
