"""Live rows as files: what a process that answers sees is what the history holds, whatever was archived or written since."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections.history import archive
from kvplane.projections.history.store import Store
from kvplane.projections.history.tables import TABLES
from kvplane.services.history import live_rows
from kvplane.services.history.live_rows import LiveRows
from tests.support.fold_given import Given, registered
from tests.support.historians import FAR
from tests.support.history_stores import write_history

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.services.history.question import Given as Rows

NAMES = [table.name for table in TABLES]


def fold(count: int, hashes: int = 3) -> Given:
    """A log of so many requests."""
    given = Given()
    given.node(registered("a", capacity=10_000))
    for number in range(count):
        given.put(
            "access", "r",
            types.RequestRouted(
                f"q{number}", "m", "a", 0, hashes, hashes * 16 + 1, pack_hashes(range(number, number + hashes))
            ),
        )  # fmt: skip
    return given


def seen(store: Store, live: LiveRows, rows: Rows) -> dict[str, tuple[int, int]]:
    """Rows of each table, and a checksum, in the files that were given."""
    found = {}
    for name in NAMES:
        files = [str(live.folder / file) for file in rows.live.get(name, [])]
        old = [str(store.archive / file) for names in rows.archive.get(name, []) for file in names]
        parts = [f"SELECT * FROM read_parquet({files}) WHERE sequence > {rows.archived}"] if files else []
        parts += [f"SELECT * FROM read_parquet({old}, hive_partitioning = false)"] if old else []
        if not parts:
            found[name] = (0, 0)
            continue
        query = f"SELECT count(*), coalesce(bit_xor(hash(t)), 0) FROM ({' UNION ALL '.join(parts)}) t"
        ((count, check),) = duckdb.execute(query).fetchall()
        found[name] = (int(count), int(check))
    return found


def test_files_hold_what_the_history_holds_and_stay_few(tmp_path: Path) -> None:
    given = fold(200)
    store = Store(tmp_path / "h", "f")
    live = LiveRows(store.spill / "rows")
    kept = []
    for upto in range(1, len(given.messages), 9):
        write_history(store, given.messages, upto)
        rows = live.given(NAMES, store.cursor())
        assert rows.stored == upto
        assert seen(store, live, rows) == store.content()
        assert len(rows.live["decisions"]) <= 8
        kept.append(rows)
        if len(kept) == 5:
            # Those that were asked before the others still see what they saw.
            assert seen(store, live, kept[0])["commits"][0] == kept[0].stored
        if len(kept) > 5:
            live.done(kept.pop(0))
    for rows in kept:
        live.done(rows)
    there = {path.name for path in live.folder.iterdir()}
    assert there == {name for names in rows.live.values() for name in names}
    store.close()


def test_archived_rows_are_there_once(tmp_path: Path) -> None:
    given = fold(60)
    store = Store(tmp_path / "h", "f")
    live = LiveRows(store.spill / "rows")
    write_history(store, given.messages, 40)
    before = live.given(NAMES, store.cursor())
    write_history(store, given.messages, len(given.messages))
    live.done(live.given(NAMES, store.cursor()))
    part = archive.closed(store.cursor(), FAR)
    assert part is not None
    archive.adopt(store, part, archive.export(store, part, store.cursor()))
    rows = live.given(NAMES, store.cursor())
    assert (rows.archived, rows.stored) == (len(given.messages), len(given.messages))
    assert seen(store, live, rows) == store.content()
    # What was given before is read to its end, files of the archive included.
    assert seen(store, live, before)["decisions"][0] == 39
    assert archive.expire(store, FAR, days=0, size=None)
    archive.sweep(store, keep=live.reading())
    assert seen(store, live, rows)["decisions"][0] == 60
    live.done(rows)
    live.done(before)
    assert list(live.folder.iterdir()) == []
    assert archive.sweep(store, keep=live.reading()) > 0
    store.close()


def test_what_could_not_be_written_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = fold(60)
    store = Store(tmp_path / "h", "f")
    live = LiveRows(store.spill / "rows")
    write_history(store, given.messages, 20)
    live.done(live.given(NAMES, store.cursor()))
    write_history(store, given.messages, len(given.messages))

    def full(*_: object) -> list[int]:
        raise duckdb.IOException("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(live_rows, "ends", full)
        with pytest.raises(duckdb.IOException):
            live.given(NAMES, store.cursor())
    assert seen(store, live, live.given(NAMES, store.cursor())) == store.content()
    store.close()


def test_long_rows_are_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = fold(50, hashes=1000)
    store = Store(tmp_path / "h", "f")
    write_history(store, given.messages, len(given.messages))
    cuts = archive.ends(store.cursor(), "live", TABLES, 0, 51, 40_000)
    assert len(cuts) > 10
    assert cuts == sorted(set(cuts))
    assert cuts[-1] == 51
    assert max(later - before for before, later in zip([0, *cuts], cuts, strict=False)) <= 5
    assert archive.ends(store.cursor(), "live", TABLES, 0, 51, 1) == list(range(1, 52))
    assert archive.ends(store.cursor(), "live", TABLES, 0, 51, 10**9) == [51]
    monkeypatch.setattr(live_rows, "PIECE_BYTES", 40_000)
    live = LiveRows(store.spill / "rows")
    rows = live.given(["decisions"], store.cursor())
    assert len(rows.live["decisions"]) > 10
    store.close()
