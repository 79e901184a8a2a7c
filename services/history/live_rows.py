"""Live rows as files, for processes that answer questions: DuckDB lets nobody else open what it writes to.

They are written when somebody asks, only for the tables that the question is about, and only what has come since the last
question; a small file is written again together with what comes after it, so that they stay few. A file goes when the archive
has its rows or another file does, and nobody reads it any more.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import duckdb

from kvplane.projections.history.archive import ends
from kvplane.projections.history.pieces import LEAST_BYTES, PIECE_BYTES
from kvplane.projections.history.store import LIVE, archived_files
from kvplane.projections.history.tables import ADDED, BY_NAME
from kvplane.services.history.question import Given

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from duckdb import DuckDBPyConnection

    from kvplane.projections.history.tables import Table

_ADDED = {table.name for table in ADDED}


class _File(NamedTuple):
    """Rows after `first`, up to `last`."""

    name: str
    first: int
    last: int
    rows: int
    bytes: int


class LiveRows:
    """The files of one history's live rows, in a folder of its own that may be emptied when the history is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files: dict[str, list[_File]] = {}
        self._reached: dict[str, int] = {}
        """Sequence up to which the files of each table go."""
        self._added: dict[str, tuple[int, str]] = {}
        """Rows, and the file, of tables that do not follow from the log."""
        self._readers: Counter[str] = Counter()
        self._gone: set[str] = set()
        self._made = 0
        self._one = threading.Lock()

    def given(self, tables: Sequence[str], cursor: DuckDBPyConnection) -> Given:
        """All rows of these tables at this moment, as files that stay until `done`."""
        with self._one:
            size = PIECE_BYTES
            while True:
                try:
                    archived, stored, archive, live = self._all(tables, cursor, size)
                except duckdb.OutOfMemoryException:
                    size //= 4
                    if size < LEAST_BYTES:
                        raise
                else:
                    break
            given = Given(
                archived=archived, stored=stored, live=live,
                archive={name: archive[name] for name in tables if name in archive},
            )  # fmt: skip
            self._readers.update(_names(given))
            self._sweep()
        return given

    def _all(
        self, tables: Sequence[str], cursor: DuckDBPyConnection, size: int
    ) -> tuple[int, int, dict[str, list[list[str]]], dict[str, list[str]]]:
        cursor.execute("BEGIN")
        try:
            ((stored, archived),) = cursor.execute("SELECT sequence, archived FROM checkpoint").fetchall()
            archive = archived_files(cursor)
            live: dict[str, list[str]] = {}
            for name in tables:
                if name in _ADDED:
                    live[name] = self._all_of(cursor, name)
                else:
                    live[name] = self._upto(cursor, BY_NAME[name], archived, stored, size)
        except BaseException:
            # What was to be put together is no more: all of it is written again.
            self._gone.update(file.name for files in self._files.values() for file in files)
            self._files, self._reached = {}, {}
            raise
        finally:
            with suppress(duckdb.Error):
                cursor.execute("ROLLBACK")
        return archived, stored, archive, live

    def done(self, given: Given) -> None:
        """Nobody reads these any more for the one who was given them."""
        with self._one:
            self._readers.subtract(_names(given))
            self._sweep()

    def reading(self) -> set[str]:
        """Names of files, those of the archive included, that somebody reads now."""
        with self._one:
            return {name for name, readers in self._readers.items() if readers > 0}

    def _sweep(self) -> None:
        self._readers = +self._readers
        for name in [name for name in self._gone if name not in self._readers]:
            self._gone.discard(name)
            (self.folder / name).unlink(missing_ok=True)

    def _copy(self, cursor: DuckDBPyConnection, table: str, query: str) -> tuple[str, int]:
        self._made += 1
        name = f"{table}-{self._made}.parquet"
        path = str(self.folder / name).replace("'", "''")
        cursor.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, COMPRESSION lz4_raw)")
        return name, (self.folder / name).stat().st_size

    def _all_of(self, cursor: DuckDBPyConnection, table: str) -> list[str]:
        ((count,),) = cursor.execute(f"SELECT count(*) FROM main.{table}").fetchall()
        known, name = self._added.get(table, (0, ""))
        if count != known:
            if name:
                self._gone.add(name)
            name, _ = self._copy(cursor, table, f"FROM main.{table}")
            self._added[table] = count, name
        return [name] if name else []

    def _upto(self, cursor: DuckDBPyConnection, table: Table, archived: int, stored: int, size: int) -> list[str]:
        files = self._files.setdefault(table.name, [])
        while files and files[0].last <= archived:
            self._gone.add(files.pop(0).name)
        reached = max(self._reached.get(table.name, 0), archived)
        new = f"sequence > {reached} AND sequence <= {stored}"
        ((count,),) = cursor.execute(f"SELECT count(*) FROM {LIVE}.{table.name} WHERE {new}").fetchall()
        if count:
            first = reached
            while files and files[-1].rows <= 2 * count and files[-1].bytes < PIECE_BYTES // 4:
                file = files.pop()
                count, first = count + file.rows, max(file.first, archived)
                self._gone.add(file.name)
            for last in ends(cursor, LIVE, [table], first, stored, size):
                where = f"sequence > {first} AND sequence <= {last}"
                name, written = self._copy(cursor, table.name, f"FROM {LIVE}.{table.name} WHERE {where}")
                files.append(_File(name, first, last, count, written))
                first = last
        self._reached[table.name] = max(stored, reached)
        return [file.name for file in files]


def _names(given: Given) -> list[str]:
    live = [name for names in given.live.values() for name in names]
    return live + [name for versions in given.archive.values() for names in versions for name in names]
