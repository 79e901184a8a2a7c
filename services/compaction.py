"""Snapshots of the fold, and what of the log is no longer needed once they are there.

Any coordinator may take a snapshot, on command or when many commits have come since the last one; that two do so at once
costs space and nothing else. The log is purged on command only, below the oldest snapshot that is kept and below what the
history has stored: everything can still be had, from a snapshot, the log, or the history.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import structlog
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

from events.errors import KvplaneError
from events.log.snapshots import SnapshotStore
from events.log.stream import open_stream
from events.subjects import stream_name
from projections.snapshot import dump
from services import api
from services.client import ask
from services.errors import Conflict, LogAway, NoAnswer
from services.forked import in_copy

if TYPE_CHECKING:
    from nats.aio.client import Client

    from services.replica import Replica

SNAPSHOT_COMMITS = 200_000
"""So many commits after the last snapshot a coordinator takes one."""
KEPT = 3
"""Snapshots that are kept."""
LOOK_SECONDS = 5.0
HISTORY_SECONDS = 5.0

_log = structlog.get_logger("kvplane.snapshots")


class Compaction:
    """Takes snapshots of one replica's state, and purges the log."""

    def __init__(self, client: Client, replica: Replica, *, commits: int = SNAPSHOT_COMMITS) -> None:
        self._replica = replica
        self._client = client
        self._fleet = replica.state.fleet
        self._commits = commits
        self.store = SnapshotStore(self._client, self._fleet)
        self._one = anyio.Lock()

    async def run(self) -> None:
        """Take a snapshot whenever enough commits have come, until cancelled."""
        last = -1
        while True:
            await anyio.sleep(LOOK_SECONDS)
            try:
                if last < 0:
                    last = next(iter(await self.store.sequences()), 0)
                if self._replica.state.sequence - last < self._commits:
                    continue
                # Another coordinator may have been first.
                last = next(iter(await self.store.sequences()), 0)
                if self._replica.state.sequence - last >= self._commits:
                    last = (await self.take())["sequence"]
            except (KvplaneError, OSError) as error:
                _log.warning("snapshot_failed", error=str(error))

    async def take(self) -> dict[str, Any]:
        """Take a snapshot now, and let go those beyond `KEPT`."""
        async with self._one:
            begin = time.monotonic()
            sequence = self._replica.state.sequence
            known = await self.store.sequences()
            if sequence in known:
                return {"sequence": sequence, "changed": False}
            data, pause = await in_copy(partial(dump, self._replica.state))
            await self.store.put(sequence, data)
            for old in sorted([*known, sequence], reverse=True)[KEPT:]:
                await self.store.delete(old)
            took = time.monotonic() - begin
        _log.info("snapshot_taken", fleet=self._fleet, sequence=sequence, bytes=len(data), seconds=round(took, 2))
        return {"sequence": sequence, "bytes": len(data), "seconds": took, "pause": pause}

    async def compact(self, *, without_history: bool) -> dict[str, Any]:
        """Purge what neither the oldest snapshot nor the history needs. Raises `Conflict` when it can't be known."""
        sequences = await self.store.sequences()
        if not sequences:
            raise Conflict("there is no snapshot yet, so all of the log is needed; `kvplane snapshot take` makes one")
        bounds = {"snapshot": sequences[-1]}
        if not without_history:
            try:
                status: dict[str, Any] = await ask(
                    self._client, f"kv.{self._fleet}.history.status", api.StatusRequest(), seconds=HISTORY_SECONDS
                )
            except NoAnswer:
                raise Conflict(
                    "no historian answers, so it is not known what the history has stored; start one, or say "
                    "--without-history when there is to be none"
                ) from None
            bounds["history"] = status["stored"]
        upto = min(bounds.values())
        js = self._client.jetstream()
        before = await open_stream(js, self._fleet)
        try:
            if upto > before.first_seq:
                # The last one stays: with it the stream's first sequence says where the log begins.
                await js.purge_stream(stream_name(self._fleet), seq=upto)
        except (NatsError, JetStreamError) as error:
            raise LogAway(f"the log was not purged: {error!r}") from error
        after = await open_stream(js, self._fleet)
        _log.info("log_purged", fleet=self._fleet, first=after.first_seq, **bounds)
        return {
            "first": after.first_seq, "purged": after.first_seq - before.first_seq,
            "freed_bytes": max(0, before.bytes - after.bytes), **bounds,
        }  # fmt: skip
