"""The historian: keeps a fleet's history and answers questions about it.

kv.<fleet>.sql                SQL, in pages               kv.<fleet>.explain             why a request went where it went
kv.<fleet>.history.status     how far the history is      kv.<fleet>.history.state       the fleet as it was
kv.<fleet>.history.changes    what changed between two moments
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import pyarrow as pa
import structlog

from kvplane.events.log.stream import open_stream
from kvplane.projections.errors import BadHistory
from kvplane.projections.history import archive
from kvplane.projections.history.store import FILE, Checkpoint
from kvplane.services.history.ingest import Ingest, Retention
from kvplane.services.history.pages import Pages
from kvplane.services.history.past import Past
from kvplane.services.process.version import package_version
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.protocol.status import HistoryStatus
from kvplane.services.rpc.pieces import Pieces
from kvplane.services.rpc.readiness import Readiness, readiness
from kvplane.services.rpc.server import serve, serving, stop
from kvplane.services.rpc.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anyio.abc import TaskStatus
    from nats.aio.client import Client

    from kvplane.projections.history.store import Store
    from kvplane.services.history.pages import Limits
    from kvplane.services.protocol import messages


_log = structlog.get_logger("kvplane.history")


class Historian:
    """One fleet's historian. `servers`, `credentials`, `ca` and `modules` are for the process that folds past states."""

    role = "historian"

    def __init__(
        self, client: Client, fleet: str, folder: Path, *, servers: Sequence[str], limits: Limits | None = None,
        retention: Retention | None = None, modules: Sequence[str] = (), credentials: Path | None = None,
        ca: Path | None = None,
    ) -> None:  # fmt: skip
        self.client = client
        self.fleet = fleet
        self.id = uuid4().hex[:12]
        self.ingest = Ingest(client, fleet, folder, retention)
        _check_new(self.ingest.store)
        self.past = Past(self.ingest, servers, modules, credentials=credentials, ca=ca)
        self.pieces = Pieces(f"kv.{fleet}.history.{self.id}.piece", client)
        self.pages = Pages(self.ingest, f"kv.{fleet}.sql.{self.id}", limits)
        self.tally = Tally()
        self.serving = False
        self._known: tuple[Checkpoint, list[archive.File]] = (Checkpoint(0, 0, 0), [])

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow the log and answer until cancelled. Started means: the log that was there is stored, questions are taken."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.ingest.run)
            await self.ingest.follower.caught_up.wait()
            await self.ingest.flush()
            group.start_soon(self.pages.run)
            group.start_soon(self.pieces.run)
            service = await serve(
                self.client, group, "kvplane-historian", f"history of fleet {self.fleet}",
                serving("historian", self.fleet, self.id, {
                    "sql": self.pages.ask, "sql_next": self.pages.more, "explain": self.explain, "state": self.state,
                    "changes": self.changes, "sequence": self.sequence, "snapshot": self.snapshot, "piece": self.pieces.more,
                    "whatif": self.whatif, "status": self.status, "status_of_one": self.status,
                }),
                {"fleet": self.fleet, "historian": self.id}, self.tally,
            )  # fmt: skip
            self.serving = True
            _log.info("historian_ready", fleet=self.fleet, stored=self.ingest.stored)
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                self.serving = False
                await stop(service)
                self.past.close()

    def readiness(self) -> Readiness:
        """Whether it answers questions. It does while it can't store; what is missing then is what is new."""
        ingest = self.ingest
        degraded = bool(ingest.failure) or not ingest.follower.healthy
        return readiness(
            ingest.follower, serving=self.serving, degraded=degraded, stored=ingest.stored, failure=ingest.failure
        )

    @property
    def live_bytes(self) -> int:
        """What the part of the history that is not archived takes on the disk."""
        size = 0
        for path in self.ingest.store.folder.glob("history.duckdb*"):
            # DuckDB removes its log when it has written all of it to the file.
            with suppress(FileNotFoundError):
                size += path.stat().st_size
        return size

    async def explain(self, request: messages.ExplainRequest) -> dict[str, Any]:
        """Why a request went where it went."""
        return await self.past.explain(request.request, request.sequence)

    async def state(self, request: messages.MomentRequest) -> dict[str, Any]:
        """The fleet as it was."""
        return await self.past.state(request.at, request.node)

    async def changes(self, request: messages.ChangesRequest) -> dict[str, Any]:
        """What changed between two moments."""
        return await self.past.changes(request.first, request.second)

    async def sequence(self, request: messages.MomentRequest) -> dict[str, Any]:
        """Sequence that a moment means."""
        return {"sequence": await self.past.sequence(request.at)}

    async def snapshot(self, request: messages.SnapshotRequest) -> messages.Piece:
        """The fleet's state at a moment, as `projections.snapshot` writes it."""
        return self.pieces.first(await self.past.snapshot(request.at))

    async def whatif(self, request: messages.WhatifRequest) -> dict[str, Any]:
        """Keep rows of a what-if."""
        try:
            rows = pa.ipc.open_stream(request.data).read_all()
            await self.ingest.in_thread(partial(self.ingest.store.add, request.table, rows))
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise BadRequest(f"data is no Arrow stream with the columns of {request.table}: {error}") from None
        return {"table": request.table, "rows": rows.num_rows}

    async def status(self, request: messages.StatusRequest) -> HistoryStatus:  # noqa: ARG002 - nothing to choose
        """How far the history is, and what it takes on the disk."""
        ingest = self.ingest
        log = await open_stream(self.client.jetstream(), self.fleet)
        # When the database can't be read, what was known before.
        with suppress(BadHistory):
            self._known = await ingest.in_thread(lambda: (ingest.store.checkpoint, archive.listed(ingest.store)))
        checkpoint, files = self._known
        return HistoryStatus(
            fleet=self.fleet,
            historian=self.id,
            version=package_version(),
            clock=time.time(),
            healthy=ingest.follower.healthy and not ingest.failure,
            failure=ingest.failure,
            log=log.last_seq,
            applied=ingest.state.sequence,
            stored=checkpoint.sequence,
            archived=checkpoint.archived,
            live_bytes=self.live_bytes,
            archive_files=len(files),
            archive_bytes=sum(file.bytes for file in files),
            archive_days=[files[0].day, files[-1].day] if files else [],
            snapshots=[int(path.stem) for path in reversed(ingest.snapshots.upto(1 << 62))],
            queries=self.pages.open,
        )


def _check_new(store: Store) -> None:
    """Raise `BadHistory` when the history is new and its archive isn't: no list names those files, so they would be swept."""
    if not store.checkpoint.sequence and next(store.archive.rglob("*.parquet"), None) is not None:
        store.close()
        raise BadHistory(
            f"{store.folder.name} holds an archive, but its {FILE} is gone or new; `kvplane history rebuild` makes it again "
            "from the archive and the log"
        )
