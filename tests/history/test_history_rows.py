"""What rows say beside the events themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
