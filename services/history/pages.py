"""SQL over NATS: a result goes out in pages, each as large as a message may be.

A result that is asked for no more is closed after a while: it holds a snapshot of the database and one of a few places.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import anyio.to_thread
import pyarrow as pa
from msgspec import Struct

from services import api
from services.errors import BadRequest, DatabaseFailed
from services.history.plain import plain
from services.history.query import PAGE_BYTES, Queries, harden

if TYPE_CHECKING:
    from services.history.ingest import Ingest
    from services.history.query import Result

IDLE_SECONDS = 30.0
"""So long after its last page a result is closed."""
ROWS_SHARE = 8
"""Rows as plain data may be so many times as large as in Arrow."""


class Limits(Struct, frozen=True, kw_only=True):
    """What a query may take: seconds of work, rows, bytes of memory for all of them, bytes on the disk."""

    seconds: float = 30.0
    rows: int = 1_000_000
    memory: int = 2_000_000_000
    spill: int = 10_000_000_000
    threads: int = 2


class _Open:
    """A result that has more pages."""

    def __init__(self, result: Result, request: api.SqlRequest, stored: int, page_bytes: int) -> None:
        self.result = result
        self.page_bytes = page_bytes
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
            for name in [name for name, kept in self._open.items() if kept.asked < before]:
                await self._close(name)

    async def ask(self, request: api.SqlRequest) -> api.SqlAnswer:
        """The first page of a query's result. Raises `BadSql`, `QueryLimit` and other faults."""
        queries = self._queries
        if queries is None:
            raise DatabaseFailed("the history is being opened anew; ask again in a moment")
        if not request.sql.strip():
            raise BadRequest("sql is empty; try: SHOW TABLES")
        limits = self.limits
        stored = self._ingest.stored
        size = min(PAGE_BYTES, self._ingest.client.max_payload // 2) // (1 if request.form == "arrow" else ROWS_SHARE)
        try:
            result = await anyio.to_thread.run_sync(
                partial(
                    queries.run, request.sql, seconds=min(request.seconds or limits.seconds, limits.seconds),
                    rows=min(request.rows or limits.rows, limits.rows),
                    page_bytes=size,
                )
            )  # fmt: skip
        except DatabaseFailed:
            self._ingest.broken()
            raise
        name = uuid4().hex
        self._open[name] = _Open(result, request, stored, size)
        return await self._page(name)

    async def more(self, request: api.SqlNextRequest) -> api.SqlAnswer:
        """The next page."""
        kept = self._open.get(request.result)
        if kept is None:
            raise BadRequest(
                f"there is no such result; it ended, or nobody asked for its next page in {IDLE_SECONDS:g} s"
            )
        if request.close:
            await self._close(request.result)
            return api.SqlAnswer(columns=[], stored=kept.stored)
        return await self._page(request.result)

    async def _page(self, name: str) -> api.SqlAnswer:
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

    def _make(self, name: str, kept: _Open) -> tuple[api.SqlAnswer, bool]:
        """A page, and whether it is the last one. Raises `QueryLimit` when rows beyond the limit were to come."""
        result, batches, size, ended = kept.result, [], 0, True
        for batch in result:
            batches.append(batch)
            size += pa.ipc.get_record_batch_size(batch)
            # Another one of this size would still fit.
            if size > kept.page_bytes // 2:
                ended = False
                break
        if not batches and result.limit is not None:
            raise result.limit
        if batches and result.limit is not None:
            ended = False
        schema = result.schema
        arrow = kept.request.form == "arrow"
        answer = api.SqlAnswer(
            columns=[api.Column(field.name, str(field.type)) for field in schema],
            rows=[] if arrow else [[plain(value) for value in row.values()] for batch in batches for row in _rows(batch)],
            data=_stream(schema, batches) if arrow else b"",
            stored=kept.stored, result="" if ended else name, next="" if ended else self.subject,
        )  # fmt: skip
        return answer, ended

    async def _close(self, name: str) -> None:
        kept = self._open.pop(name, None)
        if kept is not None:
            await anyio.to_thread.run_sync(kept.result.close)


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
