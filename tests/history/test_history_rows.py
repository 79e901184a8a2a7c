"""What rows say beside the events themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.versions import FORMAT
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive
from kvplane.projections.history.replay import messages
from kvplane.projections.history.store import Store
from tests.support.fold_given import Given, registered
from tests.support.history_stores import write_history

if TYPE_CHECKING:
    from pathlib import Path


def test_what_a_placement_evicts_is_counted_as_what_an_engine_removes(tmp_path: Path) -> None:
    given = Given()
    given.node(registered("a", mode="managed"))
    given.node(registered("b"))
    given.places("a", 1, 2, 3)
    given.places("a", 4, evicted=[3, 2])
    given.stores("b", 5, 6)
    given.drops("b", 6)
    store = Store(tmp_path, "f")
    write_history(store, given.messages, len(given.messages))
    found = store.connection.execute("SELECT node, stored, evicted FROM evictions_by_node ORDER BY node").fetchall()
    assert found == [("a", 4, 2), ("b", 2, 1)]
    store.close()


def test_what_further_groups_hold_is_there_again(tmp_path: Path) -> None:
    given = Given()
    given.put("control", "", types.FormatRaised(FORMAT))
    epoch = given.node(registered("a", capacity=1000))
    sliding = types.GroupStored("a", epoch, 7, 2, "sliding", pack_hashes([2, 4]), 40, 2, [b"x", 9])
    told = [
        types.GroupStored("a", epoch, 7, 0, "state"),
        sliding,
        types.GroupRemoved("a", epoch, 8, 2, pack_hashes([4])),
    ]
    stored = types.BlocksStored("a", epoch, 7, pack_hashes([1, 2, 3, 4]))
    given.put("cache", "a", told[0], stored, told[1])
    given.put("cache", "a", told[2])
    given.put("cache", "a", types.CacheCleared("a", epoch, 9, "engine"))
    given.put("cache", "a", stored, told[1])
    store = Store(tmp_path, "f")
    last = len(given.messages)
    write_history(store, given.messages, last)
    rows = "SELECT change, group_number, kind, window_tokens, span, batch, blocks FROM group_changes ORDER BY sequence, event"
    expected = [
        ("stored", 0, "state", 0, 1, 7, 0), ("stored", 2, "sliding", 40, 2, 7, 2),
        ("removed", 2, None, None, None, 8, 1), ("stored", 2, "sliding", 40, 2, 7, 2),
    ]  # fmt: skip
    part = archive.Part("1970-01-01", 0, last)
    for archived in (False, True):
        if archived:
            archive.adopt(store, part, archive.export(store, part, store.cursor()))
        fold = FleetState("f")
        for message in messages(store.fetch, "f", 0, last, step=3):
            fold.apply(message)
        assert digest(fold) == digest(given.state)
        assert store.connection.execute(rows).fetchall() == expected
    store.close()
