"""A process that answers one question in SQL and ends.

It has a database of its own, in memory, in which the tables are views over files: those of the archive, and live rows that the
historian wrote to files for it. So nothing that a question does can be felt by the one who writes; and whatever DuckDB does not
count or can't interrupt, the system does (`services.process.confined`).
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import msgspec
import pyarrow as pa

from kvplane.projections.history.store import make_table_view, make_view, over_files
from kvplane.projections.history.tables import ADDED, TABLES
from kvplane.projections.history.views import VIEWS
from kvplane.services.history import question
from kvplane.services.history.plain import plain
from kvplane.services.history.query import Queries, harden
from kvplane.services.history.question import Failed, Given, Needed, Page
from kvplane.services.history.statement import Functions, Relations, check
from kvplane.services.history.values import rows_of
from kvplane.services.process.confined import Within
from kvplane.services.protocol.errors import QueryLimit, ServiceFault
from kvplane.services.protocol.messages import Column

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvplane.projections.history.tables import Table
    from kvplane.services.history.query import Result
    from kvplane.services.history.question import Question

SHARE = 4
"""A page is no larger than this part of a message: there are the columns' names, too, and MessagePack of rows may be twice
as large as the JSON by which they are measured."""

_ALL = {table.name: table for table in (*TABLES, *ADDED)}
_encode = msgspec.json.Encoder().encode


def _under() -> dict[str, set[str]]:
    """Tables and views that each one reads, itself included, by the names in the views' queries."""
    under = {name: {name} for name in _ALL}
    words = {view.name: {view.name, *re.findall(r"\w+", view.query)} for view in VIEWS}
    for _ in words:
        for name, found in words.items():
            under[name] = {name}.union(*(under.get(word, set()) for word in found))
    return under


def _catalog(
    connection: duckdb.DuckDBPyConnection, names: Collection[str], given: Given, asked: Question | None
) -> None:
    """Make tables' views, and views, of these names; when a name is DuckDB's own, all of them, with what they mean."""
    whole = not _UNDER.keys() >= set(names)
    needed = _UNDER.keys() if whole else set().union(*(_UNDER[name] for name in names))
    for table in _ALL.values():
        if table.name in needed:
            make_table_view(connection, table, _filled(table, given, asked), commented=whole)
    for view in VIEWS:
        if view.name in needed:
            make_view(connection, view, commented=whole)


def _learn() -> tuple[Functions, Relations]:
    with duckdb.connect(config={"threads": 1}) as connection:
        _catalog(connection, ["all"], Given(archived=0, stored=0, archive={}, live={}), None)
        return Functions.read(connection), Relations.read(connection)


_UNDER = _under()


def answer(talking: int, memory: int, cpu: float) -> None:
    """Answer the question that is asked first, page after page."""
    within = Within(talking, memory, cpu)
    asked = question.decode_question(within.receive())
    try:
        _answer(within, asked)
    except ServiceFault as error:
        within.send(question.encode(Failed(error.status, error.code, str(error))))


def _answer(within: Within, asked: Question) -> None:
    began = time.monotonic()
    within.allow(asked.seconds)
    connection = duckdb.connect(config={"threads": asked.threads})
    harden(
        connection, Path(asked.archive), temporary=Path(asked.temporary), also=[Path(asked.live)],
        memory=f"{asked.memory}B", threads=asked.threads, spill=f"{asked.spill}B",
    )  # fmt: skip
    queries = Queries(connection, hidden=[Path(path) for path in asked.hidden], functions=_FUNCTIONS)
    try:
        named = check(connection, asked.sql, _FUNCTIONS, _RELATIONS)
        within.allow(math.inf)
        spent = time.monotonic() - began
        read = set().union(*(_UNDER.get(name, set()) for name in named)) & _ALL.keys()
        within.send(question.encode(Needed(sorted(read))))
        given = question.decode_given(within.receive())
        within.allow(asked.seconds - spent)
        _catalog(connection, named, given, asked)
    except duckdb.Error as error:
        raise queries.fault(error) from error
    result = queries.run(
        asked.sql, seconds=asked.seconds, rows=asked.rows, page_bytes=asked.page_bytes, row_bytes=asked.row_bytes,
        checked=True, spent=spent,
    )  # fmt: skip
    _check_names(result, asked)
    pages = _Pages(result, asked)
    while True:
        page = pages.make()
        within.allow(math.inf)
        within.send(question.encode(page))
        within.receive()
        within.allow(result.left)


def _filled(table: Table, given: Given, asked: Question | None) -> str:
    columns = ", ".join(f'NULL::{column.sql} AS "{column.name}"' for column in table.columns)
    query = f"SELECT {columns} WHERE false"
    if asked is None:
        return query
    live = given.live.get(table.name)
    if live:
        query = over_files(query, Path(asked.live), [live])
        if table.columns[0].name == "sequence":
            # A file may begin with rows that the archive has got since.
            query += f" WHERE sequence > {given.archived}"
    return over_files(query, Path(asked.archive), given.archive.get(table.name, ()))


def _check_names(result: Result, asked: Question) -> None:
    names = len(_stream(result.schema, [])) + sum(len(field.name.encode()) + 64 for field in result.schema)
    most = asked.message_bytes // SHARE
    if names > most:
        raise QueryLimit(
            "memory_limit", f"the names of the columns take {names} bytes, at most {most} are given: ask for "
            "fewer columns, or name them with AS",
        )  # fmt: skip


class _Pages:
    """The pages of a result."""

    def __init__(self, result: Result, asked: Question) -> None:
        self._result = result
        self._arrow = asked.form == "arrow"
        self._page_bytes = asked.page_bytes
        self._row_bytes = asked.message_bytes * 5 // 16
        """Of one row as JSON."""
        self._rows: deque[list[Any]] = deque()
        """Plain rows that were made and not yet sent."""

    def make(self) -> Page:
        """The next one. Raises `QueryLimit` when rows beyond the limit were to come."""
        result, schema = self._result, self._result.schema
        rows: list[list[Any]] | None = None
        data = b""
        if self._arrow:
            batches, ended = self._batches()
            data, found = _stream(schema, batches), len(batches)
        else:
            rows, ended = self._plain_rows()
            found = len(rows)
        if not found and result.limit is not None:
            raise result.limit
        if found and result.limit is not None:
            ended = False
        columns = [Column(field.name, str(field.type)) for field in schema]
        return Page(columns=columns, rows=rows, data=data, ended=ended)

    def _batches(self) -> tuple[list[pa.RecordBatch], bool]:
        """The batches of a page, and whether they are the last."""
        batches, size = [], 0
        for batch in self._result:
            batches.append(batch)
            size += pa.ipc.get_record_batch_size(batch)
            # Another one of this size would still fit.
            if size > self._page_bytes // 2:
                return batches, False
        return batches, True

    def _plain_rows(self) -> tuple[list[list[Any]], bool]:
        """The rows of a page as plain data, and whether they are the last. They may be far longer than in Arrow."""
        rows: list[list[Any]] = []
        left = self._page_bytes
        while True:
            while not self._rows:
                batch = next(self._result, None)
                if batch is None:
                    return rows, True
                self._rows.extend([plain(value) for value in row] for row in rows_of(batch))
            size = len(_encode(self._rows[0])) + 1
            if size > left and rows:
                return rows, False
            if size > self._row_bytes:
                raise QueryLimit(
                    "memory_limit", f"one row has {size} bytes as JSON, at most {self._row_bytes} are given: ask for fewer "
                    "columns, or for Arrow",
                )  # fmt: skip
            left -= size
            rows.append(self._rows.popleft())


def _stream(schema: pa.Schema, batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


# It takes 200 ms: once, before any process is forked.
_FUNCTIONS, _RELATIONS = _learn()
