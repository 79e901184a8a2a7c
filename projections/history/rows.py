"""Commits as rows: what the historian makes of each message that the fold has judged.

A row is an event and what was known when it happened; columns are made of many rows at once, so that a batch enters DuckDB
without a Python object a value where it counts (block hashes stay packed bytes until NumPy reads them).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from kvplane.events import types
from kvplane.events.errors import BadName
from kvplane.events.subjects import place_of
from kvplane.projections.history.cache_rows import (
    cache_changes,
    group_changes,
    keys,
    numbers,
    of_each,
    packed_lists,
    times,
    told_of_groups,
)
from kvplane.projections.history.tables import CANDIDATE, TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvplane.events.codec import Commit, Message
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.history.cache_rows import Row
    from kvplane.projections.skips import Applied

PREFIX_TOKENS = 512
"""How long the beginning of a prompt is that `decisions.prefix` stands for, in tokens."""
MATCHED_SECONDS = 3600
"""For so long after its decision a completion is matched with it, in seconds of log time."""
MOVED = "from "
"""How the reason of an assignment begins when the session was elsewhere before."""

_NS = 1_000_000_000
_NODE_CHANGES: dict[type, str] = {
    types.NodeRegistered: "registered",
    types.NodeCordoned: "cordoned",
    types.NodeUncordoned: "uncordoned",
    types.NodeLost: "lost",
    types.NodeRecovered: "recovered",
    types.NodeRemoved: "removed",
}


class Routed(NamedTuple):
    """A decision that waits for its completion."""

    sequence: int
    time: int
    model: str
    policy: str
    predicted_tokens: int


class Waiting:
    """The last decision of each request that has not completed, for `MATCHED_SECONDS` of log time."""

    def __init__(self) -> None:
        self._decisions: dict[str, Routed] = {}
        self._looked = 0

    def put(self, request: str, routed: Routed) -> None:
        """A request was routed."""
        self._decisions.pop(request, None)
        self._decisions[request] = routed
        # Now and then, so that it costs nothing; what is too old is not matched anyway.
        if routed.time - self._looked > MATCHED_SECONDS * _NS // 16:
            self._looked = routed.time
            before = routed.time - MATCHED_SECONDS * _NS
            for old in [name for name, kept in self._decisions.items() if kept.time < before]:
                del self._decisions[old]

    def take(self, request: str, time: int) -> Routed | None:
        """A request completed; its decision."""
        routed = self._decisions.pop(request, None)
        return routed if routed is not None and routed.time >= time - MATCHED_SECONDS * _NS else None


class Rows:
    """Rows that were gathered and not yet stored. `last` is the sequence up to which they are complete."""

    def __init__(self) -> None:
        self.commits: list[tuple[Message, Commit | None, str | None, str]] = []
        self.events: dict[str, list[Row]] = {
            "node": [], "cache": [], "session": [], "routed": [], "completed": [], "held": [], "control": [],
        }  # fmt: skip
        self.first = self.last = 0
        self.size = 0
        """About how many bytes they hold."""
        self._groups = False
        """Whether anything was told of further KV cache groups."""

    def add(self, message: Message, applied: Applied, state: FleetState, waiting: Waiting) -> None:
        """A message that was just applied to the state, or skipped by it."""
        commit = applied.commit
        if applied.skipped == "too_fast":
            # It was not looked at, and may come without end.
            message = message._replace(headers=None, body=b"")
        self.first = self.first or message.sequence
        self.last = message.sequence
        self.size += len(message.body) + 200
        self.commits.append((message, commit, applied.skipped, applied.detail))
        if commit is None:
            return
        time = message.time // 1000
        topic = commit.place.topic
        if topic != "access":
            node = state.nodes.get(commit.place.name) if topic == "cache" else None
            self._groups |= node is not None and node.groups is not None
            self.events[topic] += [
                (message.sequence, place, time, event, None) for place, event in enumerate(commit.events)
            ]
            return
        for place, event in enumerate(commit.events):
            known: object
            if isinstance(event, types.RequestRouted):
                node = state.nodes.get(event.node)
                size = node.registered.block_size if node is not None else 0
                self.events["routed"].append((message.sequence, place, time, event, (commit.place.name, size)))
                predicted = event.match * size
                waiting.put(event.request, Routed(message.sequence, message.time, event.model, event.policy, predicted))
            elif isinstance(event, types.RequestHeld | types.RequestReleased):
                self.events["held"].append((message.sequence, place, time, event, commit.place.name))
            else:
                known = waiting.take(event.request, message.time)  # type: ignore[attr-defined]
                self.events["completed"].append((message.sequence, place, time, event, known))

    def __len__(self) -> int:
        return len(self.commits)

    def tables(self) -> dict[str, pa.Table]:
        """All rows as Arrow tables, those without rows left out."""
        cache, groups = told_of_groups(self.events["cache"]) if self._groups else (self.events["cache"], [])
        made = {
            "commits": _commits(self.commits),
            "node_changes": _node_changes(self.events["node"]),
            "cache_changes": cache_changes(cache),
            "group_changes": group_changes(groups),
            "session_changes": _session_changes(self.events["session"]),
            "decisions": _decisions(self.events["routed"]),
            "completions": _completions(self.events["completed"]),
            "holds": _holds(self.events["held"]),
            "policy_changes": _policy_changes(self.events["control"]),
            "format_changes": _format_changes(self.events["control"]),
        }
        return {table.name: pa.table(made[table.name], schema=table.schema) for table in TABLES if made[table.name]}


def _commits(rows: Sequence[tuple[Message, Commit | None, str | None, str]]) -> dict[str, Any]:
    if not rows:
        return {}
    places = [(commit.place if commit is not None else _place(message)) for message, commit, _, _ in rows]
    headers = [message.headers for message, _, _, _ in rows]
    gone = [(message if commit is None else None) for message, commit, _, _ in rows]
    return {
        "sequence": np.array([message.sequence for message, _, _, _ in rows], np.uint64),
        "time": times(message.time // 1000 for message, _, _, _ in rows),
        "nanos": np.array([message.time % 1000 for message, _, _, _ in rows], np.uint16),
        "room": [place[0] for place in places],
        "name": [place[1] for place in places],
        "writer": [commit.writer if commit is not None else None for _, commit, _, _ in rows],
        "writer_seq": [commit.writer_seq if commit is not None else None for _, commit, _, _ in rows],
        "based_on": [commit.based_on if commit is not None else None for _, commit, _, _ in rows],
        "events": [len(commit.events) if commit is not None else 0 for _, commit, _, _ in rows],
        "skipped": [reason for _, _, reason, _ in rows],
        "detail": [_text(detail) if reason is not None else None for _, _, reason, detail in rows],
        "subject": [_text(message.subject) if message is not None else None for message in gone],
        "headers": [
            json.dumps(dict(own)) if message is not None and own is not None else None
            for message, own in zip(gone, headers, strict=True)
        ],
        "body": [message.body if message is not None else None for message in gone],
    }


def _text(text: str) -> str:
    """Text that is UTF-8 for sure: what a stranger's bytes became may not be."""
    return text.encode("utf-8", "backslashreplace").decode()


def _place(message: Message) -> tuple[str, str]:
    """Topic and name of a skipped commit, from its subject alone."""
    parts = message.subject.split(".")
    try:
        place = place_of(parts[1] if len(parts) > 1 else "", message.subject)
    except BadName:
        return "", ""
    return place.topic, place.name


def _node_changes(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {}
    events = [row[3] for row in rows]
    registered = [event if isinstance(event, types.NodeRegistered) else None for event in events]

    def of(get: Callable[[types.NodeRegistered], Any]) -> list[Any]:
        return [get(event) if event is not None else None for event in registered]

    return {
        **keys(rows),
        "node": of_each(events, "node"),
        "change": [_NODE_CHANGES[type(event)] for event in events],
        "reason": [getattr(event, "reason", None) for event in events],
        "address": of(lambda event: event.address),
        "models": of(lambda event: event.models),
        "block_size": of(lambda event: event.block_size),
        "capacity_gpu": of(lambda event: event.capacity_blocks.get("gpu")),
        "capacity_cpu": of(lambda event: event.capacity_blocks.get("cpu")),
        "capacity_disk": of(lambda event: event.capacity_blocks.get("disk")),
        "cache_mode": of(lambda event: event.cache_mode),
        "engine": of(lambda event: event.engine),
        "max_active": of(lambda event: event.max_active),
        "pulse_seconds": of(lambda event: event.pulse_seconds),
        "labels": of(lambda event: list(event.labels.items())),
    }


def _session_changes(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {}
    events = [row[3] for row in rows]
    return {
        **keys(rows),
        "session": of_each(events, "session"),
        "model": of_each(events, "model"),
        "change": [
            "ended" if isinstance(event, types.SessionEnded) else "moved" if event.reason.startswith(MOVED) else "new"
            for event in events
        ],
        "node": [getattr(event, "node", None) for event in events],
        "reason": of_each(events, "reason"),
    }


_KINDS = pa.array(["miss", "prefix", "exact"])


def _kinds(
    match: NDArray[np.uint32], blocks: NDArray[np.uint32], tokens: NDArray[np.uint32], sizes: NDArray[np.int64]
) -> pa.Array:
    """What each match was; null where the block size is not known."""
    most = np.minimum(blocks, np.maximum(tokens.astype(np.int64) - 1, 0) // np.maximum(sizes, 1))
    kinds = np.where(match == 0, 0, np.where(match >= most, 2, 1))
    return pa.DictionaryArray.from_arrays(pa.array(kinds.astype(np.int8), mask=sizes == 0), _KINDS).cast(pa.string())


def _prefixes(hashes: pa.ListArray, sizes: NDArray[np.int64]) -> pa.Array:
    """The block that ends the first tokens of each prompt; null for prompts without a full block."""
    offsets, values = hashes.offsets.to_numpy().astype(np.int64), hashes.values.to_numpy(zero_copy_only=False)
    counts = np.diff(offsets)
    wanted = np.minimum(counts, np.maximum(1, PREFIX_TOKENS // np.where(sizes == 0, PREFIX_TOKENS, sizes)))
    if not len(values):
        return pa.nulls(len(counts), pa.uint64())
    places = np.maximum(offsets[:-1] + wanted - 1, 0)
    return pa.array(values[np.minimum(places, len(values) - 1)], mask=counts == 0)


def _decisions(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {}
    events = [row[3] for row in rows]
    sizes = np.fromiter((row[4][1] for row in rows), np.int64, len(rows))
    match = numbers(events, "match", np.uint32)
    blocks = numbers(events, "blocks", np.uint32)
    tokens = numbers(events, "tokens", np.uint32)
    hashes = packed_lists(of_each(events, "hashes"))
    candidates = [candidate for event in events for candidate in event.candidates]
    offsets = np.zeros(len(events) + 1, np.int32)
    np.cumsum([len(event.candidates) for event in events], out=offsets[1:])
    structs = pa.StructArray.from_arrays(
        [
            pa.array(of_each(candidates, "node"), pa.string()),
            numbers(candidates, "match", np.uint64),
            numbers(candidates, "cost", np.float64),
        ],
        fields=list(CANDIDATE),
    )
    return {
        **keys(rows),
        "request": of_each(events, "request"),
        "model": of_each(events, "model"),
        "session": of_each(events, "session"),
        "node": of_each(events, "node"),
        "kind": _kinds(match, blocks, tokens, sizes),
        "match": match,
        "best_match": [event.best if event.decided else None for event in events],
        "blocks": blocks,
        "block_size": pa.array(sizes.astype(np.uint32), mask=sizes == 0),
        "tokens": tokens,
        "policy": of_each(events, "policy"),
        "cost": [event.candidates[0].cost if event.candidates else None for event in events],
        "router": [row[4][0] for row in rows],
        "applied": numbers(events, "applied", np.uint64),
        "decided": times(event.decided or _NOT_A_TIME for event in events),
        "exclude": of_each(events, "exclude"),
        "prefix": _prefixes(hashes, sizes),
        "hashes": hashes,
        "candidates": pa.ListArray.from_arrays(offsets, structs),
        "trace": [event.trace or None for event in events],
        "tenant": pa.array([event.tenant or None for event in events], pa.string()),
        "origin": pa.array([event.origin or None for event in events], pa.string()),
        "leg": pa.array([event.leg or None for event in events], pa.uint32()),
    }


_NOT_A_TIME = np.iinfo(np.int64).min
"""How NumPy says that there is no time; null in Arrow."""


def _completions(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {}
    events = [row[3] for row in rows]
    known: list[Routed | None] = [row[4] for row in rows]
    return {
        **keys(rows),
        "request": of_each(events, "request"),
        "node": of_each(events, "node"),
        "status": of_each(events, "status"),
        "prompt_tokens": numbers(events, "prompt_tokens", np.uint64),
        "cached_tokens": numbers(events, "cached_tokens", np.uint64),
        "output_tokens": numbers(events, "output_tokens", np.uint64),
        "ttft": numbers(events, "ttft", np.float64),
        "duration": numbers(events, "duration", np.float64),
        "routed": [routed.sequence if routed is not None else None for routed in known],
        "model": [routed.model if routed is not None else None for routed in known],
        "policy": [routed.policy if routed is not None else None for routed in known],
        "predicted_tokens": [routed.predicted_tokens if routed is not None else None for routed in known],
        "trace": [event.trace or None for event in events],
    }


def _holds(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {}
    events = [row[3] for row in rows]
    held = [isinstance(event, types.RequestHeld) for event in events]

    def of(name: str) -> list[Any]:
        return [getattr(event, name, None) for event in events]

    return {
        **keys(rows),
        "request": of_each(events, "request"),
        "model": of_each(events, "model"),
        "change": [
            ("held" if event.decided else "still held") if is_held else "released"
            for event, is_held in zip(events, held, strict=True)
        ],
        "reason": of_each(events, "reason"),
        "waited": of("waited"),
        "session": of("session"),
        "tenant": of("tenant"),
        "turns": of("turns"),
        "place": of("place"),
        "expected": of("expected"),
        "tokens": of("tokens"),
        "blocks": of("blocks"),
        "router": [row[4] for row in rows],
        "applied": of("applied"),
        "decided": pa.array([getattr(event, "decided", None) or None for event in events], pa.timestamp("us")),
        "hashes": packed_lists([getattr(event, "hashes", b"") for event in events]),
        "trace": [getattr(event, "trace", "") or None for event in events],
    }


def _policy_changes(control: Sequence[Row]) -> dict[str, Any]:
    rows = [row for row in control if isinstance(row[3], types.PolicyChanged)]
    if not rows:
        return {}
    return {
        **keys(rows),
        "policy": [row[3].policy for row in rows],
        "parameters": [list(row[3].parameters.items()) for row in rows],
    }


def _format_changes(control: Sequence[Row]) -> dict[str, Any]:
    rows = [row for row in control if isinstance(row[3], types.FormatRaised)]
    if not rows:
        return {}
    return {
        **keys(rows),
        "format": [row[3].format for row in rows],
        "kvplane": [row[3].kvplane for row in rows],
    }
