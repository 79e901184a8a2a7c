"""A replica: the fleet's state, kept up to date by following the log, for services that decide on it."""

from __future__ import annotations

import gc
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import structlog

from kvplane.events.errors import LogError, LogHole, LogPurged, LogUnavailable
from kvplane.events.log.follow import Follower
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.projections.errors import BadSnapshot
from kvplane.projections.fleet import FleetState
from kvplane.projections.overview import summary
from kvplane.projections.snapshot import load, peek
from kvplane.services.process.hugepages import collapse
from kvplane.services.process.version import package_version
from kvplane.services.protocol.errors import LogAway, NoAnswer, NotReady, NotVouched, ServiceFault, WorkerDied
from kvplane.services.protocol.status import ReplicaStatus
from kvplane.services.replication.checkpoints import SCHEDULE, Checkpoints, Schedule
from kvplane.services.replication.vouching import check
from kvplane.services.rpc.pieces import snapshot_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.projections.skips import Applied

RECENT_SECONDS = 60.0
"""So much is read from the log, not from a snapshot of it: whoever routes learns of others' decisions there
(`services.routing.overlay.RECENT_SECONDS`)."""
SNAPSHOT_TRIES = 30
"""How often snapshots are asked for when the log alone is not enough."""
HISTORIAN_SECONDS = 20.0
"""So long a historian is waited for: it may start at the same time."""
HISTORIAN_AGAIN_SECONDS = 1.0
UNABLE = 503
"""Status of a historian that is there and can't work yet."""
SKIPS_KNOWN = 10_000
"""For how many skipped commits their reason is kept for those who wait for their own."""

Status = TypeVar("Status", bound=ReplicaStatus)

_log = structlog.get_logger("kvplane.replica")


class Replica:
    """One fold of a fleet's log. `before` is called before a message is applied, `observe` with what became of it.

    With the name of a `writer` it takes part in the comparison of digests at checkpoints. What it must have from a historian is
    used only when running replicas vouch for it, or with `trust_history`.
    """

    def __init__(
        self, client: Client, fleet: str, observe: Callable[[Message, Applied], None] | None = None,
        *, before: Callable[[], None] | None = None, writer: str = "", recent_seconds: float = RECENT_SECONDS,
        schedule: Schedule = SCHEDULE,
        trust_history: bool = False,
    ) -> None:  # fmt: skip
        self.writer = writer
        self.state = FleetState(fleet)
        self.checkpoints = Checkpoints(client, self.state, writer, schedule)
        self.follower = Follower(client, fleet, self._handle, apart=True)
        self.snapshots = SnapshotStore(client, fleet)
        self._client = client
        self.bytes_read = 0
        """Bytes of commits that were applied since it began."""
        self.began = 0
        """Sequence of the snapshot that this replica began with; 0 when it began with the log."""
        self._trust_history = trust_history
        self._distrust = ""
        """Why what a historian gave was not used."""
        self._observe = observe
        self._before = before
        self._recent = int(recent_seconds * 1e9)
        self._skips: dict[int, tuple[str, str]] = {}
        self._order: deque[int] = deque()
        self._skipped_before: dict[str, float] = {}
        """For each reason a time in unix seconds after which no commit was skipped for it."""
        self._advanced = anyio.Event()
        self._waiting = 0

    @property
    def ready(self) -> bool:
        """Whether the log has been read to where its end was when the replica started."""
        return self.follower.caught_up.is_set()

    def check_ready(self) -> None:
        """Raise `NotReady` while the log is still being read."""
        if not self.ready:
            raise NotReady(
                f"the log is still being read: {self.state.sequence} of {self.follower.target} commits; try again soon"
            )

    def _handle(self, message: Message) -> None:
        if self._before is not None:
            self._before()
        time_before, set_back = self.state.time, self.state.set_back
        applied = self.state.apply(message)
        if self.state.set_back != set_back:
            _log.warning(
                "log_time_set_back", sequence=message.sequence, seconds=round((time_before - message.time) / 1e9, 3),
                remedy="a server's clock was ahead; set the clocks right (NTP)",
            )  # fmt: skip
        self.bytes_read += len(message.body)
        if applied.skipped is not None:
            self._skips[message.sequence] = (applied.skipped, applied.detail)
            self._order.append(message.sequence)
            self._skipped_before[applied.skipped] = message.time / 1e9
            if len(self._order) > SKIPS_KNOWN:
                del self._skips[self._order.popleft()]
            # Of the past the counts are enough.
            log = _log.error if applied.skipped == "defect" else _log.warning if self.ready else _log.debug
            log(
                "commit_skipped",
                sequence=message.sequence,
                subject=message.subject,
                reason=applied.skipped,
                detail=applied.detail,
            )
        if self._observe is not None:
            self._observe(message, applied)
        self.checkpoints.applied()
        if self._waiting:
            self._advanced.set()
            self._advanced = anyio.Event()

    async def run(self) -> None:
        """Follow the log until cancelled, from the newest snapshot that can be used."""
        await self._restore()
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow)
            await self.follower.caught_up.wait()
            # Millions of long-lived segments: keep the collector from walking them again and again.
            gc.collect()
            gc.freeze()
            # Nobody waits for an answer yet; copies that are forked later are cheaper.
            collapse()
            group.start_soon(self.checkpoints.run)
            _log.info("replica_ready", fleet=self.state.fleet, sequence=self.state.sequence, skipped=self.state.skipped)

    async def _follow(self) -> None:
        """Follow the log; where it was purged beyond what is applied, or has a hole, go on from a snapshot."""
        while True:
            try:
                await self.follower.run()
            except (LogPurged, LogHole) as error:
                _log.warning("log_purged_meanwhile", applied=self.state.sequence, error=str(error))
                if not await self._go_on(hole=isinstance(error, LogHole)):
                    if self._distrust:
                        raise type(error)(f"{error}; what one gave was not used: {self._distrust}") from error
                    raise

    async def _go_on(self, *, hole: bool) -> bool:
        """Begin again with a snapshot of later than now; whether there is one."""
        applied = self.state.sequence
        for _ in range(SNAPSHOT_TRIES):
            if await self._restore(hole=hole):
                return self.state.sequence > applied
            await anyio.sleep(1)
        return False

    async def _restore(self, *, hole: bool = False) -> bool:
        """Begin with a snapshot, if one leads on; what can't be used is passed over with a warning.

        With a `hole` what comes next is missing on the log. False when it could not be known whether there is one.
        """
        applied = self.state.sequence
        try:
            recent = []
            for sequence in await self.snapshots.sequences():
                if sequence <= applied:
                    break
                # What other routers decided in the last minute is read from the log, not from a snapshot of it ...
                if not await self._load(sequence, before=None if hole else time.time_ns() - self._recent):
                    recent.append(sequence)
                if self.state.sequence > applied:
                    return True
            log = await open_stream(self._client.jetstream(), self.state.fleet)
            if hole or log.first_seq > applied + 1:
                # ... unless the log has it no more.
                for sequence in reversed(recent):
                    await self._load(sequence, before=None)
                    if self.state.sequence > applied:
                        return True
                # Of a log that was purged whole the first sequence is the next one.
                await self._ask_history(log.last_seq if hole else min(log.first_seq, log.last_seq))
        except LogError as error:
            _log.warning("snapshots_not_read", error=str(error))
            return False
        return True

    async def _ask_history(self, at: int) -> None:
        """Begin with what a historian makes of its rows up to `at`: no snapshot leads to what the log has.

        So it is when the log was purged and the fold of this kvplane is another one than that of the snapshots, or when
        it was purged by hand.
        """
        _log.warning("no_snapshot_to_begin_with", fleet=self.state.fleet, sequence=at, asks="the historian")
        self._distrust = ""
        try:
            data = await self._from_history(at)
            if not self._trust_history:
                await check(self._client, self.state.fleet, data, self.writer)
            self._begin(data)
        except NotVouched as error:
            self._distrust = str(error)
            _log.error("history_not_vouched_for", error=str(error))
        except (ServiceFault, BadSnapshot) as error:
            _log.error("history_does_not_help", error=str(error))

    async def _from_history(self, at: int) -> bytes:
        """What a historian gives; one that starts beside this replica is waited for. Raises `Refused` or `NoAnswer`."""
        give_up = anyio.current_time() + HISTORIAN_SECONDS
        while True:
            try:
                return await snapshot_at(self._client, self.state.fleet, at)
            except ServiceFault as error:
                # One that is there and can't work says so, perhaps only until its log is there.
                there = not isinstance(error, NoAnswer) and getattr(error, "status", 0) != UNABLE
                if there or anyio.current_time() >= give_up:
                    raise
                _log.warning("historian_waited_for", fleet=self.state.fleet, error=str(error))
            await anyio.sleep(HISTORIAN_AGAIN_SECONDS)

    def _begin(self, data: bytes) -> None:
        self.state.become(load(self.state.fleet, data))
        self.began = self.follower.applied = self.state.sequence
        # A snapshot counts what was skipped, and does not record when.
        self._skipped_before = dict.fromkeys(self.state.skipped, self.state.time / 1e9)
        _log.info("snapshot_loaded", fleet=self.state.fleet, sequence=self.began)

    async def _load(self, sequence: int, *, before: int | None) -> bool:
        """Begin with this snapshot if it can be used; false when it can, but is of a later time than `before`."""
        try:
            data = await self.snapshots.get(sequence)
            if before is not None and peek(data).time > before:
                return False
            self._begin(data)
        except (BadSnapshot, LogUnavailable) as error:
            _log.warning("snapshot_passed_over", sequence=sequence, error=str(error))
        return True

    async def about(self, form: type[Status], *, digests: bool, **own: Any) -> Status:  # noqa: ANN401 - its fields
        """The status of the service whose replica this is; `own` are the fields that `form` has beside.

        With `digests` also the digest now. Raises `WorkerDied`.
        """
        whole = {
            **own,
            "writer": self.writer,
            "version": package_version(),
            "clock": time.time(),
            "ready": self.ready,
            "healthy": self.follower.healthy,
            "began": self.began,
            "skipped_before": dict(self._skipped_before),
            **self.checkpoints.status(),
        }
        try:
            return form(**whole, **(await self.checkpoints.now() if digests else summary(self.state, digests=False)))
        except OSError as error:
            raise WorkerDied(f"no copy of the process could be made for the digest: {error}") from error

    async def reached(self, sequence: int, *, seconds: float = 10.0) -> None:
        """Wait until this sequence is applied. Raises `LogAway` after `seconds`."""
        self._waiting += 1
        try:
            with anyio.fail_after(seconds):
                while self.state.sequence < sequence:
                    await self._advanced.wait()
        except TimeoutError:
            raise LogAway(f"commit {sequence} was not read back from the log in {seconds:g} s") from None
        finally:
            self._waiting -= 1

    def skipped(self, sequence: int) -> tuple[str, str] | None:
        """Why a recent commit was skipped: reason and detail."""
        return self._skips.get(sequence)
