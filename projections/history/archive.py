"""Closed hours as Parquet files, by table and day, that any tool can read while the historian runs.

    archive/<table>/day=2026-01-31/<first sequence>-<last sequence>.parquet

The archive is the history's beginning: all commits up to `checkpoint.archived`. A file is written whole, forced to the disk
and renamed; then one transaction lists it, takes its rows from the live part and moves the checkpoint. So a row is in exactly
one place at any moment, and a file that no list names is left over from a process that was killed: it is swept away.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

import duckdb

from kvplane.projections.errors import BadHistory
from kvplane.projections.history.pieces import query, sizes
from kvplane.projections.history.store import LIVE, fault
from kvplane.projections.history.tables import READABLE, TABLES, VERSION

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from kvplane.projections.history.store import Store
    from kvplane.projections.history.tables import Table

KEPT = ("node_changes", "policy_changes", "format_changes")
"""Tables that never expire: they are small, and without them nobody knows who is there."""
CLOSED_SECONDS = 60
"""So long after its end an hour is closed."""
PIECE_BYTES = 256 << 20
"""So many bytes of rows are archived at once; an hour that has more is archived in pieces."""

_HOUR_US = 3600 * 1_000_000
_DAY_US = 24 * _HOUR_US
_NAME = re.compile(r"day=(\d{4}-\d{2}-\d{2})/(\d{20})-(\d{20})\.parquet")


class Part(NamedTuple):
    """Commits that go to the archive together: after `archived`, up to `last`. `day` is that of the hour."""

    day: str
    archived: int
    last: int


class File(NamedTuple):
    """One archived file, by its name below the archive's folder."""

    name: str
    table: str
    day: str
    first: int
    last: int
    rows: int
    bytes: int
    version: int = VERSION


def ends(
    cursor: duckdb.DuckDBPyConnection, schema: str, tables: Sequence[Table], after: int, last: int, size: int
) -> list[int]:
    """The sequences that `pieces.query` gives; the last of them is `last`."""
    rows = sizes(schema, tables, after, last)
    ((total,),) = cursor.execute(f"SELECT coalesce(sum(size), 0)::BIGINT FROM ({rows})").fetchall()
    if total <= size:
        return [last]
    found = cursor.execute(query(schema, tables, after, last, size)).fetchall()
    return [*(int(sequence) for (sequence,) in found[:-1]), last]


def closed(cursor: duckdb.DuckDBPyConnection, now: int, size: int = PIECE_BYTES) -> Part | None:
    """What is to be archived next, at a time in unix microseconds: the oldest closed hour, or `size` bytes of it."""
    before = (now - CLOSED_SECONDS * 1_000_000) // _HOUR_US * _HOUR_US
    found = cursor.execute(
        f"SELECT min(epoch_us(time)), (SELECT archived FROM checkpoint) FROM {LIVE}.commits"
    ).fetchall()[0]
    if found[0] is None or found[0] >= before:
        return None
    hour = found[0] // _HOUR_US * _HOUR_US
    day, last = cursor.execute(
        f"SELECT strftime(make_timestamp(?), '%Y-%m-%d'), max(sequence) FROM {LIVE}.commits WHERE epoch_us(time) < ?",
        [hour, hour + _HOUR_US],
    ).fetchall()[0]
    return Part(day, found[1], ends(cursor, LIVE, TABLES, found[1], last, size)[0])


def export(store: Store, part: Part, cursor: duckdb.DuckDBPyConnection) -> list[File]:
    """Write the files of a part; nothing else changes. Raises `HistoryFull` or `BadHistory`."""
    files = []
    made: list[Path] = []
    try:
        for table in TABLES:
            where = f"sequence > {part.archived} AND sequence <= {part.last}"
            (count,) = cursor.execute(f"SELECT count(*) FROM {LIVE}.{table.name} WHERE {where}").fetchall()[0]
            if not count:
                continue
            name = f"{table.name}/day={part.day}/{part.archived + 1:020}-{part.last:020}.parquet"
            path = store.archive / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Hidden, so that nobody who reads the folder takes it for a file of the archive.
            unfinished = path.with_name(f".{path.name}.unfinished")
            made += [path, unfinished]
            order = "sequence" if table.name == "commits" else "sequence, event"
            cursor.execute(
                f"COPY (SELECT * FROM {LIVE}.{table.name} WHERE {where} ORDER BY {order}) TO '{_quoted(unfinished)}' "
                f"(FORMAT parquet, COMPRESSION zstd, KV_METADATA {{kvplane_fleet: '{store.fleet}', "
                f"kvplane_version: '{VERSION}', kvplane_last: '{part.last}'}})"
            )
            _force(unfinished)
            unfinished.rename(path)
            _force(path.parent)
            files.append(File(name, table.name, part.day, part.archived + 1, part.last, count, path.stat().st_size))
    except (duckdb.Error, OSError) as error:
        # On a full disk the live part needs the space.
        for path in made:
            path.unlink(missing_ok=True)
        raise fault(error, store.archive) from error
    return files


def adopt(store: Store, part: Part, files: list[File]) -> None:
    """Let the archive have these rows from now on, in one transaction."""
    connection = store.connection
    try:
        connection.execute("BEGIN")
        (archived,) = connection.execute("SELECT archived FROM checkpoint").fetchall()[0]
        if archived != part.archived:
            connection.execute("ROLLBACK")
            raise BadHistory(f"the archive ends at {archived}, not at {part.archived}; nothing was moved")
        _list(connection, files)
        for table in TABLES:
            connection.execute(f"DELETE FROM {LIVE}.{table.name} WHERE sequence <= ?", [part.last])
        connection.execute("UPDATE checkpoint SET archived = ?", [part.last])
        store.refresh(connection)
        connection.execute("COMMIT")
    except duckdb.Error as error:
        raise fault(error, store.archive) from error


def _list(connection: duckdb.DuckDBPyConnection, files: list[File]) -> None:
    for file in files:
        connection.execute("INSERT INTO archive_files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", list(file))


def listed(store: Store, cursor: duckdb.DuckDBPyConnection | None = None) -> list[File]:
    """All archived files, oldest first."""
    rows = (
        (cursor or store.connection)
        .execute(
            "SELECT name, table_name, strftime(day, '%Y-%m-%d'), first_sequence, last_sequence, row_count, bytes, version "
            "FROM archive_files ORDER BY first_sequence, table_name"
        )
        .fetchall()
    )
    return [File(*row) for row in rows]


def expire(store: Store, now: int, *, days: float | None, size: int | None) -> list[File]:
    """Take the oldest files from the list, those older than `days` and those beyond `size` bytes; what was taken.

    All tables of an hour go together, but for those in `KEPT`. Files stay until `sweep`, for queries that read them now.
    """
    files = [file for file in listed(store) if file.table not in KEPT]
    total = sum(file.bytes for file in files)
    gone: list[File] = []
    for last in dict.fromkeys(file.last for file in files):
        part = [file for file in files if file.last == last]
        old = days is not None and _day(store, part[0].day) + _DAY_US < now - days * _DAY_US
        if not old and (size is None or total <= size):
            break
        total -= sum(file.bytes for file in part)
        gone += part
    if gone:
        try:
            store.connection.execute("BEGIN")
            store.connection.execute(
                "DELETE FROM archive_files WHERE last_sequence <= ? AND NOT list_contains(?, table_name)",
                [gone[-1].last, list(KEPT)],
            )
            store.refresh(store.connection)
            store.connection.execute("COMMIT")
        except duckdb.Error as error:
            raise fault(error, store.archive) from error
    return gone


def _day(store: Store, day: str) -> int:
    row = store.connection.execute("SELECT epoch_us(?::DATE::TIMESTAMP)", [day]).fetchall()[0]
    return int(row[0])


def sweep(store: Store, keep: Collection[str] = ()) -> int:
    """Remove the files that the list does not name, but for those in `keep`; how many.

    For the one process that has the history open.
    """
    names = {file.name for file in listed(store)}.union(keep)
    count = 0
    for path in [*store.archive.rglob("*.parquet"), *store.archive.rglob("*.unfinished")]:
        if str(path.relative_to(store.archive)) not in names:
            path.unlink(missing_ok=True)
            count += 1
    for folder in sorted(store.archive.rglob("day=*"), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    return count


def recover(store: Store) -> int:
    """List the files of an archive anew, for a history whose file was lost; the last archived sequence.

    Files that don't continue each other, such as those of a part that was not adopted or isn't whole, are left to `sweep`
    and the log. Raises `BadHistory` when files are of another fleet, or the archive's beginning isn't whole.
    """
    parts: dict[tuple[int, int], list[File]] = {}
    cut: dict[tuple[int, int], str] = {}
    events: dict[tuple[int, int], int] = {}
    for path in store.archive.rglob("*.parquet"):
        name = path.relative_to(store.archive)
        match = _NAME.fullmatch("/".join(name.parts[1:]))
        if match is None:
            continue
        first, last = int(match[2]), int(match[3])
        try:
            meta = dict(
                store.connection.execute(
                    "SELECT key::VARCHAR, value::VARCHAR FROM parquet_kv_metadata(?)", [str(path)]
                ).fetchall()
            )
            total = "sum(events)::UBIGINT" if name.parts[0] == "commits" else "0"
            count, counted = store.connection.execute(
                f"SELECT count(*), {total} FROM read_parquet(?)", [str(path)]
            ).fetchall()[0]
        except duckdb.Error:
            cut[first, last] = str(name)
            continue
        if meta.get("kvplane_fleet") != store.fleet:
            raise BadHistory(
                f"the archive in {store.folder.name} is of fleet {meta.get('kvplane_fleet')!r}, not {store.fleet!r}; choose "
                "another folder with --history"
            )
        version = meta.get("kvplane_version", "")
        if version not in READABLE:
            continue
        events[first, last] = events.get((first, last), 0) + counted - (0 if name.parts[0] == "commits" else count)
        size = path.stat().st_size
        file = File(str(name), name.parts[0], match[1], first, last, count, size, int(version))
        parts.setdefault((first, last), []).append(file)
    for key, files in parts.items():
        # What is kept for ever outlives its commits.
        if events[key] and any(file.table not in KEPT for file in files):
            cut.setdefault(key, files[0].name)
    whole = [files for key, files in parts.items() if key not in cut and any(file.table == "commits" for file in files)]
    chain: list[list[File]] = []
    for files in sorted(whole, key=lambda part: (part[0].first, -part[0].last)):
        if chain and files[0].first != chain[-1][0].last + 1:
            continue
        chain.append(files)
    if cut and (not chain or min(cut)[0] < chain[0][0].first):
        raise BadHistory(
            f"the archive's beginning can't be read or is not whole, see {cut[min(cut)]}; restore it, make all of the history "
            "from the log with `kvplane history rebuild --from-log`, or move its files away to go on without what they hold"
        )
    if not chain:
        return 0
    last = chain[-1][0].last
    ends = dict.fromkeys(KEPT, 0)
    # Of what never expires, older hours are there as well.
    for files in sorted(parts.values(), key=lambda part: (part[0].first, -part[0].last)):
        older = [file for file in files if file.table in KEPT and ends[file.table] < file.first < chain[0][0].first]
        ends.update({file.table: file.last for file in older})
        if older:
            chain.append(older)
    connection = store.connection
    connection.execute("BEGIN")
    for files in chain:
        _list(connection, files)
    store.refresh(connection)
    (time,) = connection.execute("SELECT max(epoch_us(time)) * 1000 FROM commits").fetchall()[0]
    connection.execute("UPDATE checkpoint SET sequence = ?, archived = ?, time = ?", [last, last, time])
    connection.execute("COMMIT")
    return last


def _force(path: Path) -> None:
    """Make sure that a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
