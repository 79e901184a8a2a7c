"""Rows as commits: the log made again from the history, so that any past state can be folded, purged from the log or not.

What comes out is not the log byte for byte: bodies are encoded anew, and headers are those that the fold reads. The fold of
it is the same, down to the digest.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvplane.events import codec, types
from kvplane.events.codec import BASED_ON, WRITER, WRITER_SEQ, Message
from kvplane.events.subjects import subject
from kvplane.projections.history.pieces import PIECE_BYTES, query
from kvplane.projections.history.tables import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import pyarrow as pa

_NS = 1000
_DECIDED = "REPLACE (epoch_us(decided) AS decided)"
"""The columns of `decisions` and `holds` as `decision_of` and `hold_of` want them."""

_WITH_DECIDED = ("decisions", "holds")

Fetch = "Callable[[str], pa.Table]"
"""Runs a query on the history's tables."""

Events = dict[tuple[int, int], types.Event]

_NODE: dict[str, Any] = {
    "cordoned": lambda row: types.NodeCordoned(row["node"], row["reason"]),
    "uncordoned": lambda row: types.NodeUncordoned(row["node"]),
    "lost": lambda row: types.NodeLost(row["node"], row["reason"]),
    "recovered": lambda row: types.NodeRecovered(row["node"]),
    "removed": lambda row: types.NodeRemoved(row["node"], row["reason"]),
}


def messages(
    fetch: Callable[[str], pa.Table], fleet: str, after: int, last: int, *, step: int = 20_000
) -> Iterator[Message]:
    """Commits after a sequence, up to another, in order. `step` sequences are read at a time, fewer when they are long."""
    while after < last:
        upto = min(last, after + step)
        cuts = fetch(query("main", list(BY_NAME.values()), after, upto, PIECE_BYTES))["last"].to_pylist()
        for cut in [*cuts[:-1], upto]:
            yield from _step(fetch, fleet, f"WHERE sequence > {after} AND sequence <= {cut}")
            after = cut


def _step(fetch: Callable[[str], pa.Table], fleet: str, where: str) -> Iterator[Message]:
    events: Events = {}
    for table, read in _READERS.items():
        columns = f"* EXCLUDE (time) {_DECIDED if table in _WITH_DECIDED else ''}"
        events.update(read(fetch(f"SELECT {columns} FROM {table} {where}")))
    commits = fetch(f"SELECT * EXCLUDE (time), epoch_us(time) AS us FROM commits {where} ORDER BY sequence")
    for row in commits.to_pylist():
        sequence, time = row["sequence"], row["us"] * _NS + row["nanos"]
        if row["skipped"] is not None:
            headers = json.loads(row["headers"]) if row["headers"] is not None else None
            yield Message(sequence, row["subject"], time, headers, row["body"])
            continue
        made: dict[str, str] = {}
        if row["writer"]:
            made[WRITER] = row["writer"]
            if row["writer_seq"]:
                made[WRITER_SEQ] = str(row["writer_seq"])
        if row["based_on"] is not None:
            made[BASED_ON] = str(row["based_on"])
        body = codec.encode([events[sequence, place] for place in range(row["events"])])
        yield Message(sequence, subject(fleet, row["room"], row["name"]), time, made or None, body, remade=True)


def packed_hashes(column: pa.ChunkedArray) -> list[bytes]:
    """Lists of hashes as packed bytes, one a row."""
    found: list[bytes] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)
        data = np.ascontiguousarray(values, "<u8").tobytes()
        found += [data[begin * 8 : end * 8] for begin, end in pairwise(offsets)]
    return found


def _rows(table: pa.Table, *packed: str) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries; the columns named are packed hashes."""
    plain = table.drop_columns(list(packed)).to_pylist()
    columns = [packed_hashes(table[name]) for name in packed]
    for at, row in enumerate(plain):
        row.update((name, column[at]) for name, column in zip(packed, columns, strict=True))
        yield row


def _key(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["sequence"], row["event"]


def _registered(row: Mapping[str, Any]) -> types.NodeRegistered:
    capacity = {tier: row[f"capacity_{tier}"] for tier in types.TIERS if row[f"capacity_{tier}"] is not None}
    return types.NodeRegistered(
        node=row["node"], address=row["address"], models=row["models"], block_size=row["block_size"],
        capacity_blocks=capacity, cache_mode=row["cache_mode"], engine=row["engine"], max_active=row["max_active"],
        pulse_seconds=row["pulse_seconds"], labels=dict(row["labels"]),
    )  # fmt: skip


def node_events(table: pa.Table) -> Events:
    """Events of `node_changes`."""
    return {
        _key(row): _registered(row) if row["change"] == "registered" else _NODE[row["change"]](row)
        for row in _rows(table)
    }


def _cache_event(row: Mapping[str, Any]) -> types.Event:
    node, epoch, hashes = row["node"], row["epoch"], row["hashes"]
    match row["change"]:
        case "stored":
            return types.BlocksStored(node, epoch, row["batch"], hashes, row["parent"], row["tier"])
        case "removed":
            return types.BlocksRemoved(node, epoch, row["batch"], hashes, row["tier"])
        case "placed":
            return types.BlocksPlaced(node, epoch, hashes, row["evicted"], row["parent"], row["request"])
    return types.CacheCleared(node, epoch, row["batch"], row["reason"])


def cache_events(table: pa.Table) -> Events:
    """Events of `cache_changes`."""
    return {_key(row): _cache_event(row) for row in _rows(table, "hashes", "evicted")}


def _group_event(row: Mapping[str, Any]) -> types.Event:
    of = (row["node"], row["epoch"], row["batch"], row["group_number"])
    if row["change"] == "removed":
        return types.GroupRemoved(*of, row["hashes"])
    return types.GroupStored(*of, row["kind"], row["hashes"], row["window_tokens"], row["span"])


def group_events(table: pa.Table) -> Events:
    """Events of `group_changes`."""
    return {_key(row): _group_event(row) for row in _rows(table, "hashes")}


def session_events(table: pa.Table) -> Events:
    """Events of `session_changes`."""
    return {
        _key(row): types.SessionEnded(row["session"], row["model"], row["reason"])
        if row["change"] == "ended"
        else types.SessionAssigned(row["session"], row["model"], row["node"], row["reason"])
        for row in _rows(table)
    }


def decision_of(row: Mapping[str, Any]) -> types.RequestRouted:
    """The event of a row of `decisions` whose hashes are packed and whose `decided` is in microseconds."""
    return types.RequestRouted(
        request=row["request"], model=row["model"], node=row["node"], match=row["match"], blocks=row["blocks"],
        tokens=row["tokens"], hashes=row["hashes"], session=row["session"], policy=row["policy"], applied=row["applied"],
        candidates=[types.Candidate(**candidate) for candidate in row["candidates"]], best=row["best_match"] or 0,
        decided=row["decided"] or 0, exclude=row["exclude"], trace=row["trace"] or "",
        tenant=row["tenant"] or "",
        origin=row["origin"] or "", leg=row["leg"] or 0,
    )  # fmt: skip


def decision_events(table: pa.Table) -> Events:
    """Events of `decisions`."""
    return {_key(row): decision_of(row) for row in _rows(table, "hashes")}


def completion_events(table: pa.Table) -> Events:
    """Events of `completions`."""
    fields = [name for name in types.RequestCompleted.__struct_fields__ if name != "trace"]
    return {
        _key(row): types.RequestCompleted(**{name: row[name] for name in fields}, trace=row["trace"] or "")
        for row in _rows(table)
    }


def hold_of(row: Mapping[str, Any]) -> types.RequestHeld:
    """The event of a row of `holds` whose hashes are packed and whose `decided` is in microseconds."""
    return types.RequestHeld(
        request=row["request"], model=row["model"], tokens=row["tokens"], session=row["session"], tenant=row["tenant"],
        turns=row["turns"], reason=row["reason"], place=row["place"], expected=row["expected"], blocks=row["blocks"],
        hashes=row["hashes"], applied=row["applied"], decided=row["decided"] or 0, trace=row["trace"] or "",
    )  # fmt: skip


def hold_events(table: pa.Table) -> Events:
    """Events of `holds`."""
    return {
        _key(row): types.RequestReleased(row["request"], row["model"], row["reason"], row["waited"])
        if row["change"] == "released"
        else hold_of(row)
        for row in _rows(table, "hashes")
    }


def policy_events(table: pa.Table) -> Events:
    """Events of `policy_changes`."""
    return {_key(row): types.PolicyChanged(row["policy"], dict(row["parameters"])) for row in _rows(table)}


def format_events(table: pa.Table) -> Events:
    """Events of `format_changes`."""
    return {_key(row): types.FormatRaised(row["format"], row["kvplane"]) for row in _rows(table)}


_READERS: dict[str, Callable[[pa.Table], Events]] = {
    "node_changes": node_events,
    "cache_changes": cache_events,
    "group_changes": group_events,
    "session_changes": session_events,
    "decisions": decision_events,
    "completions": completion_events,
    "holds": hold_events,
    "policy_changes": policy_events,
    "format_changes": format_events,
}
