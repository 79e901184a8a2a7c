"""Questions about the past that are answered by folding the log again: state, changes, explanations.

This half finds out what is to be folded, with the history's SQL; `moment` does it in a process of its own.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from kvplane.events.log.stream import open_stream
from kvplane.projections.errors import BadHistory
from kvplane.projections.history.archive import ends
from kvplane.projections.history.pieces import PIECE_BYTES
from kvplane.projections.history.replay import completion_events, decision_events
from kvplane.projections.history.tables import TABLES
from kvplane.services.history import moment
from kvplane.services.history.when import when
from kvplane.services.process import logs
from kvplane.services.process.workers import Worker
from kvplane.services.protocol.errors import BadRequest, BeforeHistory, DatabaseFailed, NotYet, UnknownRequest
from kvplane.services.routing.explain import BEFORE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from duckdb import DuckDBPyConnection

    from kvplane.events.types import RequestCompleted, RequestRouted
    from kvplane.services.history.ingest import Ingest
    from kvplane.services.protocol.messages import Moment

T = TypeVar("T")

SEQUENCE_DIGITS = 20
STORED_SECONDS = 5.0
"""How long to wait until the history holds what is on the log now."""
_SKEW_SECONDS = 5.0
"""How far a router's clock may be off the log's."""


class Past:
    """Answers questions about the past of one history."""

    def __init__(
        self, ingest: Ingest, servers: Sequence[str], modules: Sequence[str], *, credentials: Path | None = None,
        ca: Path | None = None,
    ) -> None:  # fmt: skip
        self._ingest = ingest
        self._servers = list(servers)
        self._credentials = None if credentials is None else str(credentials)
        self._ca = None if ca is None else str(ca)
        self._modules = list(modules)
        # A past state takes as much memory as the present one: one at a time.
        self._worker = Worker(logs.configure, "warning")
        self._one = anyio.CapacityLimiter(1)

    def close(self) -> None:
        """End what is being answered."""
        self._worker.close()

    async def _read(self, work: Callable[[DuckDBPyConnection], T]) -> T:
        try:
            return await self._ingest.beside(work)
        except BadHistory as error:
            raise DatabaseFailed(str(error)) from None

    async def _asked(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return await self._read(lambda cursor: cursor.execute(sql, list(values)).fetchall())

    async def sequence(self, at: Moment) -> int:
        """Sequence that a moment means. Raises `BadRequest`, `BeforeHistory` or `NotYet`."""
        at = str(at)
        ends = (await open_stream(self._ingest.client.jetstream(), self._ingest.fleet)).last_seq
        # Digits are a sequence, however many there are; not all of them fit into one.
        if at.isascii() and at.isdigit() and (len(at) > SEQUENCE_DIGITS or int(at) > ends):
            raise NotYet(f"the log ends at sequence {ends}; {at[:60]} is not there yet")
        asked = when(at, datetime.now(UTC))
        if isinstance(asked, int):
            if asked > ends:
                raise NotYet(f"the log ends at sequence {ends}; {asked} is not there yet")
            return asked
        await self._ingest.reached(ends, seconds=STORED_SECONDS)
        micros = (asked - datetime(1970, 1, 1)) // timedelta(microseconds=1)  # noqa: DTZ001 - both are UTC without a zone
        ((found, first),) = await self._asked(
            "SELECT max(sequence) FILTER (epoch_us(time) <= ?), min(time) FROM commits", micros
        )
        if found is None:
            what = "it is empty" if first is None else f"its first commit is of {first.isoformat(sep=' ')} UTC"
            raise BeforeHistory(f"{at} is before the history begins: {what}")
        return int(found)

    async def _fold(self, begin: int, last: int, work: Callable[..., T], *arguments: object) -> T:
        """Call a function of `moment` with a way to the states from `begin` to `last`."""
        ingest = self._ingest
        log = await open_stream(ingest.client.jetstream(), ingest.fleet)
        # Where the log has a hole, rows go as far as they can.
        log_first = ingest.stored + 1 if log.num_deleted else log.first_seq
        snapshots = ingest.snapshots.upto(begin)
        while True:
            try:
                async with self._one:
                    return await self._fold_from(snapshots, log_first, last, work, *arguments)
            except BeforeHistory:
                if not snapshots:
                    raise
                # The nearest one can't be used: then from one before it, through more rows.
                snapshots = snapshots[1:]

    async def _fold_from(
        self, snapshots: list[Path], log_first: int, last: int, work: Callable[..., T], *arguments: object
    ) -> T:
        ingest = self._ingest
        base = int(snapshots[0].stem) if snapshots else 0
        # A snapshot of the very moment needs no commits.
        rows, rows_last, first = "", 0, min(log_first, base + 1) if base >= last else log_first
        if base + 1 < log_first and base < last:
            rows_last = min(last, log_first - 1)
            rows = mkdtemp(dir=ingest.store.spill, prefix="past-")
        try:
            if rows:
                first = await self._read(partial(_export, rows, base, rows_last))
            way = moment.Way(
                fleet=ingest.fleet, servers=self._servers, credentials=self._credentials, ca=self._ca,
                snapshots=[str(path) for path in snapshots], rows=rows,
                rows_last=rows_last, first=first, modules=self._modules,
            )  # fmt: skip
            return await self._worker.call(work, way, *arguments)
        finally:
            if rows:
                with anyio.CancelScope(shield=True):
                    await _remove(rows)

    async def state(self, at: Moment, node: str) -> dict[str, Any]:
        """The fleet as it was."""
        sequence = await self.sequence(at)
        found = await self._fold(sequence, sequence, moment.state_at, sequence, node)
        if node and not found["rows"]:
            raise BadRequest(f"no node {node[:80]!r} was there at sequence {sequence}")
        return found

    async def snapshot(self, at: Moment) -> bytes:
        """The fleet as it was, as a snapshot."""
        sequence = await self.sequence(at)
        return await self._fold(sequence, sequence, moment.snapshot_at, sequence)

    async def changes(self, first: Moment, second: Moment) -> dict[str, Any]:
        """What changed between two moments."""
        begin, end = await self.sequence(first), await self.sequence(second)
        if begin > end:
            raise BadRequest(
                f"{first} (sequence {begin}) is after {second} (sequence {end}); give the earlier one first"
            )
        return await self._fold(begin, end, moment.changes_between, begin, end)

    async def explain(self, request: str, sequence: int | None) -> dict[str, Any]:
        """A decision as it was recorded, made again, and how it ended."""
        ingest = self._ingest
        log = await open_stream(ingest.client.jetstream(), ingest.fleet)
        await ingest.reached(log.last_seq, seconds=STORED_SECONDS)
        all_of_them = await self._asked(
            "SELECT sequence, event, router, applied, epoch_us(decided), epoch_us(time), kind, len(hashes), block_size "
            "FROM decisions WHERE request = ? ORDER BY sequence, event",
            request,
        )
        found = [row for row in all_of_them if sequence in (None, row[0])]
        if not found:
            ((count, first),) = await self._asked("SELECT count(*), min(time) FROM decisions")
            since = f"its {count} decisions begin {first} UTC" if count else "it holds no decisions yet"
            raise UnknownRequest(
                f"the history has no decision about request {request[:80]!r}"
                f"{'' if sequence is None else f' at sequence {sequence}'}; {since}"
            )
        at, place, router, applied, decided, time, kind, hashes, size = found[-1]
        begin, own, event = await self._read(partial(_own, at, place, router, applied, decided or time))
        answer: dict[str, Any] = {
            "request": request, "sequence": at, "router": router, "applied": applied, "decided": decided, "kind": kind,
            "decisions": [row[0] for row in all_of_them], "recorded": _recorded(event),
            "attempts": await self._attempts(request),
            "outcome": await self._outcome(request, at, size or 0, event), "held": await self._held(request, at),
        }  # fmt: skip
        if decided is None:
            return {**answer, "verdict": "its time was not recorded, so it can't be made again"}
        if hashes != event.blocks:
            return {
                **answer,
                "verdict": f"its {event.blocks} block hashes were not recorded, so it can't be made again",
            }
        again = await self._fold(min(begin, applied), applied, moment.explain, router, min(begin, applied), own, event)
        verdict = "differs" if again["differences"] else "agrees"
        return {**answer, "verdict": verdict, "recomputed": again}

    async def _attempts(self, request: str) -> list[dict[str, Any]]:
        """All attempts at what a request came as, in their order, and how they ended; none of one that had only this one."""
        rows = await self._asked(
            "SELECT d.request, d.sequence, coalesce(d.leg, 0), d.node, c.status, c.output_tokens FROM decisions d "
            "LEFT JOIN completions c ON c.request = d.request AND c.routed = d.sequence "
            "WHERE coalesce(d.origin, d.request) IN (SELECT coalesce(origin, request) FROM decisions WHERE request = ?) "
            "ORDER BY d.sequence, d.event",
            request,
        )  # fmt: skip
        names = ("request", "sequence", "leg", "node", "status", "output_tokens")
        return [dict(zip(names, row, strict=True)) for row in rows] if len({row[0] for row in rows}) > 1 else []

    async def _held(self, request: str, sequence: int) -> dict[str, Any] | None:
        """Why a request waited before it was sent, and for how long in seconds; none when it did not."""
        ((reason, place, released, waited),) = await self._asked(
            "SELECT arg_min(reason, sequence) FILTER (change = 'held'), arg_min(place, sequence) FILTER (change = 'held'), "
            "arg_max(reason, sequence) FILTER (change = 'released'), max(waited) "
            "FROM holds WHERE request = ? AND sequence <= ?",
            request, sequence,
        )  # fmt: skip
        if reason is None and released is None:
            return None
        return {"reason": reason or "", "place": place or 0, "released": released or "", "waited": waited or 0.0}

    async def _outcome(self, request: str, sequence: int, size: int, event: RequestRouted) -> dict[str, Any] | None:
        rows = await self._asked(
            "SELECT sequence, node, status, prompt_tokens, cached_tokens, output_tokens, ttft, duration, coalesce(trace, '') "
            "FROM completions "
            "WHERE request = ? AND sequence >= ? ORDER BY sequence, event LIMIT 1",
            request, sequence,
        )  # fmt: skip
        if not rows:
            return None
        names = (
            "sequence", "node", "status", "prompt_tokens", "cached_tokens", "output_tokens", "ttft", "duration", "trace"
        )  # fmt: skip
        return {**dict(zip(names, rows[0], strict=True)), "predicted_tokens": event.match * size}


def _recorded(event: RequestRouted) -> dict[str, Any]:
    return {
        "node": event.node, "model": event.model, "session": event.session, "policy": event.policy, "match": event.match,
        "best": event.best, "blocks": event.blocks, "tokens": event.tokens, "exclude": event.exclude,
        "candidates": [[candidate.node, candidate.match, candidate.cost] for candidate in event.candidates],
        "trace": event.trace, "tenant": event.tenant, "origin": event.origin, "leg": event.leg,
    }  # fmt: skip


def _export(folder: str, after: int, last: int, cursor: DuckDBPyConnection) -> int:
    """Write the rows of a range to files; sequence of the first commit that is there."""
    begin = after
    for upto in ends(cursor, "main", TABLES, after, last, PIECE_BYTES):
        _write(folder, begin, upto, cursor)
        begin = upto
    ((first,),) = cursor.execute(f"SELECT min(sequence) FROM commits WHERE sequence > {after}").fetchall()
    return last + 1 if first is None else int(first)


def _write(folder: str, after: int, last: int, cursor: DuckDBPyConnection) -> None:
    for table in TABLES:
        path = f"{folder}/{table.name}.{last:020}.parquet".replace("'", "''")
        cursor.execute(
            f"COPY (SELECT * FROM {table.name} WHERE sequence > {after} AND sequence <= {last}) TO '{path}' (FORMAT parquet)"
        )


def _own(
    sequence: int, place: int, router: str, applied: int, decided: int, cursor: DuckDBPyConnection
) -> tuple[int, list[RequestRouted | RequestCompleted], RequestRouted]:
    """Where the log is to be read anew from, what this router recorded from there on, and the decision itself."""
    before = decided - int((BEFORE_SECONDS + _SKEW_SECONDS) * 1e6)
    ((begin,),) = cursor.execute(
        "SELECT coalesce(max(sequence), 0) FROM commits WHERE time < make_timestamp(?) AND sequence < ?",
        [before, sequence],
    ).fetchall()
    # What was on its way to the log, however long.
    ((pending,),) = cursor.execute(
        "SELECT min(applied) FROM decisions WHERE router = ? AND sequence > ? AND (sequence, event) < (?, ?)",
        [router, applied, sequence, place],
    ).fetchall()
    begin = begin if pending is None else min(begin, pending)
    table = cursor.sql(
        "SELECT * EXCLUDE (time) REPLACE (epoch_us(decided) AS decided) FROM decisions WHERE router = ? "
        "AND sequence > ? AND (sequence, event) <= (?, ?)",
        params=[router, begin, sequence, place],
    ).to_arrow_table()
    ends = cursor.sql(
        "SELECT * EXCLUDE (time) FROM completions WHERE sequence > ? AND (sequence, event) < (?, ?) "
        "AND sequence IN (SELECT sequence FROM commits WHERE room = 'access' AND name = ?)",
        params=[begin, sequence, place, router],
    ).to_arrow_table()
    events = decision_events(table) | completion_events(ends)
    *own, event = [events[key] for key in sorted(events)]
    return begin, own, event  # type: ignore[return-value]


async def _remove(folder: str) -> None:
    async for path in anyio.Path(folder).iterdir():
        await path.unlink(missing_ok=True)
    await anyio.Path(folder).rmdir()
