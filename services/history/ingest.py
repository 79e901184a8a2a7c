"""The historian's main loop: follow the log, fold it, and store what it says.

Rows are gathered in the event loop and stored in a thread; DuckDB works without the interpreter's lock. When the disk is
full or fails, the follower pauses, and goes on from where it was when there is room again: the log keeps what it has.
"""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
import duckdb
import structlog
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from kvplane.events.durations import MILLI, Durations
from kvplane.events.errors import LogCorrupt, LogUnavailable
from kvplane.events.log.follow import Follower, not_cut_off
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name
from kvplane.projections.errors import BadHistory, BadSnapshot, HistoryFull
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive
from kvplane.projections.history.pieces import LEAST_BYTES
from kvplane.projections.history.replay import messages
from kvplane.projections.history.rows import Rows
from kvplane.projections.history.store import FILE, Store, fault
from kvplane.projections.history.tables import VERSION
from kvplane.projections.snapshot import load
from kvplane.services.history.snapshots import Snapshots, nearest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js.api import StreamState

    from kvplane.events.codec import Message

T = TypeVar("T")

FLUSH_SECONDS = 0.25
"""How long rows wait to be stored, unless there are many."""
FLUSH_BYTES = 16 << 20
PAUSE_BYTES = 128 << 20
"""So many bytes of rows may wait; then the log is read no further."""
RETRY_SECONDS = 2.0
MAINTAIN_SECONDS = 15.0
"""How often closed hours and old files are looked for."""
SNAPSHOT_COMMITS = 100_000
"""So many commits after a snapshot there is another one ..."""
SNAPSHOT_SHARE = 20
"""... unless that would take more than one part in so many of the time."""
NICE = 19

_log = structlog.get_logger("kvplane.history")


def give_way() -> None:
    """Let this process, and all threads that it starts from now on, come after routers on the same machine."""
    with suppress(OSError):
        os.nice(NICE)


def relax_collector() -> None:
    """Let the collector look seldom: rows are many, live shortly, and hold no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


class Retention:
    """How much of the archive is kept: days, and bytes; none is without limit."""

    def __init__(self, days: float | None = None, size: int | None = None) -> None:
        self.days = days
        self.size = size


class Ingest:
    """One fleet's history, kept up to date."""

    def __init__(self, client: Client, fleet: str, folder: Path, retention: Retention | None = None) -> None:
        self.client = client
        self.fleet = fleet
        self.store = Store(folder, fleet)
        if self.store.raised:
            _log.warning(
                "history_raised", folder=folder.name, version=VERSION, why="the history was of an earlier version"
            )
        self.snapshots = Snapshots(folder / "snapshots", fleet)
        self.remote = SnapshotStore(client, fleet)
        self.retention = retention or Retention()
        self.state = FleetState(fleet)
        self.follower = Follower(client, fleet, self._handle, apart=True)
        self.stored = 0
        """Sequence of the last commit that is stored."""
        self.failure = ""
        """Why nothing is stored at the moment."""
        self.failures = 0
        """Tries to store that failed."""
        self.rows_stored = 0
        self.seconds = Durations(MILLI)
        """How long it took to store each batch of rows."""
        self.opened: Callable[[], None] = lambda: None
        """Called when the store was opened, before anything else is done with it."""
        self.reading: Callable[[], set[str]] = set
        """Gives the names of archived files that are read now."""
        self._writing = anyio.CapacityLimiter(1)
        self._flushing = anyio.Lock()
        self._broken = False
        self._rows = Rows()
        self._enough = anyio.Event()
        self._advanced = anyio.Event()
        self._snapshot_at = 0
        self._snapshot_seconds = 0.0
        self._snapshot_time = 0.0

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do something with the store's own connection, which one thread at a time may use. Raises `BadHistory`."""
        return await anyio.to_thread.run_sync(self._guarded, work, limiter=self._writing)

    async def beside(self, work: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """Do something with a connection of its own, beside what is stored meanwhile. Raises `BadHistory`."""

        def with_cursor() -> T:
            cursor = self.store.cursor()
            try:
                return work(cursor)
            finally:
                cursor.close()

        return await anyio.to_thread.run_sync(self._guarded, with_cursor)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except duckdb.Error as error:
            raise fault(error, self.store.folder / FILE) from error

    async def run(self) -> None:
        """Follow the log until cancelled. Raises `LogCorrupt` when history and log don't fit together."""
        try:
            await self._begin()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._close()
            raise
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._flush_forever)
                group.start_soon(self._maintain_forever)
                group.start_soon(self.follower.run)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(10):
                await self._finish()

    async def _begin(self) -> None:
        """Come to where the history ends: from a snapshot, through rows that the log has no more."""
        await self.in_thread(self.opened)
        checkpoint = self.store.checkpoint
        look = partial(open_stream, self.client.jetstream(), self.fleet)
        log = await not_cut_off(self.client, look, checkpoint.sequence)
        if checkpoint.sequence > log.last_seq:
            raise LogCorrupt(
                f"the history holds {checkpoint.sequence} commits, the log of fleet {self.fleet!r} ends at {log.last_seq}; "
                "the log was replaced or has lost messages: restore it, or begin another history with --history"
            )
        if not checkpoint.sequence and (log.first_seq > 1 or log.num_deleted):
            await self._begin_late(log.first_seq)
            checkpoint = self.store.checkpoint
        await self._check_last(checkpoint.sequence, log)
        state = await self.in_thread(lambda: nearest(self.snapshots.upto(checkpoint.sequence), self.fleet))
        if state is not None:
            self.state = state
        if self.state.sequence + 1 < log.first_seq or log.num_deleted:
            await self.in_thread(partial(self._through_rows, checkpoint.sequence))
        if self.state.sequence + 1 < log.first_seq:
            remedy = (
                "what is between is lost; begin another history with --history"
                if checkpoint.sequence
                else "`kvplane snapshot take`, where a coordinator still runs, makes a snapshot to begin with"
            )
            raise LogCorrupt(
                f"the log of fleet {self.fleet!r} begins at {log.first_seq}, and no snapshot or row of the history leads there "
                f"from {self.state.sequence}: {remedy}"
            )
        # Not before: it may be what the log has no more.
        swept = await self.in_thread(partial(archive.sweep, self.store))
        if swept:
            _log.info("leftovers_removed", files=swept)
        self.waiting = await self.in_thread(self.store.waiting)
        self.stored = checkpoint.sequence
        self._snapshot_at = self.state.sequence
        self.follower.applied = self.state.sequence
        _log.info("history_opened", fleet=self.fleet, stored=self.stored, archived=checkpoint.archived)

    async def _begin_late(self, first: int) -> None:
        """A new history of a log that has been purged: it begins where a snapshot on the server leads to the log."""
        for sequence in await self.remote.sequences():
            if sequence + 1 < first:
                break
            try:
                state = load(self.fleet, await self.remote.get(sequence))
            except BadSnapshot as error:
                _log.warning("snapshot_passed_over", sequence=sequence, error=str(error))
                continue
            self.snapshots.save(state)
            await self.in_thread(partial(self.store.begin_at, state.sequence, state.time))
            _log.warning("history_begins_late", sequence=state.sequence, log_begins=first)
            return

    async def _check_last(self, sequence: int, log: StreamState) -> None:
        """Raise `LogCorrupt` when the last commit that is stored is not the one that the log has there."""
        if not max(1, log.first_seq) <= sequence <= log.last_seq:
            return
        try:
            message = await self.client.jetstream().get_msg(stream_name(self.fleet), sequence)
        except NotFoundError:
            # Purged by hand; the history has it.
            return
        except (NatsError, APIError, OSError, TimeoutError) as error:
            raise LogUnavailable(f"commit {sequence} of fleet {self.fleet!r} can't be read: {error!r}") from error
        found = await self.in_thread(
            lambda: self.store.connection.execute("SELECT time FROM commits WHERE sequence = ?", [sequence]).fetchall()
        )
        # The log's time is cut to microseconds by the client, too.
        if found and message.time is not None and found[0][0] != message.time.replace(tzinfo=None):
            raise LogCorrupt(
                f"commit {sequence}, the last of the history, is another message on the log of fleet {self.fleet!r}; the log "
                "was replaced: restore it, or begin another history with --history"
            )

    def _through_rows(self, last: int) -> None:
        ((first,),) = self.store.connection.execute(
            "SELECT min(sequence) FROM commits WHERE sequence > ?", [self.state.sequence]
        ).fetchall()
        if first != self.state.sequence + 1:
            return
        for message in messages(self.store.fetch, self.fleet, self.state.sequence, last):
            self.state.apply(message)

    def _handle(self, message: Message) -> None:
        applied = self.state.apply(message)
        if message.sequence <= self.stored:
            return
        rows = self._rows
        rows.add(message, applied, self.state, self.waiting)
        if rows.size > FLUSH_BYTES:
            self._enough.set()
            if rows.size > PAUSE_BYTES:
                self.follower.pause()

    async def _flush_forever(self) -> None:
        while True:
            with anyio.move_on_after(FLUSH_SECONDS):
                await self._enough.wait()
            self._enough = anyio.Event()
            await self.flush()
            await self._snapshot()

    async def flush(self) -> None:
        """Store what was read so far; tried again until it is stored."""
        async with self._flushing:
            if not len(self._rows) and not self._broken:
                return
            rows, self._rows = self._rows, Rows()
            work = partial(self._write, rows, self.state.time)
            while True:
                begin = time.perf_counter()
                try:
                    await self.in_thread(work)
                except BadHistory as error:
                    self._broken = True
                    self.failures += 1
                    if str(error) != self.failure:
                        _log.error("history_not_stored", error=str(error), waiting=len(rows))
                    self.failure = str(error)
                    await anyio.sleep(RETRY_SECONDS)
                else:
                    break
            self.seconds.add(time.perf_counter() - begin)
            self.rows_stored += len(rows) + sum(map(len, rows.events.values()))
            self.stored = max(self.stored, rows.last)
            if self.failure:
                _log.warning("history_goes_on", stored=self.stored)
                self.failure = ""
            self.follower.resume()
            self._advanced.set()
            self._advanced = anyio.Event()

    def _write(self, rows: Rows, time: int) -> None:
        if self._broken:
            self.store.reopen()
            self.opened()
            self._broken = False
        if len(rows):
            self.store.write(rows, time=time)

    def broken(self) -> None:
        """The database failed while it was read: it is opened anew before anything else is stored."""
        self._broken = True
        self._enough.set()

    async def reached(self, sequence: int, *, seconds: float) -> bool:
        """Wait until a commit is stored, for so long at the most; whether it is."""
        with anyio.move_on_after(seconds):
            while self.stored < sequence:
                await self._advanced.wait()
        return self.stored >= sequence

    async def _maintain_forever(self) -> None:
        while True:
            await anyio.sleep(MAINTAIN_SECONDS)
            if self._broken:
                continue
            try:
                await self.maintain()
            except BadHistory as error:
                _log.error("history_not_maintained", error=str(error))

    async def maintain(self, now: int | None = None) -> None:
        """Archive closed hours, let old files go, and write a snapshot if it is time; `now` in unix microseconds."""
        now = time.time_ns() // 1000 if now is None else now
        store = self.store
        await self.in_thread(partial(archive.sweep, store, keep=self.reading()))
        failed: BadHistory | None = None
        try:
            await self._archive(now)
        except BadHistory as error:
            failed = error
        # What can't be archived must not keep what is old.
        gone = await self.in_thread(
            partial(archive.expire, store, now, days=self.retention.days, size=self.retention.size)
        )
        if gone:
            _log.info("archive_expired", files=len(gone), upto=gone[-1].last)
        if failed is not None:
            raise failed

    async def _archive(self, now: int) -> None:
        """Archive closed hours in pieces, smaller ones where there is no memory for large ones. Raises `BadHistory`."""
        store, size = self.store, archive.PIECE_BYTES
        while self.follower.caught_up.is_set():
            part = await self.beside(partial(archive.closed, now=now, size=size))
            if part is None:
                return
            try:
                # A long copy must not keep rows from being stored.
                files = await self.beside(partial(archive.export, store, part))
            except HistoryFull:
                raise
            except BadHistory as error:
                size //= 4
                if size < LEAST_BYTES:
                    raise
                _log.warning("hour_not_archived", day=part.day, last=part.last, error=str(error), tried_next=size)
                continue
            await self.in_thread(partial(archive.adopt, store, part, files))
            _log.info("hour_archived", day=part.day, last=part.last, bytes=sum(file.bytes for file in files))

    async def _snapshot(self) -> None:
        if self.state.sequence - self._snapshot_at < SNAPSHOT_COMMITS:
            return
        if anyio.current_time() - self._snapshot_time < SNAPSHOT_SHARE * self._snapshot_seconds:
            return
        await self.flush()
        await self.save_snapshot()

    async def save_snapshot(self) -> int:
        """Write a snapshot now; its sequence. The log is not read meanwhile."""
        begin = anyio.current_time()
        sequence = self.state.sequence
        try:
            self.snapshots.save(self.state)
        except (OSError, BadSnapshot) as error:
            # The history goes on without; there is another try after as many commits.
            _log.error("snapshot_not_written", error=str(error))
            self._snapshot_at = sequence
            return 0
        self._snapshot_at = sequence
        self._snapshot_time = anyio.current_time()
        self._snapshot_seconds = self._snapshot_time - begin
        return sequence

    async def _finish(self) -> None:
        if len(self._rows):
            with suppress(BadHistory):
                await self.in_thread(partial(self.store.write, self._rows, time=self.state.time))
        if self.state.failure is None and self.state.sequence - self._snapshot_at > SNAPSHOT_COMMITS // 10:
            await self.save_snapshot()
        await self._close()

    async def _close(self) -> None:
        await self.in_thread(self.store.close)
