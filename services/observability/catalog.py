"""Every metric of kvplane: its name, its type, its labels, what it means, and when to look into it.

Names follow Prometheus: `kvplane_`, units are seconds and bytes and stand at the end, counters end in `_total`. Nothing can be
exposed that is not listed here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

EVERY = ("fleet", "service")


class Family(NamedTuple):
    """One metric. `watch` is when somebody should look, empty where its value alone says nothing."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    watch: str = ""


class Group(NamedTuple):
    """Metrics that the same services have."""

    title: str
    families: tuple[Family, ...]


def _of(
    name: str, kind: Literal["counter", "gauge", "histogram"], labels: str, meaning: str, watch: str = ""
) -> Family:
    return Family(name, kind, (*EVERY, *labels.split()), meaning, watch)


SERVICE = Group("Every service", (
    Family("kvplane_build_info", "gauge", ("version",), "always 1; the version of kvplane"),
    _of("kvplane_ready", "gauge", "", "1 when `/readyz` says ready", "0 for longer than a start takes"),
    _of("kvplane_requests_total", "counter", "endpoint outcome", "requests answered; `outcome` is `ok` or the error's code, "
            "such as `overloaded`, `no_node`, `no_room`, `time_limit`", "`internal` at all; a rising share that is not `ok`"),
    _of("kvplane_request_seconds", "histogram", "endpoint", "from when a request is taken up until its answer is made"),
    _of("kvplane_bad_traceparents_total", "counter", "", "requests whose `traceparent` was none, and was ignored"),
    _of("kvplane_nats_connected", "gauge", "", "1 while the NATS client is connected", "0 for a minute"),
    _of("kvplane_nats_round_trip_seconds", "gauge", "", "last ping to the server and back; NaN while there is no answer",
            "more than a few milliseconds in one data centre"),
    _of("kvplane_nats_reconnects_total", "counter", "", "connections made after the first", "a steady rise"),
    _of("kvplane_nats_errors_total", "counter", "kind", "problems that the server or the client library reports by itself: "
            "`slow_consumer`, `permission`, `other`", "any"),
    _of("kvplane_nats_read_loop_failures_total", "counter", "", "connections that had stopped to receive, and were made again",
            "any; the log says more"),
    _of("kvplane_nats_messages_total", "counter", "direction", "messages `in` and `out`"),
    _of("kvplane_nats_bytes_total", "counter", "direction", "bytes `in` and `out`"),
))  # fmt: skip

READING = Group("Those that follow the log: router, gateway, coordinator, historian", (
    _of("kvplane_log_applied_sequence", "gauge", "", "sequence of the last commit that is applied"),
    _of("kvplane_log_applied_timestamp_seconds", "gauge", "", "when the log stored that commit, in unix seconds"),
    _of("kvplane_log_lag_commits", "gauge", "", "commits on the log that are not applied",
            "it does not come back to about 0"),
    _of("kvplane_log_follower_healthy", "gauge", "", "1 while commits or heartbeats arrive", "0 for a minute: the log is away"),
    _of("kvplane_log_follower_restarts_total", "counter", "", "consumers made anew after silence, a gap or a reconnect",
            "a steady rise"),
    _of("kvplane_fold_commits_total", "counter", "", "commits applied, those in the snapshot at the start included"),
    _of("kvplane_fold_skipped_commits_total", "counter", "reason", "commits that every replica skips, by reason "
            "(decision 2, `kvplane doctor`); `stale` and `duplicate` are how races and retries end", "`defect` at all; "
            "others rise: somebody writes what is not valid"),
    _of("kvplane_fold_ignored_events_total", "counter", "reason", "events about what is no longer there"),
    _of("kvplane_fold_time_set_back_total", "counter", "", "times that the log's clock went back: a server's was ahead", "any"),
    _of("kvplane_log_format", "gauge", "", "format of the log that is in force"),
))  # fmt: skip

HOLDING = Group("Those that hold the fleet's state: router, gateway, coordinator", (
    _of("kvplane_fleet_nodes", "gauge", "state", "nodes that are `up`, `cordoned` or `lost`", "`lost` is not 0; `up` is 0"),
    _of("kvplane_fleet_memberships", "gauge", "", "blocks that nodes hold, each counted once a node and tier"),
    _of("kvplane_fleet_sessions", "gauge", "", "sessions that are remembered, a million at the most"),
    _of("kvplane_fleet_active_requests", "gauge", "", "requests that were routed and have not completed"),
    _of("kvplane_replica_differs_sequence", "gauge", "", "newest checkpoint at which its digest was not that of the others, "
            "0 while it is", "not 0"),
    _of("kvplane_replica_mismatches_total", "counter", "", "checkpoints at which its digest was not that of the others", "any"),
    _of("kvplane_replica_fork_pause_seconds", "gauge", "", "the longest that making a digest stopped the process"),
    _of("kvplane_snapshot_loaded_sequence", "gauge", "", "sequence of the snapshot it began with; 0: it read all of the log"),
))  # fmt: skip

WRITING = Group("Those that write the log: router, gateway, coordinator, simnode, adapter", (
    _of("kvplane_log_appended_commits_total", "counter", "", "commits that the log acknowledged: they are on disk"),
    _of("kvplane_log_append_retries_total", "counter", "", "tries that it did not acknowledge", "a steady rise"),
    _of("kvplane_log_append_seconds", "histogram", "", "from handing a commit over to its acknowledgement, retries included"),
    _of("kvplane_log_appended_events_total", "counter", "", "events in them (not the coordinator)"),
    _of("kvplane_log_waiting_events", "gauge", "", "events that wait to be acknowledged, 100,000 a subject at the most",
            "above 10,000: the log is away or too slow"),
    _of("kvplane_log_dropped_events_total", "counter", "", "events that could not wait any longer: of a router, decisions that "
            "nobody will find (`unrecorded`)", "any"),
    _of("kvplane_log_available", "gauge", "", "1 when the last try was acknowledged (not the coordinator)", "0 for a minute"),
))  # fmt: skip

ROUTER = Group("Router", (
    _of("kvplane_router_decisions_total", "counter", "kind", "decisions by what the node held: `exact`, `prefix`, `miss`"),
    _of("kvplane_router_decision_seconds", "histogram", "", "how long a decision takes, dry runs included, without "
            "reading the request or writing the answer", "p99 above 1 ms"),
    _of("kvplane_router_matched_blocks_total", "counter", "", "blocks that the nodes held; over asked blocks: the hit rate"),
    _of("kvplane_router_asked_blocks_total", "counter", "", "blocks of the prompts, each of which could have been matched"),
    _of("kvplane_router_session_decisions_total", "counter", "outcome", "decisions about requests with a session, which was "
            "`kept` on its node, `moved`, or `new`", "the share of `moved` rises"),
    _of("kvplane_router_degraded", "gauge", "", "1 while it decides from memory and can't record", "1 for a minute"),
    _of("kvplane_router_policy_failures_total", "counter", "", "decisions for which the policy failed and the least loaded "
            "node was taken", "any"),
    _of("kvplane_router_policy", "gauge", "policy", "always 1; the policy in force"),
    _of("kvplane_fleet_held_requests", "gauge", "", "requests that wait for room, of all routers (`hold=1`)",
            "it grows for an hour: the fleet is too small for its conversations"),
    _of("kvplane_router_held_total", "counter", "", "requests that this router held; with `hold=1` only, as the next two"),
    _of("kvplane_router_released_total", "counter", "reason", "requests that it released: `room`, `bound` (they had waited "
            "`hold_seconds`), `left` (their client went) or `off`", "`bound` at all"),
    _of("kvplane_router_held_seconds", "histogram", "", "how long those had waited"),
    _of("kvplane_router_unseen_decisions", "gauge", "", "own decisions that it has not read back from the log"),
))  # fmt: skip

GATEWAY = Group("Gateway, beside what its router has", (
    _of("kvplane_gateway_requests_total", "counter", "ending", "requests by how they ended: `ok`, `cancelled` by the client, "
            "`refused` (the request's own fault), `failed`", "the share of `failed`"),
    _of("kvplane_gateway_seconds", "histogram", "", "from a request's last byte to its answer's"),
    _of("kvplane_gateway_ttft_seconds", "histogram", "", "from sending a request to an engine to the first byte of its answer"),
    _of("kvplane_gateway_between_seconds", "histogram", "", "mean time between the pieces of a stream"),
    _of("kvplane_gateway_tokens_total", "counter", "kind", "tokens that engines counted: `prompt`, `cached` of them, `output`"),
    _of("kvplane_gateway_prompts_total", "counter", "source", "prompts by where their tokens come from: `client`, `local`, "
            "`render`, `tokenize`, `none`", "`none` rises: those are routed without the cache"),
    _of("kvplane_gateway_local_tokens", "gauge", "model", "1 while the gateway itself finds the tokens of a model's prompts, "
            "0 while it has the model's files but asks engines", "0: the log says why"),
    _of("kvplane_gateway_local_bytes", "gauge", "", "what known texts of prompts take in memory"),
    _of("kvplane_gateway_compared_prompts_total", "counter", "result", "prompts found here that an engine was asked about, "
            "too: `same`, `different`", "any `different`"),
    _of("kvplane_gateway_retries_total", "counter", "", "tries after the first", "a steady rise: see the log for the node"),
    _of("kvplane_gateway_migrations_total", "counter", "", "requests that another node answered than the one chosen first"),
    _of("kvplane_gateway_legs_total", "counter", "outcome", "streams that broke off, by what became of them: `ok`, `failed` (a "
            "further leg at another node was whole, or broke off too), `ended` (nothing was missing but the end), `no_node`, "
            "`not_continued`", "`not_continued` rises: kvplane explain, docs/gateway.md"),
    _of("kvplane_gateway_kept_bytes", "gauge", "", "what is kept of streams so that they can be continued"),
    _of("kvplane_gateway_queued_requests", "gauge", "", "requests at engines whose answers have not begun",
            "it grows: the fleet has more to do than it can"),
    _of("kvplane_gateway_nodes_left_out_total", "counter", "", "times that a node was left out since requests failed there",
            "any"),
    _of("kvplane_gateway_open_requests", "gauge", "", "requests on their way"),
    _of("kvplane_gateway_connections", "gauge", "", "clients' connections"),
    _of("kvplane_gateway_refused_connections_total", "counter", "", "connections beyond the limit", "any"),
    _of("kvplane_gateway_keys", "gauge", "", "keys that are in force, with `--keys`"),
    _of("kvplane_gateway_unauthorized_total", "counter", "", "requests with a wrong key, or without one where it is asked for",
            "a steady rise: somebody tries keys, or one was taken back that is still in use"),
    _of("kvplane_gateway_tenant_requests_total", "counter", "tenant ending", "a key's requests by how they ended; 100 "
            "tenants by name, all others as `(others)`"),
    _of("kvplane_gateway_tenant_tokens_total", "counter", "tenant kind", "tokens of its requests that engines counted"),
    _of("kvplane_gateway_tenant_limited_total", "counter", "tenant limit", "requests that were more than it may: `requests`, "
            "`tokens`, `concurrent`", "a tenant that needs more, or a client that does not wait"),
    Family("kvplane_gateway_workers", "gauge", (), "processes of `--workers` that answer; their metrics have a label `worker`",
            "fewer than were asked for"),
    Family("kvplane_gateway_worker_restarts_total", "counter", (), "processes that ended and were started again", "any"),
))  # fmt: skip

COORDINATOR = Group("Coordinator", (
    _of("kvplane_coordinator_races_lost_total", "counter", "", "decisions made again since another coordinator was first",
            "near the rate of `kvplane_requests_total`: too many coordinators decide on one node"),
    _of("kvplane_coordinator_conclusions_total", "counter", "conclusion", "nodes concluded `lost` or `recovered`, and "
            "conclusions that `failed`", "`lost` rises"),
    _of("kvplane_coordinator_bad_pulses_total", "counter", "", "heartbeats that can't be read", "any"),
    _of("kvplane_node_used_blocks", "gauge", "node tier", "blocks that a node holds"),
    _of("kvplane_node_capacity_blocks", "gauge", "node tier", "blocks that it can hold"),
    _of("kvplane_node_active_requests", "gauge", "node", "requests that were routed there and have not completed"),
    _of("kvplane_snapshots_taken_total", "counter", "", "snapshots written by this coordinator"),
    _of("kvplane_snapshots_failed_total", "counter", "", "snapshots that were due and could not be written",
            "any: the log can't be purged"),
    _of("kvplane_snapshot_sequence", "gauge", "", "sequence of the last one"),
    _of("kvplane_snapshot_bytes", "gauge", "", "its size"),
    _of("kvplane_snapshot_pause_seconds", "gauge", "", "for how long the process stood still for it"),
    _of("kvplane_snapshot_duration_seconds", "gauge", "", "how long it took in all"),
))  # fmt: skip

HISTORIAN = Group("Historian", (
    _of("kvplane_historian_stored_sequence", "gauge", "", "sequence up to which the history is complete"),
    _of("kvplane_historian_unstored_commits", "gauge", "", "commits that were read and are not stored", "it grows"),
    _of("kvplane_historian_failing", "gauge", "", "1 while nothing can be stored; the disk may be full", "1"),
    _of("kvplane_historian_failures_total", "counter", "", "tries to store that failed"),
    _of("kvplane_historian_rows_total", "counter", "", "rows stored"),
    _of("kvplane_historian_batch_seconds", "histogram", "", "how long it took to store a batch of rows"),
    _of("kvplane_historian_open_results", "gauge", "", "results of queries that have more pages; 4 queries may run at once"),
    _of("kvplane_historian_live_bytes", "gauge", "", "size of the database, without the archive"),
    _of("kvplane_historian_disk_free_bytes", "gauge", "", "room on the disk of the history", "less than a day's growth"),
))  # fmt: skip

SIMNODE = Group("Simulated nodes", (
    _of("kvplane_simnode_active_requests", "gauge", "node", "requests on the node"),
    _of("kvplane_simnode_waiting_requests", "gauge", "node", "of those, not prefilled yet"),
    _of("kvplane_simnode_used_blocks", "gauge", "node", "blocks in its cache"),
    _of("kvplane_simnode_registrations_total", "counter", "node", "registrations; each begins with an empty cache"),
    _of("kvplane_simnode_not_admitted_total", "counter", "node", "requests whose blocks the coordinator did not take"),
))  # fmt: skip

ADAPTER = Group("Adapter of an engine (`kvplane attach`)", (
    _of("kvplane_adapter_engine_well", "gauge", "node", "1 while the engine says that it is well",
            "0 for longer than a start takes"),
    _of("kvplane_adapter_publishers", "gauge", "node", "publishers of cache events that are connected; 0 when nobody publishes "
        "where the adapter hears"),
    _of("kvplane_adapter_registrations_total", "counter", "node", "registrations: at the adapter's start, at each start of the "
            "engine, and each time that the node was concluded lost", "it rises without a restart"),
    _of("kvplane_adapter_batches_total", "counter", "node", "batches of the engine that were applied, replayed ones included"),
    _of("kvplane_adapter_last_batch", "gauge", "node", "the engine's number of the last one"),
    _of("kvplane_adapter_waiting_batches", "gauge", "node", "batches that were received and are not yet applied",
            "it does not come back to about 0"),
    _of("kvplane_adapter_blocks", "gauge", "node tier", "blocks that the engine is known to hold"),
    _of("kvplane_adapter_copies_total", "counter", "node change", "copies of blocks that the engine `stored` and `removed`"),
    _of("kvplane_adapter_clears_total", "counter", "node", "times that the engine cleared its cache"),
    _of("kvplane_adapter_replays_total", "counter", "node", "times that the engine's replay buffer was asked"),
    _of("kvplane_adapter_gaps_total", "counter", "node", "times that batches were lost for ever, so that the node was cleared",
            "any: give the engine a replay endpoint, or more `buffer_steps`"),
    _of("kvplane_adapter_told_anew_total", "counter", "node", "times that a running node was cleared and reported anew"),
    _of("kvplane_adapter_overflows_total", "counter", "node", "times that more events had to wait for the log than may wait",
            "any: the log is away for long, or too slow"),
    _of("kvplane_adapter_not_followed_total", "counter", "node reason", "blocks and removals that the fleet does not get, by "
            "reason: `lost_parent` and `unnamed` (what they hold is not known), `unknown_removed`, `partial`, `misfit`, "
            "`other_group` (slower tiers of a hybrid model), `indivisible`, `elsewhere` (not the engine's own), `ambiguous`, "
            "`trimmed` (more copies than blocks)", "`misfit` at all; `lost_parent` rises: what follows a gap"),
    _of("kvplane_adapter_unknown_events_total", "counter", "node type", "events of types that are not known here",
            "any: the engine is newer than this kvplane"),
    _of("kvplane_adapter_malformed_messages_total", "counter", "node", "messages on the engine's socket that are no batches",
            "any: is it the engine's endpoint?"),
))  # fmt: skip

GROUPS = (SERVICE, READING, HOLDING, WRITING, ROUTER, GATEWAY, COORDINATOR, HISTORIAN, SIMNODE, ADAPTER)
BY_NAME = {family.name: family for group in GROUPS for family in group.families}
