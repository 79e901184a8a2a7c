"""The history: how fast commits become rows, how large they are, and how long the views take on many of them.

Commits are made in memory, applied by a fold, turned into rows and stored in a DuckDB file, one after the other on one core.
The large history is written as columns straight away: 10 million decisions of 16 blocks, 100 million memberships.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from benchmarks.common import Limit, Row, row
from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.subjects import subject
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.rows import Rows
from kvplane.projections.history.store import Store
from kvplane.projections.history.tables import CANDIDATE, TABLES
from kvplane.projections.history.views import VIEWS
from kvplane.services.history.ingest import FLUSH_BYTES, relax_collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import duckdb

FLEET = "bench"
NODES = 64
BLOCKS = 16
"""Blocks of a generated decision."""
START = 1_790_000_000
"""Unix time of the first commit."""
GROUP = 64
"""Decisions in a commit: what a router at work gathers."""
DECISIONS = Limit(least=50_000)
MEMBERSHIPS = Limit(least=1)
VIEW = Limit(most=1)
MEMBERSHIP_BYTES = Limit(most=12)
DECISION_BYTES = Limit(most=250)


def registrations() -> list[list[types.Event]]:
    """The nodes, a commit each."""
    return [
        [types.NodeRegistered(f"node-{number}", "x", ["m"], 64, {"gpu": 1 << 24}, labels={})] for number in range(NODES)
    ]


def decisions(count: int) -> Iterator[tuple[str, list[types.Event]]]:
    """Commits of a router, and completions of the requests in them."""
    draw = random.Random(5)
    nodes = [f"node-{number}" for number in range(NODES)]
    for at in range(0, count, GROUP):
        events: list[types.Event] = []
        over: list[types.Event] = []
        for number in range(at, min(count, at + GROUP)):
            chosen = draw.sample(nodes, 4)
            candidates = [types.Candidate(node, 3, 0.5) for node in chosen]
            request = f"router-0123456789abcdef.{number:x}"
            events.append(
                types.RequestRouted(
                    request, "m", chosen[0], 3, BLOCKS, BLOCKS * 64 + 7, draw.randbytes(BLOCKS * 8),
                    f"session-{number >> 3}", "ttft", at, candidates, 5, (START + number // 1000) * 1_000_000,
                )
            )  # fmt: skip
            over.append(types.RequestCompleted(request, chosen[0], "ok", 1031, 192, 80, 0.25, 2.0))
        yield "routed", events
        yield "over", over


def log(commits: Sequence[tuple[str, list[types.Event]]]) -> list[Message]:
    """The commits as messages, behind the registrations."""
    found = []
    for events in registrations():
        name = events[0].node  # type: ignore[attr-defined]
        found.append((subject(FLEET, "node", name), codec.encode(events)))
    counter = {"routed": 0, "over": 0}
    for kind, events in commits:
        counter[kind] = counter.get(kind, 0) + 1
        where = subject(FLEET, "cache", kind) if kind.startswith("node-") else subject(FLEET, "access", kind)
        found.append((where, codec.encode(events)))
    return [
        Message(at + 1, where, (START * 1_000_000 + at * 1000) * 1000, None, body)
        for at, (where, body) in enumerate(found)
    ]


def stored(count: int) -> list[tuple[str, list[types.Event]]]:
    """Commits of nodes that store runs of 64 new blocks."""
    draw = random.Random(6)
    found = []
    for number in range(count // 64 // 16):
        node = number % NODES
        events: list[types.Event] = [
            types.BlocksStored(f"node-{node}", node + 1, number * 16 + place, draw.randbytes(512))
            for place in range(16)
        ]
        found.append((f"node-{node}", events))
    return found


def ingest(messages: list[Message], folder: Path) -> tuple[float, float]:
    """Seconds from messages to rows on the disk, and of those what the fold took."""
    relax_collector()
    store = Store(folder, FLEET)
    state, waiting = FleetState(FLEET), store.waiting()
    begin = time.perf_counter()
    folding = 0.0
    rows = Rows()
    for message in messages:
        before = time.perf_counter()
        applied = state.apply(message)
        folding += time.perf_counter() - before
        rows.add(message, applied, state, waiting)
        if rows.size > FLUSH_BYTES or message is messages[-1]:
            store.write(rows, time=state.time)
            rows = Rows()
    took = time.perf_counter() - begin
    if state.skipped:
        raise RuntimeError(f"the bench's commits were skipped: {state.skipped}")
    store.close()
    return took, folding


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    scale = 20 if quick else 1
    count, blocks = 200_000 // scale, 8_000_000 // scale
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        commits = list(decisions(count))
        took, folding = ingest(log([one for one in commits if one[0] == "routed"]), Path(folder) / "decisions")
        both, folding_both = ingest(log(commits), Path(folder) / "both")
        rows.append(
            row(
                "history: decisions into DuckDB", count / (took - folding), "1/s", limit=DECISIONS,
                note=f"{count / (both - folding_both):,.0f} with as many completions; {count / both:,.0f} with decoding and "
                "fold as well, on one core",
            )
        )  # fmt: skip
        took, folding = ingest(log(stored(blocks)), Path(folder) / "blocks")
        rows.append(
            row(
                "history: memberships into DuckDB", blocks / (took - folding) / 1e6, "M/s", limit=MEMBERSHIPS,
                note=f"{blocks / took / 1e6:.2f} M/s with decoding and fold, on one core",
            )
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows += large(
            Path(folder), 10_000_000 // (scale * 5 if quick else 1), 100_000_000 // (scale * 5 if quick else 1)
        )
    return rows


def large(folder: Path, routed: int, memberships: int) -> list[Row]:
    """Rows about a large history."""
    store = Store(folder / "large", FLEET)
    connection = store.connection
    file = folder / "large" / "history.duckdb"
    for events in registrations():
        name = events[0].node  # type: ignore[attr-defined]
        columns: dict[str, object] = {
            "node": [name],
            "change": ["registered"],
            "models": [["m"]],
            "block_size": [64],
            "time": [_times(0, 1)[0]],
        }
        put(connection, "node_changes", columns, 1)
    before = size(connection, file)
    step = 200_000
    draw = np.random.default_rng(7)
    for at in range(0, routed, step):
        put(connection, "decisions", _decisions(draw, at, min(step, routed - at)), min(step, routed - at))
    after = size(connection, file)
    decision_bytes = (after - before) / routed
    for at in range(0, routed, step):
        put(connection, "completions", _completions(draw, at, min(step, routed - at)), min(step, routed - at))
    before = size(connection, file)
    runs = memberships // 64
    for at in range(0, runs, step // 4):
        put(connection, "cache_changes", _changes(draw, at, min(step // 4, runs - at)), min(step // 4, runs - at))
    membership_bytes = (size(connection, file) - before) / memberships
    times = {}
    for view in VIEWS:
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            connection.execute(f"SELECT count(*) FROM (SELECT * FROM {view.name} ORDER BY ALL LIMIT 1000)").fetchall()
            taken.append(time.perf_counter() - begin)
        times[view.name] = statistics.median(taken)
    slowest = sorted(times, key=lambda name: -times[name])
    store.close()
    figures = ", ".join(f"{name} {times[name]:.2f}" for name in slowest[:4])
    return [
        row(
            f"history: a decision of {BLOCKS} blocks", decision_bytes, "B", limit=DECISION_BYTES,
            note=f"{routed / 1e6:g} M decisions, {BLOCKS * 8} B of it hashes, candidates included",
        ),
        row(
            "history: a membership", membership_bytes, "B", limit=MEMBERSHIP_BYTES,
            note=f"{memberships / 1e6:g} M memberships in events of 64 blocks",
        ),
        row("history: slowest view", times[slowest[0]], "s", limit=VIEW, note=figures),
    ]  # fmt: skip


def size(connection: duckdb.DuckDBPyConnection, file: Path) -> int:
    """Bytes of the file."""
    connection.execute("CHECKPOINT")
    return file.stat().st_size


def put(connection: duckdb.DuckDBPyConnection, name: str, columns: dict[str, object], count: int) -> None:
    """Insert rows; columns that are not given are null."""
    schema = next(table for table in TABLES if table.name == name).schema
    arrays = {}
    for field in schema:
        value = columns.get(field.name)
        made = pa.nulls(count, field.type) if value is None else value
        arrays[field.name] = made if isinstance(made, pa.Array) else pa.array(made, field.type)
    connection.register("batch", pa.table(arrays, schema=schema))
    connection.execute(f"INSERT INTO live.{name} SELECT * FROM batch")
    connection.unregister("batch")


def _times(at: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.datetime64]]:
    # 120 decisions a second: a day has 10 million.
    made: np.ndarray[tuple[int], np.dtype[np.datetime64]] = (START * 1_000_000 + (at + np.arange(count)) * 8333).astype(
        "datetime64[us]"
    )
    return made


def _names(prefix: str, numbers: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> pa.Array:
    return pa.array([f"{prefix}{number}" for number in numbers])


def _decisions(draw: np.random.Generator, at: int, count: int) -> dict[str, object]:
    nodes = draw.integers(0, NODES, count)
    match = draw.integers(0, BLOCKS, count).astype(np.uint32)
    others = draw.integers(0, NODES, count * 4)
    values = draw.integers(0, 1 << 63, count * BLOCKS).astype(np.uint64)
    candidates = pa.StructArray.from_arrays(
        [_names("node-", others), draw.integers(0, BLOCKS, count * 4).astype(np.uint64), draw.random(count * 4)],
        fields=list(CANDIDATE),
    )
    return {
        "sequence": np.arange(at, at + count, dtype=np.uint64) // GROUP,
        "event": (np.arange(at, at + count) % GROUP).astype(np.uint16),
        "time": _times(at, count),
        "request": _names("router-0123456789abcdef.", range(at, at + count)),
        "model": ["m"] * count,
        "session": _names("session-", [number >> 3 for number in range(at, at + count)]),
        "node": _names("node-", nodes),
        "kind": ["prefix"] * count,
        "match": match,
        "best_match": match + draw.integers(0, 2, count).astype(np.uint32),
        "blocks": np.full(count, BLOCKS, np.uint32),
        "block_size": np.full(count, 64, np.uint32),
        "tokens": draw.integers(BLOCKS * 64, BLOCKS * 64 + 64, count).astype(np.uint32),
        "policy": ["ttft"] * count,
        "cost": draw.random(count),
        "router": _names("router-", draw.integers(0, 4, count)),
        "applied": np.arange(at, at + count, dtype=np.uint64) // GROUP,
        "decided": _times(at, count),
        "exclude": pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.string())),
        "prefix": (draw.zipf(1.3, count) % 100_000).astype(np.uint64),
        "hashes": pa.ListArray.from_arrays(
            np.arange(0, (count + 1) * BLOCKS, BLOCKS, dtype=np.int32), pa.array(values)
        ),
        "candidates": pa.ListArray.from_arrays(np.arange(0, (count + 1) * 4, 4, dtype=np.int32), candidates),
    }


def _completions(draw: np.random.Generator, at: int, count: int) -> dict[str, object]:
    cached = draw.integers(0, BLOCKS, count).astype(np.uint64) * 64
    return {
        "sequence": np.arange(at, at + count, dtype=np.uint64) // GROUP,
        "event": (np.arange(at, at + count) % GROUP).astype(np.uint16),
        "time": _times(at, count),
        "request": _names("router-0123456789abcdef.", range(at, at + count)),
        "node": _names("node-", draw.integers(0, NODES, count)),
        "status": ["ok"] * count,
        "prompt_tokens": draw.integers(BLOCKS * 64, BLOCKS * 64 + 64, count).astype(np.uint64),
        "cached_tokens": cached,
        "output_tokens": draw.integers(1, 500, count).astype(np.uint64),
        "ttft": draw.lognormal(-1, 1, count),
        "duration": draw.lognormal(1, 1, count),
        "routed": np.arange(at, at + count, dtype=np.uint64) // GROUP,
        "model": ["m"] * count,
        "policy": ["ttft" if number % 5 else "cascade" for number in range(count)],
        "predicted_tokens": cached,
    }


def _changes(draw: np.random.Generator, at: int, count: int) -> dict[str, object]:
    values = draw.integers(0, 1 << 63, count * 64).astype(np.uint64)
    removed = np.arange(count) % 2
    return {
        "sequence": np.arange(at, at + count, dtype=np.uint64) // 16,
        "event": (np.arange(at, at + count) % 16).astype(np.uint16),
        "time": _times(at * 6, count),
        "node": _names("node-", draw.integers(0, NODES, count)),
        "change": ["removed" if one else "stored" for one in removed],
        "tier": ["gpu"] * count,
        "epoch": np.full(count, 5, np.uint64),
        "batch": np.arange(at, at + count, dtype=np.uint64),
        "parent": draw.integers(0, 1 << 63, count).astype(np.uint64),
        "blocks": np.full(count, 64, np.uint32),
        "evicted_blocks": (removed * 64).astype(np.uint32),
        "hashes": pa.ListArray.from_arrays(np.arange(0, (count + 1) * 64, 64, dtype=np.int32), pa.array(values)),
        "evicted": pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.uint64())),
    }
