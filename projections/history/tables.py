"""What is kept: one row a commit, and one an event. Rows are never changed.

Every row has the sequence of its commit, the event's place in it, and the log's time. A row says all that the fold reads
of an event, so that the log can be made again from the rows; a commit that was skipped is kept as it was. What engines call
their blocks (`engine_hashes`) is left to the log.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

VERSION = 3
"""Of the tables. A history of a version in `LACKING` gets the columns that it lacks; any other is made again from the log and
the archive."""
READABLE = ("1", "2", "3")
"""Versions of archived files that can be read; columns that they don't have are null."""

CANDIDATE = pa.struct([("node", pa.string()), ("match", pa.uint64()), ("cost", pa.float64())])

_ARROW: dict[str, pa.DataType] = {
    "UBIGINT": pa.uint64(),
    "UINTEGER": pa.uint32(),
    "USMALLINT": pa.uint16(),
    "DOUBLE": pa.float64(),
    "VARCHAR": pa.string(),
    "BLOB": pa.binary(),
    "TIMESTAMP": pa.timestamp("us"),
    "VARCHAR[]": pa.list_(pa.string()),
    "UBIGINT[]": pa.list_(pa.uint64()),
    "MAP(VARCHAR, VARCHAR)": pa.map_(pa.string(), pa.string()),
    "MAP(VARCHAR, DOUBLE)": pa.map_(pa.string(), pa.float64()),
    'STRUCT(node VARCHAR, "match" UBIGINT, cost DOUBLE)[]': pa.list_(CANDIDATE),
}


class Column(NamedTuple):
    """One column: its name, its type in SQL, and what it means."""

    name: str
    sql: str
    meaning: str

    @property
    def arrow(self) -> pa.DataType:
        """The same type in Arrow."""
        return _ARROW[self.sql]


class Table(NamedTuple):
    """One table."""

    name: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        """Columns as Arrow has them."""
        return pa.schema([(column.name, column.arrow) for column in self.columns])

    def ddl(self, schema: str) -> str:
        """The statement that makes it."""
        columns = ", ".join(f'"{column.name}" {column.sql}' for column in self.columns)
        return f"CREATE TABLE IF NOT EXISTS {schema}.{self.name} ({columns})"


_SEQUENCE = Column("sequence", "UBIGINT", "sequence of the commit on the log")
_TIME = Column("time", "TIMESTAMP", "when the log stored it, UTC")
_EVENT = (_SEQUENCE, Column("event", "USMALLINT", "place of the event in its commit, from 0"), _TIME)
_TENANT = Column("tenant", "VARCHAR", "name of the key by which a gateway let it in; null without one")
_ORIGIN = Column("origin", "VARCHAR", "the request of which this is a further attempt; null for a first one")
_LEG = Column(
    "leg", "UINTEGER", "which further leg of a stream it makes, from 1: it goes on where one broke off; else null"
)
_TRACE = Column(
    "trace", "VARCHAR", "W3C traceparent that came with it; null without one. `trace[4:35]` is the trace's id"
)
_REASON = Column("reason", "VARCHAR", "why, in the writer's words")

HASHES = frozenset({"parent", "prefix", "hashes", "evicted"})
"""Columns that hold block hashes, numbers here; people are shown them in hex."""

COMMITS = Table(
    "commits", "one message of the log each, applied or skipped",
    (
        _SEQUENCE,
        _TIME,
        Column("nanos", "USMALLINT", "nanoseconds beyond `time`"),
        Column("room", "VARCHAR", "node, cache, session, access or control; empty for a foreign subject"),
        Column("name", "VARCHAR", "name that its subject carries: of a node, a model or a writer"),
        Column("writer", "VARCHAR", "who wrote it, as its header says"),
        Column("writer_seq", "UBIGINT", "the writer's counter"),
        Column("based_on", "UBIGINT", "sequence that a deciding writer had applied"),
        Column("events", "USMALLINT", "number of its events; 0 when it was skipped"),
        Column("skipped", "VARCHAR", "why every fold skips it; null when it was applied"),
        Column("detail", "VARCHAR", "more about that"),
        Column("subject", "VARCHAR", "subject of a skipped commit"),
        Column("headers", "VARCHAR", "headers of a skipped commit, as JSON"),
        Column("body", "BLOB", "body of a skipped commit"),
    ),
)  # fmt: skip

NODE_CHANGES = Table(
    "node_changes", "what happened to nodes",
    (
        *_EVENT,
        Column("node", "VARCHAR", "the node"),
        Column("change", "VARCHAR", "registered, cordoned, uncordoned, lost, recovered or removed"),
        _REASON,
        Column("address", "VARCHAR", "where clients reach it"),
        Column("models", "VARCHAR[]", "the cache's model, then other names that it answers to"),
        Column("block_size", "UINTEGER", "tokens a block"),
        Column("capacity_gpu", "UBIGINT", "blocks that the tier gpu can hold"),
        Column("capacity_cpu", "UBIGINT", "blocks that the tier cpu can hold"),
        Column("capacity_disk", "UBIGINT", "blocks that the tier disk can hold"),
        Column("cache_mode", "VARCHAR", "managed or reported: who decides what it evicts"),
        Column("engine", "VARCHAR", "what runs there"),
        Column("max_active", "UBIGINT", "most requests at once, 0 without limit"),
        Column("pulse_seconds", "DOUBLE", "how often it promises to heartbeat"),
        Column("labels", "MAP(VARCHAR, VARCHAR)", "what else it says of itself"),
    ),
)  # fmt: skip

CACHE_CHANGES = Table(
    "cache_changes", "what nodes stored and evicted",
    (
        *_EVENT,
        Column("node", "VARCHAR", "the node"),
        Column("change", "VARCHAR", "stored or removed (the engine's report), placed (by the coordinator) or cleared"),
        Column("tier", "VARCHAR", "gpu, cpu or disk; null for a placement (gpu) and when all is cleared"),
        Column("epoch", "UBIGINT", "life of the node's cache: the sequence of its registration"),
        Column("batch", "UBIGINT", "the engine's counter; null for a placement"),
        Column("parent", "UBIGINT", "block before the first stored one; null at the root of a chain"),
        Column("blocks", "UINTEGER", "blocks that were stored or removed"),
        Column("evicted_blocks", "UINTEGER", "blocks that left: by removal, or to make space for a placement"),
        Column("hashes", "UBIGINT[]", "the blocks that were stored or removed"),
        Column("evicted", "UBIGINT[]", "the blocks that a placement evicted"),
        Column("request", "VARCHAR", "request that a placement was for"),
        _REASON,
    ),
)  # fmt: skip

GROUP_CHANGES = Table(
    "group_changes", "what nodes of hybrid models stored and evicted in further KV cache groups",
    (
        *_EVENT,
        Column("node", "VARCHAR", "the node"),
        Column("change", "VARCHAR", "stored or removed; what clears the cache clears its groups"),
        Column("group_number", "USMALLINT", "the engine's number of the group"),
        Column("kind", "VARCHAR", "full, sliding, chunked or state: what a hit needs of it; null for removals"),
        Column("window_tokens", "UINTEGER", "tokens of its window or chunk; null for removals"),
        Column("span", "UINTEGER", "of how many of the fleet's blocks each of its blocks consists; null for removals"),
        Column("epoch", "UBIGINT", "life of the node's cache: the sequence of its registration"),
        Column("batch", "UBIGINT", "the engine's counter"),
        Column("blocks", "UINTEGER", "blocks that were stored or removed"),
        Column("hashes", "UBIGINT[]", "the fleet's block that each of them ends with"),
    ),
)  # fmt: skip

SESSION_CHANGES = Table(
    "session_changes", "which node sessions were put on, and when they ended",
    (
        *_EVENT,
        Column("session", "VARCHAR", "the session"),
        Column("model", "VARCHAR", "its model"),
        Column("change", "VARCHAR", "new, moved or ended"),
        Column("node", "VARCHAR", "where it belongs from then on; null when it ended"),
        _REASON,
    ),
)  # fmt: skip

DECISIONS = Table(
    "decisions", "where routers sent requests, and what they knew",
    (
        *_EVENT,
        Column("request", "VARCHAR", "the request; sent again, it has several decisions"),
        Column("model", "VARCHAR", "model that was asked for"),
        Column("session", "VARCHAR", "its session, empty without one"),
        Column("node", "VARCHAR", "the node that was chosen"),
        Column("kind", "VARCHAR", "exact, prefix or miss; null when the node was gone already"),
        Column("match", "UINTEGER", "leading blocks that the router expected on the node"),
        Column("best_match", "UINTEGER", "longest match of all nodes that could have been chosen; null where not recorded"),
        Column("blocks", "UINTEGER", "full blocks of the prompt"),
        Column("block_size", "UINTEGER", "tokens a block; null when the node was gone already"),
        Column("tokens", "UINTEGER", "tokens of the prompt"),
        Column("policy", "VARCHAR", "policy that decided"),
        Column("cost", "DOUBLE", "cost of the chosen node, in the policy's unit"),
        Column("router", "VARCHAR", "the router, by its name as a writer"),
        Column("applied", "UBIGINT", "sequence that the router had applied"),
        Column("decided", "TIMESTAMP", "when, by the router's clock, UTC; null where not recorded"),
        Column("exclude", "VARCHAR[]", "nodes that the request would not have"),
        Column("prefix", "UBIGINT", "block that ends the first 512 tokens, or the last full block of a shorter prompt"),
        Column("hashes", "UBIGINT[]", "blocks of the prompt; empty where not recorded"),
        Column("candidates", 'STRUCT(node VARCHAR, "match" UBIGINT, cost DOUBLE)[]', "the best few nodes, by cost"),
        _TRACE,
        # The order is that of their coming: rows are inserted by it.
        _TENANT,
        _ORIGIN,
        _LEG,
    ),
)  # fmt: skip

COMPLETIONS = Table(
    "completions", "how requests ended, beside what was expected of them",
    (
        *_EVENT,
        Column("request", "VARCHAR", "the request"),
        Column("node", "VARCHAR", "where it ran"),
        Column("status", "VARCHAR", "ok, or what went wrong"),
        Column("prompt_tokens", "UBIGINT", "tokens of the prompt"),
        Column("cached_tokens", "UBIGINT", "of those, found cached by the engine"),
        Column("output_tokens", "UBIGINT", "tokens of the answer"),
        Column("ttft", "DOUBLE", "seconds from its arrival at the node to the first token"),
        Column("duration", "DOUBLE", "seconds from its arrival at the node to the end"),
        Column("routed", "UBIGINT", "sequence of its decision; null when there is none in the hour before"),
        Column("model", "VARCHAR", "model, by its decision"),
        Column("policy", "VARCHAR", "policy, by its decision"),
        Column("predicted_tokens", "UBIGINT", "tokens that the router expected to be cached"),
        _TRACE,
    ),
)  # fmt: skip

HOLDS = Table(
    "holds", "requests that waited for room, why, and how long",
    (
        *_EVENT,
        Column("request", "VARCHAR", "the request"),
        Column("model", "VARCHAR", "its model"),
        Column("change", "VARCHAR", "held, still held, or released"),
        _REASON,
        Column("waited", "DOUBLE", "seconds that it had waited; null until it is released"),
        Column("session", "VARCHAR", "its session, empty without one"),
        Column("tenant", "VARCHAR", "who asked, as far as that is known"),
        Column("turns", "UINTEGER", "requests that its conversation had before"),
        Column("place", "UINTEGER", "its place in the queue, from 1"),
        Column("expected", "DOUBLE", "seconds that it was expected to wait from then on"),
        Column("tokens", "UINTEGER", "tokens of the prompt"),
        Column("blocks", "UINTEGER", "full blocks of the prompt"),
        Column("router", "VARCHAR", "the router, by its name as a writer"),
        Column("applied", "UBIGINT", "sequence that the router had applied"),
        Column("decided", "TIMESTAMP", "when, by the router's clock, UTC"),
        Column("hashes", "UBIGINT[]", "blocks of the prompt; empty where not recorded"),
        _TRACE,
    ),
)  # fmt: skip

POLICY_CHANGES = Table(
    "policy_changes", "how routers decided from then on",
    (
        *_EVENT,
        Column("policy", "VARCHAR", "the policy"),
        Column("parameters", "MAP(VARCHAR, DOUBLE)", "its parameters, those that were set"),
    ),
)  # fmt: skip

FORMAT_CHANGES = Table(
    "format_changes", "from when on the log was in a later format",
    (
        *_EVENT,
        Column("format", "UINTEGER", "the format"),
        Column("kvplane", "VARCHAR", "version of kvplane that raised it"),
    ),
)  # fmt: skip

WHATIF_RUNS = Table(
    "whatif_runs", "what-ifs that were made: recorded requests through other policies, and as they really went",
    (
        Column("run", "VARCHAR", "the what-if"),
        Column("made", "TIMESTAMP", "when it was made, UTC"),
        Column("since", "UBIGINT", "sequence of the state that it began with"),
        Column("until", "UBIGINT", "sequence of the last request in it"),
        Column("policy", "VARCHAR", "policy and parameters; `as recorded` simulated, or `really`"),
        Column("requests", "UBIGINT", "requests that are compared"),
        Column("rejected", "UBIGINT", "requests that no node took"),
        Column("mean", "DOUBLE", "mean time to first token, in seconds"),
        Column("p50", "DOUBLE", "half of the requests took no longer, in seconds"),
        Column("p90", "DOUBLE", "90 of 100 took no longer"),
        Column("p99", "DOUBLE", "99 of 100 took no longer"),
        Column("hit_rate", "DOUBLE", "share of the prompt tokens that was cached"),
        Column("imbalance", "DOUBLE", "uncached tokens of the busiest node over the mean"),
    ),
)  # fmt: skip

WHATIF_REQUESTS = Table(
    "whatif_requests", "the requests of what-ifs, as each policy served them",
    (
        Column("run", "VARCHAR", "the what-if"),
        Column("policy", "VARCHAR", "policy and parameters; `as recorded` simulated, or `really`"),
        Column("request", "VARCHAR", "the request"),
        Column("node", "VARCHAR", "the node that served it"),
        Column("arrival", "TIMESTAMP", "when it was routed, UTC"),
        Column("ttft", "DOUBLE", "seconds to its first token"),
        Column("duration", "DOUBLE", "seconds to its end"),
        Column("tokens", "UBIGINT", "tokens of the prompt"),
        Column("cached_tokens", "UBIGINT", "of those, found cached"),
        Column("predicted_tokens", "UBIGINT", "tokens that the router expected to be cached"),
    ),
)  # fmt: skip

ADDED = (WHATIF_RUNS, WHATIF_REQUESTS)
"""What people add to the history. It does not follow from the log, so making the history again does not bring it back."""

TABLES = (
    COMMITS,
    NODE_CHANGES,
    CACHE_CHANGES,
    GROUP_CHANGES,
    SESSION_CHANGES,
    DECISIONS,
    COMPLETIONS,
    HOLDS,
    POLICY_CHANGES,
    FORMAT_CHANGES,
)
SINCE_1 = ((DECISIONS, _TRACE), (COMPLETIONS, _TRACE))
"""Columns that a history of version 1 does not have."""
SINCE_2 = ((DECISIONS, _TENANT), (DECISIONS, _ORIGIN), (DECISIONS, _LEG))
LACKING = {1: (*SINCE_1, *SINCE_2), 2: SINCE_2}
"""Columns that a history of a former version does not have."""
BY_NAME = {table.name: table for table in TABLES}
"""All of them: what is archived, and what the log can be made again from."""
