"""Questions in SQL about a database that others can't reach through them.

`harden` closes an instance of DuckDB to everything outside its directories; `Queries` answers one read-only statement at a time
a cursor, within the limits that DuckDB keeps itself. It does not keep all of them: `asked` runs this in a process that the
system limits.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

import duckdb
import pyarrow as pa

from kvplane.services.history.statement import Functions, check
from kvplane.services.history.values import carried
from kvplane.services.history.watch import TICK, Watch
from kvplane.services.protocol.errors import BadRequest, BadSql, DatabaseFailed, QueryLimit, ServiceFault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from duckdb import DuckDBPyConnection

PAGE_BYTES = 1 << 20
ROW_BYTES = 16 << 20
CONCURRENT = 4
PATIENCE = 1.0  # seconds to wait for a place
VECTOR = 2_048  # rows DuckDB makes at a time


def harden(
    connection: DuckDBPyConnection,
    archive: Path,
    *,
    temporary: Path,
    memory: str,
    threads: int,
    spill: str,
    also: Sequence[Path] = (),
) -> None:
    """Close the instance of `connection`, for good, to all files but those in `archive`, `temporary` and `also`.

    `memory` and `spill` are sizes as DuckDB writes them, `2GB`. The writer can still COPY to files in `archive`.
    """
    directories = [path.resolve() for path in (archive, temporary, *also)]
    for path in directories:
        path.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("allowed_directories", [f"{path}/" for path in directories]),
        ("temp_directory", str(directories[1])),
        ("max_temp_directory_size", spill),
        ("memory_limit", memory),
        ("threads", threads),
        ("autoload_known_extensions", False),
        ("autoinstall_known_extensions", False),
        ("allow_community_extensions", False),
        ("allow_unsigned_extensions", False),
        ("allow_extension_repositories", "forbidden"),
        ("allow_parser_override_extension", "default"),
        ("allow_persistent_secrets", False),
        ("allow_unredacted_secrets", False),
        ("python_enable_replacements", False),
        ("python_scan_all_frames", False),
        ("show_behavior", "table"),
        ("max_expression_depth", 250),
        ("enable_external_access", False),
        ("lock_configuration", True),
    ):
        connection.execute(f"SET GLOBAL {name} = {_literal(value)}")


def _literal(value: object) -> str:
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return "'" + str(value).replace("'", "''") + "'"


class Queries:
    """Answers questions about the database of `connection`, a few at a time. Any thread may ask.

    `hidden` are directories that no error may name. Table macros of the owner's must be there before.
    """

    def __init__(
        self,
        connection: DuckDBPyConnection,
        *,
        hidden: Sequence[Path] = (),
        concurrent: int = CONCURRENT,
        functions: Functions | None = None,
    ) -> None:
        self._root = connection.cursor()
        self._opening = threading.Lock()
        self._places = threading.BoundedSemaphore(concurrent)
        self.watch = Watch()
        self._memory = str(self._root.execute("SELECT current_setting('memory_limit')").fetchall()[0][0])
        self._spill = str(self._root.execute("SELECT current_setting('max_temp_directory_size')").fetchall()[0][0])
        self._hidden = sorted({str(form) for path in hidden for form in (path, path.resolve())}, key=len, reverse=True)
        self.functions = Functions.read(self._root) if functions is None else functions
        self._open: set[Result] = set()

    def run(
        self,
        sql: str,
        *,
        seconds: float,
        rows: int,
        parameters: Sequence[object] | Mapping[str, object] = (),
        page_bytes: int = PAGE_BYTES,
        row_bytes: int = ROW_BYTES,
        checked: bool = False,
        spent: float = 0,
    ) -> Result:
        """Start answering `sql`: at most `rows` rows, made in at most `seconds` of work. The caller closes the result.

        `checked` when `statement.check` has already let it pass, and `spent` of the seconds are gone.
        """
        if not self._places.acquire(timeout=PATIENCE):
            raise QueryLimit("busy", "as many queries run as may at a time: ask again in a moment")
        try:
            with self._opening:
                cursor = self._root.cursor()
        except BaseException as fault:
            self._places.release()
            if isinstance(fault, duckdb.Error):
                raise self.fault(fault) from fault
            raise
        result = Result(
            self, cursor, seconds=seconds, left=seconds - spent, rows=rows, page_bytes=page_bytes, row_bytes=row_bytes
        )
        self._open.add(result)
        try:
            result.start(sql, parameters, checked=checked)
        except BaseException:
            result.close()
            raise
        return result

    def close(self) -> None:
        """End every open result. The connection stays its owner's."""
        for result in tuple(self._open):
            result.close()
        self.watch.end()
        self._root.close()

    def forget(self, result: Result) -> None:
        """Give the place of a closed result to the next."""
        self._open.discard(result)
        self._places.release()

    def fault(self, error: BaseException, reason: str = "", seconds: float = 0) -> ServiceFault:
        """The error to raise for an error of DuckDB, or of Arrow that carries one. `reason`: why it was interrupted."""
        text = str(error)
        kind, _, rest = text.partition(" Error: ")
        if isinstance(error, duckdb.FatalException) or kind == "FATAL" or "database has been invalidated" in text:
            return DatabaseFailed("DuckDB gave up on the database; it must be opened anew")
        if isinstance(error, duckdb.InternalException) or kind == "INTERNAL":
            return self._after_internal()
        if kind == "INTERRUPT" or isinstance(error, duckdb.InterruptException):
            return _stopped(reason, seconds)
        if kind == "Out of Memory" or isinstance(error, duckdb.OutOfMemoryException | MemoryError):
            if "max_temp_directory_size" in text:
                return QueryLimit("memory_limit", f"the query needs more than {self._spill} on disk: ask for less")
            return QueryLimit("memory_limit", f"the query needs more than {self._memory} of memory: ask for less")
        if kind in {"IO", "HTTP"} or not isinstance(error, duckdb.Error | pa.ArrowException | OSError):
            return ServiceFault(f"the history could not be read: {self._shown(rest or text)}")
        if kind in {"Permission", "TransactionContext"}:
            return BadSql("only reading the tables and views is allowed: see SHOW TABLES")
        return BadSql(self._shown(rest or text))

    def _after_internal(self) -> ServiceFault:
        try:
            with self._opening, self._root.cursor() as probe:
                probe.execute("SELECT 1").fetchall()
        except duckdb.Error:
            return DatabaseFailed("DuckDB gave up on the database; it must be opened anew")
        return ServiceFault("DuckDB failed on this query by a fault of its own: write it another way")

    def _shown(self, text: str) -> str:
        blocks = [block for block in text.split("\n\n") if block.strip()]
        kept = blocks[:1] + [block for block in blocks[1:2] if block.startswith("LINE ")]
        shown = "\n".join(kept)
        for path in self._hidden:
            shown = shown.replace(path, "<history>")
        return shown


class Result:
    """One answer: an Arrow schema and record batches, made as they are asked for. `limit` says at the end what cut it short."""

    def __init__(
        self,
        queries: Queries,
        cursor: DuckDBPyConnection,
        *,
        seconds: float,
        left: float,
        rows: int,
        page_bytes: int,
        row_bytes: int,
    ) -> None:
        self.limit: QueryLimit | None = None
        self.given = 0
        self._queries = queries
        self._cursor = cursor
        self._seconds = seconds
        self._left = left
        self._rows = rows
        self._page_bytes = page_bytes
        self._row_bytes = row_bytes
        self._lock = threading.RLock()
        self._closed = False
        self._ended = False
        self._reader: pa.RecordBatchReader | None = None
        self._pending: list[pa.RecordBatch] = []
        self._schema = pa.schema([])

    def start(self, sql: str, parameters: Sequence[object] | Mapping[str, object], *, checked: bool = False) -> None:
        """Check the statement and begin to execute it in a read-only transaction."""
        given = dict(parameters) if hasattr(parameters, "keys") else list(parameters)
        with self._working():
            self._cursor.execute("BEGIN TRANSACTION READ ONLY")
            if not checked:
                check(self._cursor, sql, self._queries.functions)
            relation = self._cursor.sql(sql, params=given or None)
            if relation is None:
                raise BadSql("only reading is allowed: send a SELECT")
            self._reader = carried(relation).to_arrow_reader(VECTOR)
            self._schema = self._reader.schema

    @property
    def left(self) -> float:
        """Seconds of work that it may still take."""
        return self._left

    @property
    def schema(self) -> pa.Schema:
        """The answer's columns."""
        return self._schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        """The next batch, of at most `page_bytes` as IPC, or of one row of at most `row_bytes`."""
        with self._lock:
            try:
                batch = self._batch()
                while batch is not None and not batch.num_rows:
                    batch = self._batch()
            except ServiceFault:
                self.close()
                raise
            if batch is not None and batch.num_rows > self._rows - self.given:
                batch = batch.slice(0, self._rows - self.given)
                self._ended = True
                sentence = f"these are the first {self._rows} rows of more: raise the limit or ask for less"
                self.limit = QueryLimit("row_limit", sentence)
            if self._ended:
                self.close()
            if batch is None or not batch.num_rows:
                raise StopIteration
            self.given += batch.num_rows
            return batch

    def close(self) -> None:
        """Stop what runs, and free the cursor, its snapshot and its place. Twice is once."""
        while not self._lock.acquire(timeout=TICK):
            self._queries.watch.stop("closed", self)
        try:
            if self._closed:
                return
            self._closed = True
            self._pending.clear()
            if self._reader is not None:
                # DuckDB may compute what comes next, and closing waits until it is done.
                self._cursor.interrupt()
                with suppress(Exception):
                    self._reader.close()
            self._reader = None
            with suppress(duckdb.Error):
                self._cursor.rollback()
            with suppress(duckdb.Error):
                self._cursor.close()
            self._queries.forget(self)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def interrupt(self) -> None:
        """Ask DuckDB to stop; it does between two of its steps. Called by the watch while this result works."""
        self._cursor.interrupt()

    def _batch(self) -> pa.RecordBatch | None:
        """The next piece that is small enough, or nothing."""
        if self._ended:
            return None
        if not self._pending:
            with self._working():
                made = next(self._reader, None) if self._reader is not None else None
            if made is None:
                self._ended = True
                return None
            self._pending.append(made)
        while True:
            batch = self._pending.pop()
            size = pa.ipc.get_record_batch_size(batch)
            if size <= self._page_bytes or (batch.num_rows < 2 and size <= self._row_bytes):
                return batch
            if batch.num_rows < 2:
                sentence = f"one row has {size} bytes, at most {self._row_bytes} are given: ask for fewer columns"
                raise QueryLimit("memory_limit", sentence)
            half = batch.num_rows // 2
            self._pending += [batch.slice(half), batch.slice(0, half)]

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Time that counts. Errors of DuckDB leave as errors of the services."""
        with self._lock:
            if self._closed:
                raise BadRequest("the result is closed: ask again")
            began = time.monotonic()
            self._queries.watch.begin(self, began + self._left)
            failed: BaseException | None = None
            try:
                yield
            except (duckdb.Error, pa.ArrowException, OSError, MemoryError, RuntimeError) as error:
                failed = error
            finally:
                reason = self._queries.watch.finish(self)
                self._left -= time.monotonic() - began
            if failed is not None:
                raise self._queries.fault(failed, reason, self._seconds) from failed
            if reason or self._left <= 0:
                raise _stopped(reason or "time", self._seconds)


def _stopped(reason: str, seconds: float) -> ServiceFault:
    if reason == "time":
        return QueryLimit("time_limit", f"stopped after {seconds:g} s: raise the limit with --timeout or ask for less")
    return BadRequest("the query was stopped: ask again")
