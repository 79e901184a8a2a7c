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

from kvplane.events.errors import KvplaneError
from kvplane.events.log.stream import open_stream, stream_info
from kvplane.events.subjects import stream_name
from kvplane.projections.snapshot import dump
from kvplane.services.process.forked import in_copy
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Conflict, LogAway, NoAnswer
from kvplane.services.protocol.status import HistoryStatus
from kvplane.services.rpc.client import ask, of_fleet

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.services.replication.replica import Replica

SNAPSHOT_COMMITS = 200_000
"""So many commits after the last snapshot a coordinator takes one."""
SNAPSHOT_BYTES = 512 << 20
"""So many bytes of commits, too: large commits take longer to read again than small ones."""
KEPT = 3
"""Snapshots that are kept."""
LOOK_SECONDS = 5.0
HISTORY_SECONDS = 5.0

_log = structlog.get_logger("kvplane.snapshots")


class Compaction:
    """Takes snapshots of one replica's state, and purges the log."""

    def __init__(
        self, client: Client, replica: Replica, *, commits: int = SNAPSHOT_COMMITS, size: int = SNAPSHOT_BYTES,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:  # fmt: skip
        self._replica = replica
        self._client = client
        self._fleet = replica.state.fleet
        self._commits = commits
        self._look_seconds = look_seconds
        self.taken = 0
        self.failed = 0
        """Snapshots that were due and could not be taken."""
        self.last: dict[str, Any] = {}
        """What `take` said of the last one."""
        self._bytes = size
        self._store = replica.snapshots
        self._one = anyio.Lock()
        self._covered = 0
        """Sequence of the newest snapshot that was there when it was looked."""
        self._holes = 0
        """Messages that were missing inside the log then."""

    async def run(self) -> None:
        """Take a snapshot whenever enough commits or bytes have come, until cancelled."""
        replica = self._replica
        last, read = replica.began, 0
        while True:
            await anyio.sleep(self._look_seconds)
            few = replica.state.sequence - last < self._commits and replica.bytes_read - read < self._bytes
            try:
                if await self._cut_off():
                    _log.warning("log_begins_behind_snapshots", fleet=self._fleet, takes="a snapshot of what is known")
                    await self.take()
                if few:
                    continue
                # Another coordinator may have been first, and its snapshot says how far the log is covered.
                newest = next(iter(await self._store.sequences()), 0)
                if newest <= last:
                    newest = (await self.take())["sequence"]
                last, read = newest, replica.bytes_read
                await self._store.sweep()
            except (KvplaneError, OSError) as error:
                self.failed += 1
                _log.warning("snapshot_failed", error=str(error))

    async def _cut_off(self) -> bool:
        """Whether a replica that starts could not come here: somebody else purged the log, and no snapshot leads over it."""
        log = (await stream_info(self._client.jetstream(), self._fleet)).state
        holes, self._holes = self._holes, log.num_deleted or 0
        if self._holes > holes:
            return True
        if log.first_seq <= 1 or log.first_seq <= self._covered + 1:
            return False
        self._covered = next(iter(await self._store.sequences()), 0)
        return log.first_seq > self._covered + 1

    async def take(self) -> dict[str, Any]:
        """Take a snapshot now, and let go those beyond `KEPT`. Raises `Conflict` while the state is not that of the others."""
        async with self._one:
            if self._replica.checkpoints.differs:
                raise Conflict(
                    f"at checkpoint {self._replica.checkpoints.differs} this coordinator's state was not that of the other "
                    "replicas; a snapshot would spread it. Restart it; `kvplane doctor` says more"
                )
            begin = time.monotonic()
            sequence = self._replica.state.sequence
            known = await self._store.sequences()
            if sequence in known:
                return {"sequence": sequence, "changed": False}
            # The state may have gone on meanwhile.
            sequence = self._replica.state.sequence
            data, pause = await in_copy(partial(dump, self._replica.state))
            size = data.getbuffer().nbytes
            await self._store.put(sequence, data)
            for old in sorted([*known, sequence], reverse=True)[KEPT:]:
                await self._store.delete(old)
            took = time.monotonic() - begin
        _log.info("snapshot_taken", fleet=self._fleet, sequence=sequence, bytes=size, seconds=round(took, 2))
        self.taken += 1
        self.last = {"sequence": sequence, "bytes": size, "seconds": took, "pause": pause}
        return self.last

    async def compact(self, *, without_history: bool) -> dict[str, Any]:
        """Purge what neither the oldest snapshot nor the history needs. Raises `Conflict` when it can't be known."""
        sequences = await self._store.sequences()
        if not sequences:
            raise Conflict("there is no snapshot yet, so all of the log is needed; `kvplane snapshot take` makes one")
        js = self._client.jetstream()
        before = await open_stream(js, self._fleet)
        # From a snapshot before a hole nothing leads on.
        bounds = {"snapshot": sequences[0 if before.num_deleted else -1]}
        if not without_history:
            bounds["history"] = await self._stored()
        upto = min(bounds.values())
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

    async def _stored(self) -> int:
        """What every history that is kept has stored. Raises `Conflict` when that can't be known."""
        try:
            histories = await of_fleet(self._client, "kvplane-historian", self._fleet, seconds=1)
            stored = []
            for history in histories:
                subject = f"kv.{self._fleet}.history.{history['historian']}.status"
                request = messages.StatusRequest()
                status = await ask(self._client, subject, request, HistoryStatus, seconds=HISTORY_SECONDS)
                if not status.works:
                    raise Conflict(
                        f"it is not known what the history has stored: {status.failure}; mend that first, or say "
                        "--without-history when there is to be none"
                    )
                stored.append(status.stored)
            return min(stored)
        except (NoAnswer, ValueError, KeyError, NatsError):
            raise Conflict(
                "no historian answers, so it is not known what the history has stored; start one, or say "
                "--without-history when there is to be none"
            ) from None
