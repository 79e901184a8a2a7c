"""The history's file: rows and the sequence up to which they are complete, in one transaction.

    <folder>/history.duckdb     the live part, and the list of archived files
    <folder>/archive/           closed hours as Parquet, see `archive`
    <folder>/spill/             what queries can't hold in memory

One process has the file open. Whatever is killed, the next one finds rows up to `sequence` and none beyond it. A file that
another process holds, that is of another version or fleet, or that can't be read, is a `BadHistory` that says what to do.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import duckdb

from kvplane.projections.errors import BadHistory, HistoryFull
from kvplane.projections.history.rows import MATCHED_SECONDS, Routed, Waiting
from kvplane.projections.history.tables import ADDED, LACKING, TABLES, VERSION
from kvplane.projections.history.views import VIEWS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import pyarrow as pa

    from kvplane.projections.history.rows import Rows
    from kvplane.projections.history.tables import Table
    from kvplane.projections.history.views import View

FILE = "history.duckdb"
ARCHIVE = "archive"
SPILL = "spill"
LIVE = "live"
"""Schema of the tables that are not archived yet; their names in `main` are views over live and archived rows."""

_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    # At each checkpoint the columns that grow are written again.
    "checkpoint_threshold": "256MB",
}
_NS = 1_000_000_000


class Checkpoint(NamedTuple):
    """How far the history is: sequence of the last commit that it holds, its time, and the last that is archived."""

    sequence: int
    time: int
    archived: int


class Store:
    """An open history. Not to be used by two threads at once; `cursor` gives connections of their own."""

    def __init__(self, folder: Path, fleet: str) -> None:
        # Views name archived files by whole paths.
        self.folder = folder = folder.absolute()
        self.archive = folder / ARCHIVE
        self.spill = folder / SPILL
        self.fleet = fleet
        self.raised = False
        """Whether the file was of a former version and has the columns of this one since it was opened."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.archive.mkdir(mode=0o700, exist_ok=True)
            self.connection = self._open()
            # Not before: another process may have the history open, and spill there.
            shutil.rmtree(self.spill, ignore_errors=True)
            self.spill.mkdir(mode=0o700, exist_ok=True)
            self._for_its_owner_alone()
        except OSError as error:
            raise BadHistory(
                f"the history's folder can't be written ({error.strerror}); choose another with --history"
            ) from None

    def _for_its_owner_alone(self) -> None:
        """DuckDB makes files that all may read, and so did an older kvplane with folders."""
        modes = {self.folder: 0o700, self.archive: 0o700} | dict.fromkeys(self.folder.glob(f"{FILE}*"), 0o600)
        for path, mode in modes.items():
            # A volume may be somebody else's; who may look into it is his to say.
            with suppress(PermissionError):
                path.chmod(mode)

    def _open(self) -> duckdb.DuckDBPyConnection:
        path = self.folder / FILE
        try:
            connection = duckdb.connect(str(path), config=_CONFIG)
        except duckdb.Error as error:
            raise _why(path, error) from None
        try:
            self._prepare(connection)
        except duckdb.Error as error:
            connection.close()
            raise _why(path, error) from None
        except BadHistory:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        known = connection.execute(
            "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'main' AND table_name = 'checkpoint'"
        ).fetchall()[0][0]
        if known:
            # Another version may have other columns.
            row = (connection.sql("SELECT * FROM checkpoint").to_arrow_table().to_pylist() or [{}])[0]
            version = row.get("version")
            older = version in LACKING
            if version != VERSION and not older:
                raise BadHistory(
                    f"the history in {self.folder.name} is of version {version}, this kvplane reads {VERSION}; "
                    "`kvplane history rebuild` makes it again from the log and the archive"
                )
            if row["fleet"] != self.fleet:
                raise BadHistory(
                    f"the history in {self.folder.name} is of fleet {row['fleet']!r}, not {self.fleet!r}; choose another "
                    "folder with --history"
                )
            self._check_archive(connection)
            connection.execute("BEGIN")
            if older:
                self._raise_version(connection, version)
            # Those that came later.
            for table in TABLES:
                connection.execute(table.ddl(LIVE))
            self.refresh(connection)
            connection.execute("COMMIT")
            return
        connection.execute("BEGIN")
        for table in ADDED:
            connection.execute(table.ddl("main"))
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {LIVE}")
        for table in TABLES:
            connection.execute(table.ddl(LIVE))
        connection.execute(
            "CREATE TABLE archive_files (name VARCHAR, table_name VARCHAR, day DATE, first_sequence UBIGINT, "
            "last_sequence UBIGINT, row_count UBIGINT, bytes UBIGINT, version INTEGER)"
        )
        connection.execute(
            "CREATE TABLE checkpoint (version INTEGER, fleet VARCHAR, sequence UBIGINT, time UBIGINT, archived UBIGINT)"
        )
        connection.execute("INSERT INTO checkpoint VALUES (?, ?, 0, 0, 0)", [VERSION, self.fleet])
        self.refresh(connection)
        connection.execute("COMMIT")

    def _raise_version(self, connection: duckdb.DuckDBPyConnection, version: int) -> None:
        """Give a history of a former version the columns that it lacks; files of the archive stay as they are."""
        for table, column in LACKING[version]:
            connection.execute(f"ALTER TABLE {LIVE}.{table.name} ADD COLUMN {column.name} {column.sql}")
        if version == 1:
            connection.execute("ALTER TABLE archive_files ADD COLUMN version INTEGER DEFAULT 1")
        connection.execute("UPDATE checkpoint SET version = ?", [VERSION])
        self.raised = True

    def _check_archive(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Raise `BadHistory` when listed files are not there, or not as long as they were."""
        gone = []
        for name, size in connection.execute("SELECT name, bytes FROM archive_files ORDER BY name").fetchall():
            path = self.archive / name
            if not path.exists() or path.stat().st_size != size:
                gone.append(name)
        if gone:
            raise BadHistory(
                f"{len(gone)} files of the archive are missing or cut off, such as {gone[0]}; restore them, or let `kvplane "
                "history rebuild` make the history again"
            )

    def refresh(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Make the views over live and archived rows anew; in the transaction that changes the list of archived files."""
        files = archived_files(connection)
        for table in TABLES:
            query = over_files(f"SELECT * FROM {LIVE}.{table.name}", self.archive, files.get(table.name, ()))
            make_table_view(connection, table, query)
        for view in VIEWS:
            make_view(connection, view)

    @property
    def checkpoint(self) -> Checkpoint:
        """How far the history is."""
        row = self.connection.execute("SELECT sequence, time, archived FROM checkpoint").fetchall()[0]
        return Checkpoint(*row)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of one's own to the same history, for another thread."""
        return self.connection.cursor()

    def write(self, rows: Rows, *, time: int) -> None:
        """Store rows and the new checkpoint; `time` is the log's at the last of them.

        Raises `HistoryFull` when the disk has no space, and `BadHistory` when the file can't be written any more. Nothing
        is stored then, and after `reopen` the same rows may be tried again.
        """
        tables = rows.tables()
        try:
            connection = self.connection
            connection.execute("BEGIN")
            (stored,) = connection.execute("SELECT sequence FROM checkpoint").fetchall()[0]
            if stored >= rows.last:
                # It was stored after all, and only the answer was lost.
                connection.execute("ROLLBACK")
                return
            if stored + 1 < rows.first:
                raise BadHistory(f"commits {stored + 1} to {rows.first - 1} were never handed to the history")
            for name, table in tables.items():
                connection.register("batch", table)
                connection.execute(f"INSERT INTO {LIVE}.{name} SELECT * FROM batch")
                connection.unregister("batch")
            connection.execute("UPDATE checkpoint SET sequence = ?, time = ?", [rows.last, time])
            connection.execute("COMMIT")
        except duckdb.Error as error:
            raise fault(error, self.folder / FILE) from error

    def add(self, name: str, rows: pa.Table) -> None:
        """Add rows to one of the tables that do not follow from the log. Raises as `write` does."""
        table = next(table for table in ADDED if table.name == name)
        try:
            self.connection.register("batch", rows.cast(table.schema))
            self.connection.execute(f"INSERT INTO main.{name} SELECT * FROM batch")
            self.connection.unregister("batch")
        except duckdb.Error as error:
            raise fault(error, self.folder / FILE) from error

    def reopen(self) -> None:
        """Open the file anew, after it failed."""
        self.close()
        self.connection = self._open()

    def close(self) -> None:
        """Close the file."""
        try:
            self.connection.close()
        except duckdb.Error:
            # What failed before may fail again; whatever was committed is in the file or its log.
            return

    def begin_at(self, sequence: int, time: int) -> None:
        """Let an empty history begin behind a sequence; `time` is the log's there."""
        self.connection.execute(
            "UPDATE checkpoint SET sequence = ?, time = ?, archived = ? WHERE sequence = 0", [sequence, time, sequence]
        )

    def waiting(self) -> Waiting:
        """Decisions without a completion at the checkpoint, as `Rows.add` wants them."""
        waiting = Waiting()
        since = self.checkpoint.time // 1000 - MATCHED_SECONDS * 1_000_000
        found = self.connection.execute(
            """
            WITH recent AS (
              SELECT request, sequence, event, time, model, policy, "match" * coalesce(block_size, 0) AS predicted
              FROM decisions WHERE epoch_us(time) >= ?
              QUALIFY row_number() OVER (PARTITION BY request ORDER BY sequence DESC, event DESC) = 1
            ), over AS (
              SELECT request, max((sequence, event)) AS last FROM completions WHERE epoch_us(time) >= ? GROUP BY request
            )
            SELECT r.request, r.sequence, epoch_us(r.time), coalesce(c.nanos, 0), r.model, r.policy, r.predicted
            FROM recent r LEFT JOIN over USING (request) LEFT JOIN commits c ON c.sequence = r.sequence
            WHERE over.last IS NULL OR over.last < (r.sequence, r.event)
            ORDER BY r.sequence, r.event
            """,
            [since, since],
        ).fetchall()
        for request, sequence, time, nanos, model, policy, predicted in found:
            waiting.put(request, Routed(sequence, time * 1000 + nanos, model, policy, predicted))
        return waiting

    def content(self) -> dict[str, tuple[int, int]]:
        """Rows of each table and a checksum of what they say, in no order: equal for equal histories."""
        found = {}
        for table in TABLES:
            row = self.connection.execute(
                f"SELECT count(*), coalesce(bit_xor(hash(t)), 0) FROM {table.name} t"
            ).fetchall()[0]
            found[table.name] = (int(row[0]), int(row[1]))
        return found

    def fetch(self, query: str) -> pa.Table:
        """What a query of our own gives, all at once."""
        return self.connection.sql(query).to_arrow_table()


def archived_files(connection: duckdb.DuckDBPyConnection) -> dict[str, list[list[str]]]:
    """Names of the archived files by table; those of one version, which have the same columns, together, by age."""
    found: dict[str, list[list[str]]] = {}
    for table, names in connection.execute(
        "SELECT table_name, list(name ORDER BY first_sequence) FROM archive_files GROUP BY table_name, version "
        "ORDER BY table_name, version"
    ).fetchall():
        found.setdefault(table, []).append(names)
    return found


def over_files(query: str, folder: Path, files: Iterable[Iterable[str]]) -> str:
    """A query that gives the rows of files beside its own; `files` are names in the folder, grouped by their columns."""
    for names in files:
        # To look into each of them would make every query slow.
        paths = ", ".join("'" + _quoted(str(folder / name)) + "'" for name in names)
        query += f" UNION ALL BY NAME SELECT * FROM read_parquet([{paths}], hive_partitioning = false)"
    return query


def make_table_view(connection: duckdb.DuckDBPyConnection, table: Table, query: str, *, commented: bool = True) -> None:
    """Make, or make anew, what is asked under a table's name: what this query gives."""
    connection.execute(f"CREATE OR REPLACE VIEW main.{table.name} AS {query}")
    if commented:
        _comment(connection, table.name, table.meaning, [(c.name, c.meaning) for c in table.columns])


def make_view(connection: duckdb.DuckDBPyConnection, view: View, *, commented: bool = True) -> None:
    """Make, or make anew, a view that answers a frequent question, over those of the tables."""
    connection.execute(f"CREATE OR REPLACE VIEW main.{view.name} AS {view.query}")
    if commented:
        _comment(connection, view.name, view.meaning, view.columns)


def _comment(
    connection: duckdb.DuckDBPyConnection, view: str, meaning: str, columns: Iterable[tuple[str, str]]
) -> None:
    connection.execute(f"COMMENT ON VIEW main.{view} IS '{_quoted(meaning)}'")
    for name, about in columns:
        connection.execute(f"COMMENT ON COLUMN main.{view}.\"{name}\" IS '{_quoted(about)}'")


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _why(path: Path, error: duckdb.Error) -> BadHistory:
    """A file that can't be opened, in a sentence."""
    found = fault(error, path)
    if isinstance(found, HistoryFull):
        return found
    if "Could not set lock" in str(error):
        return BadHistory(
            f"another process has the history open ({path.parent.name}/{path.name}); ask it with `kvplane sql`, or stop it"
        )
    return BadHistory(
        f"{path.name} can't be opened: {_line(error, path)}; `kvplane history rebuild` makes it again from the log and the "
        "archive"
    )


def _line(error: duckdb.Error | OSError, path: Path) -> str:
    return str(error).partition("\n")[0].replace(str(path), path.name)


def fault(error: duckdb.Error | OSError, path: Path) -> BadHistory:
    """What DuckDB or the system raised while it read or wrote, in a sentence: `HistoryFull` or `BadHistory`."""
    text = str(error)
    if "No space left" in text or "disk is full" in text.lower() or os.strerror(28) in text:
        return HistoryFull(f"the disk of the history is full ({_line(error, path)}); make space, it goes on by itself")
    return BadHistory(
        f"the history can't be read or written: {_line(error, path)}; if that stays so, `kvplane history rebuild` makes it "
        "again"
    )
