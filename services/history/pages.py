"""SQL over NATS: a result goes out in pages, each as large as a message may be.

Every question is answered by a process of its own (`asked`), which the system limits and which ends with its last page. They
are few, and given fairly (`places`).
"""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import anyio.to_thread
import structlog
from msgspec import Struct

from kvplane.projections.errors import BadHistory, HistoryFull
from kvplane.services.history import question
from kvplane.services.history.live_rows import LiveRows
from kvplane.services.history.places import CONCURRENT, IDLE_SECONDS, Places
from kvplane.services.history.query import PAGE_BYTES, ROW_BYTES, harden
from kvplane.services.history.question import Failed, Given, Needed, Page, Question
from kvplane.services.history.statement import LONGEST
from kvplane.services.process.confined import Confined, Forkserver, Killed
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest, BadSql, DatabaseFailed, QueryLimit, Refused
from kvplane.services.rpc.asker import asker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvplane.services.history.ingest import Ingest
    from kvplane.services.history.places import Place

SHARE = 4
"""A page is no larger than this part of a message, see `asked`."""
OWN_BYTES = 256 << 20
"""What a process may take beside the memory that DuckDB counts: values as it makes them, and the page that goes out."""
ENDED_KNOWN = 1000
"""Results whose places were taken back and of which the reason is kept."""
OWN_SECONDS = 10.0
"""How long a process may compute beside what its query may take: to begin, and to stop by itself."""

_WORK = "kvplane.services.history.asked:answer"
_log = structlog.get_logger("kvplane.history")
FORKSERVER = Forkserver("kvplane.services.history.asked")
"""What processes that answer are forked from, for all historians of this process."""


class Limits(Struct, frozen=True, kw_only=True):
    """What a query may take: seconds of work and rows; and what all that run at once share: bytes of memory and on the disk."""

    seconds: float = 30.0
    rows: int = 1_000_000
    memory: int = 2_000_000_000
    spill: int = 10_000_000_000
    threads: int = 2

    @property
    def own_memory(self) -> int:
        """Bytes of memory of one query, as DuckDB counts them."""
        return self.memory // CONCURRENT


class _Open:
    """A question that is being answered."""

    def __init__(self, seconds: float) -> None:
        self.name = uuid4().hex
        self.place: Place | None = None
        self.seconds = seconds
        self.process: Confined | None = None
        self.given: Given | None = None
        self.turn = anyio.Lock()
        self.more = False
        """Whether it has answered and has more pages."""
        self.ended = ""
        """Why it was ended, if it was."""


class Pages:
    """The queries of one historian. `subject` is where its results' next pages are asked for."""

    def __init__(self, ingest: Ingest, subject: str, limits: Limits | None) -> None:
        self.subject = subject
        self.limits = limits or Limits()
        self._ingest = ingest
        self._places = Places()
        self._open: dict[str, _Open] = {}
        self._ended: dict[str, str] = {}
        """Why results of late were ended before anybody asked for all of them."""
        self._live: LiveRows | None = None
        # One at a time writes live rows to files.
        self._writing = anyio.Lock()
        self._over: list[_Open] = []
        self._some_over = anyio.Event()
        ingest.opened = self._opened
        ingest.reading = self._reading

    @property
    def open(self) -> int:
        """Results that have more pages."""
        return sum(kept.more for kept in self._open.values())

    def processes(self) -> list[Confined]:
        """Those that answer now."""
        return [kept.process for kept in self._open.values() if kept.process is not None]

    def _opened(self) -> None:
        """The database was opened: close it to everything outside."""
        store, limits = self._ingest.store, self.limits
        harden(
            store.connection, store.archive, temporary=store.spill, memory=f"{limits.memory}B", threads=limits.threads,
            spill=f"{limits.spill}B",
        )  # fmt: skip

    def _reading(self) -> set[str]:
        return self._live.reading() if self._live is not None else set()

    async def run(self) -> None:
        """Close what nobody asks for, until cancelled."""
        try:
            while True:
                with anyio.move_on_after(IDLE_SECONDS / 10):
                    await self._some_over.wait()
                self._some_over = anyio.Event()
                self._places.close_idle()
                over, self._over = self._over, []
                for kept in over:
                    # One that works is closed by the one who waits for its page.
                    if not kept.turn.locked():
                        await self._close(kept)
        finally:
            with anyio.CancelScope(shield=True):
                for kept in list(self._open.values()):
                    await self._close(kept)

    async def ask(self, request: messages.SqlRequest) -> messages.SqlAnswer:
        """The first page of a query's result. Raises `BadSql`, `QueryLimit` and other faults."""
        if not request.sql.strip():
            raise BadRequest("sql is empty; try: SHOW TABLES")
        if len(request.sql) > LONGEST:
            raise BadSql(f"the statement has {len(request.sql)} characters; at most {LONGEST} are taken: shorten it")
        limits = self.limits
        seconds = min(request.seconds or limits.seconds, limits.seconds)
        kept = _Open(seconds)
        place = await self._places.take(asker(), partial(self._end, kept))
        kept.place = place
        self._open[kept.name] = kept
        async with self._turn(kept):
            page = await self._first(kept, request)
        return self._answer(kept, page)

    async def more(self, request: messages.SqlNextRequest) -> messages.SqlAnswer:
        """The next page."""
        kept = self._open.get(request.result)
        if kept is None or not kept.more or kept.given is None:
            why = self._ended.get(request.result, f"it ended, or nobody asked for its next page in {IDLE_SECONDS:g} s")
            raise BadRequest(f"there is no such result; {why}")
        if request.close:
            stored = kept.given.stored
            await self._close(kept)
            return messages.SqlAnswer(columns=[], stored=stored)
        async with self._turn(kept):
            page = await self._page(kept, b"")
        return self._answer(kept, page)

    @asynccontextmanager
    async def _turn(self, kept: _Open) -> AsyncIterator[None]:
        """One page at a time. What fails, or has its last page, is closed."""
        try:
            async with kept.turn:
                if kept.place is not None:
                    kept.place.works()
                yield
                if kept.place is not None:
                    kept.place.waits()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._close(kept)
            raise
        if not kept.more:
            await self._close(kept)

    def _answer(self, kept: _Open, page: Page) -> messages.SqlAnswer:
        return messages.SqlAnswer(
            columns=page.columns, rows=page.rows, data=page.data, stored=kept.given.stored if kept.given else 0,
            result=kept.name if kept.more else "", next=self.subject if kept.more else "",
        )  # fmt: skip

    def _end(self, kept: _Open, reason: str) -> None:
        """Its place is taken back."""
        kept.ended = reason
        self._ended[kept.name] = reason
        if len(self._ended) > ENDED_KNOWN:
            del self._ended[next(iter(self._ended))]
        if kept.process is not None:
            kept.process.kill()
        self._over.append(kept)
        self._some_over.set()

    async def _close(self, kept: _Open) -> None:
        """End its process, and let go what it had. Twice is once."""
        if self._open.pop(kept.name, None) is None:
            return
        kept.more = False
        if kept.place is not None:
            self._places.give(kept.place)
        if kept.process is not None:
            kept.process.close()
        if kept.given is not None and self._live is not None:
            self._live.done(kept.given)
        await anyio.to_thread.run_sync(partial(shutil.rmtree, self._temporary(kept), ignore_errors=True))

    def _temporary(self, kept: _Open) -> Path:
        return self._ingest.store.spill / f"query-{kept.name}"

    async def _first(self, kept: _Open, request: messages.SqlRequest) -> Page:
        ingest, limits = self._ingest, self.limits
        store = ingest.store
        if self._live is None:
            self._live = LiveRows(store.spill / "rows")
        live, most = self._live, ingest.client.max_payload
        asked = Question(
            sql=request.sql, form=request.form, seconds=kept.seconds, rows=min(request.rows or limits.rows, limits.rows),
            archive=str(store.archive), live=str(live.folder), temporary=str(self._temporary(kept)), hidden=[str(store.folder)],
            memory=limits.own_memory, spill=limits.spill // CONCURRENT, threads=limits.threads,
            page_bytes=min(PAGE_BYTES, most // SHARE), row_bytes=min(ROW_BYTES, most // 2), message_bytes=most,
        )  # fmt: skip
        kept.process = await anyio.to_thread.run_sync(
            partial(
                FORKSERVER.start,
                _WORK,
                memory=limits.own_memory + OWN_BYTES,
                cpu=kept.seconds * limits.threads + OWN_SECONDS,
            )
        )
        needed = question.decode_needed(await self._said(kept, question.encode(asked)))
        if isinstance(needed, Failed):
            raise Refused(needed.status, needed.code, needed.sentence)
        kept.given = await self._rows(live, needed)
        return await self._page(kept, question.encode(kept.given))

    async def _rows(self, live: LiveRows, needed: Needed) -> Given:
        async with self._writing:
            try:
                return await self._ingest.beside(partial(live.given, needed.tables))
            except HistoryFull as error:
                raise DatabaseFailed(str(error)) from None
            except BadHistory:
                self._ingest.broken()
                raise DatabaseFailed("the history is being opened anew; ask again in a moment") from None

    async def _page(self, kept: _Open, message: bytes) -> Page:
        page: Page | Failed = question.decode_page(await self._said(kept, message))
        if isinstance(page, Failed):
            raise Refused(page.status, page.code, page.sentence)
        kept.more = not page.ended
        return page

    async def _said(self, kept: _Open, message: bytes) -> bytes:
        """What the process answers. Raises `QueryLimit` when it was ended."""
        if kept.process is None or kept.ended:
            raise QueryLimit("busy", f"the query was ended: {kept.ended}")
        try:
            return await kept.process.call(message, kept.seconds)
        except Killed as error:
            if kept.ended:
                raise QueryLimit("busy", f"the query was ended: {kept.ended}") from None
            _log.warning("query_killed", reason=error.reason, asker=kept.place.asker if kept.place else "")
            if error.reason == "time":
                sentence = f"stopped after {kept.seconds:g} s: raise the limit with --timeout or ask for less"
                raise QueryLimit("time_limit", sentence) from None
            sentence = f"the query needs more than {self.limits.own_memory + OWN_BYTES} bytes of memory: ask for less"
            raise QueryLimit("memory_limit", sentence) from None
