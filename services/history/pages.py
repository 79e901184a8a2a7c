"""SQL over NATS: a result goes out in pages, each as large as a message may be.

A result that is asked for no more is closed after a while: it holds a snapshot of the database and one of a few places.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import anyio.to_thread
import msgspec
import pyarrow as pa
from msgspec import Struct

from kvplane.services.history.plain import plain
from kvplane.services.history.query import PAGE_BYTES, ROW_BYTES, Queries, harden
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest, DatabaseFailed, QueryLimit

if TYPE_CHECKING:
    from kvplane.services.history.ingest import Ingest
    from kvplane.services.history.query import Result

IDLE_SECONDS = 30.0
"""So long after its last page a result is closed."""
SHARE = 4
"""A page is no larger than this part of a message: there are the columns' names, too, and MessagePack of rows may be twice
as large as the JSON by which they are measured."""


_encode = msgspec.json.Encoder().encode


class Limits(Struct, frozen=True, kw_only=True):
    """What a query may take: seconds of work, rows, bytes of memory for all of them, bytes on the disk."""

    seconds: float = 30.0
    rows: int = 1_000_000
    memory: int = 2_000_000_000
    spill: int = 10_000_000_000
    threads: int = 2


class _Open:
    """A result that has more pages."""

    def __init__(self, result: Result, request: messages.SqlRequest, stored: int, most: int) -> None:
        self.result = result
        self.page_bytes = min(PAGE_BYTES, most // SHARE)
        self.row_bytes = most * 5 // 16
        """Of one row as JSON."""
        self.rows: deque[list[Any]] = deque()
        """Plain rows that were made and not yet sent."""
        self.request = request
        self.stored = stored
        self.asked = anyio.current_time()
        self.turn = anyio.Lock()


class Pages:
    """The queries of one historian. `subject` is where its results' next pages are asked for."""

    def __init__(self, ingest: Ingest, subject: str, limits: Limits | None) -> None:
        self.subject = subject
        self.limits = limits or Limits()
        self._ingest = ingest
        self._open: dict[str, _Open] = {}
        self._queries: Queries | None = None
        ingest.opened = self._opened
        ingest.closing = self._closing

    @property
    def open(self) -> int:
        """Results that have more pages."""
        return len(self._open)

    def _opened(self) -> None:
        """The database was opened: close it to everything outside, and take queries."""
        store, limits = self._ingest.store, self.limits
        harden(
            store.connection, store.archive, temporary=store.spill, memory=f"{limits.memory}B", threads=limits.threads,
            spill=f"{limits.spill}B",
        )  # fmt: skip
        self._queries = Queries(store.connection, hidden=[store.folder])

    def _closing(self) -> None:
        """The database is going to be closed."""
        queries, self._queries = self._queries, None
        if queries is not None:
            queries.close()

    async def run(self) -> None:
        """Close what nobody asks for, until cancelled."""
        while True:
            await anyio.sleep(IDLE_SECONDS / 10)
            before = anyio.current_time() - IDLE_SECONDS
            idle = [name for name, kept in self._open.items() if kept.asked < before and not kept.turn.locked()]
            for name in idle:
                await self._close(name)

    async def ask(self, request: messages.SqlRequest) -> messages.SqlAnswer:
        """The first page of a query's result. Raises `BadSql`, `QueryLimit` and other faults."""
        queries = self._queries
        if queries is None:
            raise DatabaseFailed("the history is being opened anew; ask again in a moment")
        if not request.sql.strip():
            raise BadRequest("sql is empty; try: SHOW TABLES")
        limits = self.limits
        stored = self._ingest.stored
        most = self._ingest.client.max_payload
        try:
            result = await anyio.to_thread.run_sync(
                partial(
                    queries.run, request.sql, seconds=min(request.seconds or limits.seconds, limits.seconds),
                    rows=min(request.rows or limits.rows, limits.rows),
                    page_bytes=min(PAGE_BYTES, most // SHARE), row_bytes=min(ROW_BYTES, most // 2),
                )
            )  # fmt: skip
        except DatabaseFailed:
            self._ingest.broken()
            raise
        names = len(_stream(result.schema, [])) + sum(len(field.name.encode()) + 64 for field in result.schema)
        if names > most // SHARE:
            await anyio.to_thread.run_sync(result.close)
            raise QueryLimit(
                "memory_limit", f"the names of the columns take {names} bytes, at most {most // SHARE} are given: ask for "
                "fewer columns, or name them with AS",
            )  # fmt: skip
        name = uuid4().hex
        self._open[name] = _Open(result, request, stored, most)
        return await self._page(name)

    async def more(self, request: messages.SqlNextRequest) -> messages.SqlAnswer:
        """The next page."""
        kept = self._open.get(request.result)
        if kept is None:
            raise BadRequest(
                f"there is no such result; it ended, or nobody asked for its next page in {IDLE_SECONDS:g} s"
            )
        if request.close:
            await self._close(request.result)
            return messages.SqlAnswer(columns=[], stored=kept.stored)
        return await self._page(request.result)

    async def _page(self, name: str) -> messages.SqlAnswer:
        kept = self._open[name]
        try:
            async with kept.turn:
                answer, ended = await anyio.to_thread.run_sync(self._make, name, kept)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._close(name)
            raise
        kept.asked = anyio.current_time()
        if ended:
            await self._close(name)
        return answer

    def _make(self, name: str, kept: _Open) -> tuple[messages.SqlAnswer, bool]:
        """A page, and whether it is the last one. Raises `QueryLimit` when rows beyond the limit were to come."""
        result, schema = kept.result, kept.result.schema
        rows: list[list[Any]] | None = None
        data = b""
        if kept.request.form == "arrow":
            batches, ended = _batches(kept)
            data, found = _stream(schema, batches), len(batches)
        else:
            rows, ended = _plain_rows(kept)
            found = len(rows)
        if not found and result.limit is not None:
            raise result.limit
        if found and result.limit is not None:
            ended = False
        answer = messages.SqlAnswer(
            columns=[messages.Column(field.name, str(field.type)) for field in schema],
            rows=rows, data=data, stored=kept.stored, result="" if ended else name, next="" if ended else self.subject,
        )  # fmt: skip
        return answer, ended

    async def _close(self, name: str) -> None:
        kept = self._open.pop(name, None)
        if kept is not None:
            await anyio.to_thread.run_sync(kept.result.close)


def _batches(kept: _Open) -> tuple[list[pa.RecordBatch], bool]:
    """The batches of a page, and whether they are the last."""
    batches, size = [], 0
    for batch in kept.result:
        batches.append(batch)
        size += pa.ipc.get_record_batch_size(batch)
        # Another one of this size would still fit.
        if size > kept.page_bytes // 2:
            return batches, False
    return batches, True


def _plain_rows(kept: _Open) -> tuple[list[list[Any]], bool]:
    """The rows of a page as plain data, and whether they are the last: names and numbers may be far longer than in Arrow."""
    rows: list[list[Any]] = []
    left = kept.page_bytes
    while True:
        while not kept.rows:
            batch = next(kept.result, None)
            if batch is None:
                return rows, True
            kept.rows.extend([plain(value) for value in row.values()] for row in _rows(batch))
        size = len(_encode(kept.rows[0])) + 1
        if size > left and rows:
            return rows, False
        if size > kept.row_bytes:
            raise QueryLimit(
                "memory_limit", f"one row has {size} bytes as JSON, at most {kept.row_bytes} are given: ask for fewer "
                "columns, or for Arrow",
            )  # fmt: skip
        left -= size
        rows.append(kept.rows.popleft())


def _rows(batch: pa.RecordBatch) -> list[dict[int, Any]]:
    """Rows by the columns' places: two columns may have one name."""
    places = [str(place) for place in range(batch.num_columns)]
    found: list[dict[int, Any]] = batch.rename_columns(places).to_pylist()
    return found


def _stream(schema: pa.Schema, batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data
