"""Columns of a history's rows, and the rows of what nodes stored and evicted."""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kvplane.events import types

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

Row = tuple[int, int, int, Any, Any]
"""Sequence, place in the commit, time in microseconds, event, and what was known."""


_CACHE_CHANGES: dict[type, str] = {
    types.BlocksStored: "stored",
    types.BlocksRemoved: "removed",
    types.BlocksPlaced: "placed",
    types.CacheCleared: "cleared",
}
_GROUP_CHANGES: dict[type, str] = {types.GroupStored: "stored", types.GroupRemoved: "removed"}


def packed_lists(packed: Sequence[bytes]) -> pa.ListArray:
    """Packed hashes of each row as a column of lists."""
    offsets = np.zeros(len(packed) + 1, np.int32)
    np.cumsum([len(part) >> 3 for part in packed], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(b"".join(packed), "<u8")))


def times(rows: Iterable[int]) -> pa.Array:
    """Microseconds as a column of times."""
    return pa.array(np.array(list(rows), "datetime64[us]"))


def of_each(things: Sequence[Any], name: str) -> list[Any]:
    """A field of each."""
    return list(map(attrgetter(name), things))


def numbers(things: Sequence[Any], name: str, form: type[np.generic]) -> NDArray[Any]:
    """A field of each, as numbers."""
    return np.fromiter(map(attrgetter(name), things), form, len(things))


def keys(rows: Sequence[Row]) -> dict[str, Any]:
    """The columns that every table of events has."""
    return {
        "sequence": np.fromiter(map(itemgetter(0), rows), np.uint64, len(rows)),
        "event": np.fromiter(map(itemgetter(1), rows), np.uint16, len(rows)),
        "time": times(row[2] for row in rows),
    }


def cache_changes(rows: Sequence[Row]) -> dict[str, Any]:
    """Those of `cache_changes`."""
    if not rows:
        return {}
    events = [row[3] for row in rows]
    placed = [isinstance(event, types.BlocksPlaced) for event in events]
    hashes = [
        event.stored if place else getattr(event, "hashes", b"") for event, place in zip(events, placed, strict=True)
    ]
    evicted = [event.evicted if place else b"" for event, place in zip(events, placed, strict=True)]
    return {
        **keys(rows),
        "node": of_each(events, "node"),
        "change": [_CACHE_CHANGES[type(event)] for event in events],
        "tier": [getattr(event, "tier", None) for event in events],
        "epoch": of_each(events, "epoch"),
        "batch": [getattr(event, "batch", None) for event in events],
        "parent": [getattr(event, "parent", None) for event in events],
        "blocks": np.array([len(packed) >> 3 for packed in hashes], np.uint32),
        "evicted_blocks": [
            len(packed) >> 3 if place else len(event.hashes) >> 3 if isinstance(event, types.BlocksRemoved) else 0
            for event, place, packed in zip(events, placed, evicted, strict=True)
        ],
        "hashes": packed_lists(hashes),
        "evicted": packed_lists(evicted),
        "request": [event.request if place else None for event, place in zip(events, placed, strict=True)],
        "reason": [getattr(event, "reason", None) for event in events],
    }


def group_changes(rows: Sequence[Row]) -> dict[str, Any]:
    """Those of `group_changes`."""
    if not rows:
        return {}
    events = [row[3] for row in rows]
    return {
        **keys(rows),
        "node": of_each(events, "node"),
        "change": [_GROUP_CHANGES[type(event)] for event in events],
        "group_number": numbers(events, "group", np.uint16),
        "kind": [getattr(event, "kind", None) for event in events],
        "window_tokens": [getattr(event, "window", None) for event in events],
        "span": [getattr(event, "span", None) for event in events],
        "epoch": of_each(events, "epoch"),
        "batch": of_each(events, "batch"),
        "blocks": np.array([len(event.hashes) >> 3 for event in events], np.uint32),
        "hashes": packed_lists(of_each(events, "hashes")),
    }


def told_of_groups(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of cache events: those of the cache, and those of further groups."""
    return (
        [row for row in rows if type(row[3]) in _CACHE_CHANGES],
        [row for row in rows if type(row[3]) in _GROUP_CHANGES],
    )
