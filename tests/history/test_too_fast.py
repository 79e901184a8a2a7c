"""What a node wrote too fast: the history keeps that it came and not what it said, and the log can still be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.subjects import access_name, subject
from kvplane.events.versions import FORMAT
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.replay import messages
from kvplane.projections.history.store import Store
from tests.support.fold_given import Given, registered
from tests.support.history_stores import write_history

if TYPE_CHECKING:
    from pathlib import Path


def test_the_log_of_a_node_that_was_held_is_made_again(tmp_path: Path) -> None:
    given = Given()
    given.put("control", "", types.FormatRaised(FORMAT))
    epoch = given.node(registered("a", capacity=1_000_000))
    reasons = []
    for at in range(24):
        blocks = pack_hashes(range(at * 60_000 + 1, at * 60_000 + 50_001))
        # Bytes that are not needed and that no copy of the history has count as little there as here.
        event = types.BlocksStored("a", epoch, at, blocks, engine_hashes=[b"x" * 32] * 50_000 if at == 1 else None)
        reasons.append(given.put("cache", "a", event, after=0.2))
        given.raw(subject("f", "access", access_name("a")), b"\xc1" * 100, after=0)
    assert reasons.count("too_fast") in range(8, 20)
    store = Store(tmp_path / "history", "f")
    last = len(given.messages)
    write_history(store, given.messages, last)
    again = FleetState("f")
    for message in messages(store.fetch, "f", 0, last):
        again.apply(message)
    assert digest(again) == digest(given.state)
    (kept,) = store.fetch("SELECT max(octet_length(body)) AS bytes FROM commits WHERE skipped = 'too_fast'").to_pylist()
    assert kept["bytes"] == 0
    store.close()
