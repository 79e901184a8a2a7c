"""Checkpoints: every replica notes its digest at the same sequences and publishes it, so that one that differs is found.

A forked copy makes the digest; the replica stands still for the fork and no longer. Which sequences are checkpoints follows
from the log and the size of the state alone, so that all replicas note the same ones without a word. They travel on core
NATS (`kv.<fleet>.checkpoint.<writer>`) and are never stored; each service's `status` has its last few.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import msgspec
import structlog
from nats.errors import Error as NatsError

from kvplane.events.errors import BadName
from kvplane.events.log.deliveries import LEAVE_SECONDS
from kvplane.events.subjects import checkpoint_subject
from kvplane.projections.digest import digest
from kvplane.projections.overview import summary
from kvplane.services.process.forked import Copy
from kvplane.services.protocol.errors import WorkerDied
from kvplane.services.protocol.messages import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anyio.abc import TaskGroup
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from kvplane.projections.fleet import FleetState

LEAST_COMMITS = 1000
"""Checkpoints of a small fleet are so many commits apart."""
SIZE_COMMITS = 25
"""Those of a large one are a commit apart for so many things in the state: a digest's share in the work stays the same."""
MOST_WIDER = 6
"""A replica that can't keep up notes every second checkpoint, every fourth, ... up to every 2^6th."""
CALM = 4
"""After so many in time it tries more of them."""
KEPT = 8
"""Checkpoints that are remembered."""
WAIT_SECONDS = 1.0
"""How long others have to publish theirs before a replica reports that it is alone with its own."""
DIGEST_DIGITS = 32
WRITERS_LIMIT = 1000
"""Most replicas of which one checkpoint is remembered."""

_log = structlog.get_logger("kvplane.checkpoints")


class Schedule(NamedTuple):
    """When checkpoints are noted and compared. All replicas of a fleet must have the same `least_commits`."""

    least_commits: int = LEAST_COMMITS
    wait_seconds: float = WAIT_SECONDS


SCHEDULE = Schedule()

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Checkpoint).decode


def due(state: FleetState, wider: int = 0, *, least_commits: int = LEAST_COMMITS) -> bool:
    """Whether the state's sequence is a checkpoint; one of those that are 2^`wider` times as far apart.

    Wider spacings are multiples of narrower ones: those who note fewer checkpoints note some of those that others do.
    """
    if state.sequence % least_commits:
        return False
    things = sum(index.block_copies for index in state.caches.by_model.values())
    things += len(state.sessions) + len(state.load.running) + len(state.writers)
    spacing = least_commits << (things // SIZE_COMMITS // least_commits).bit_length()
    return state.sequence % (spacing << wider) == 0


def odd(digests: Mapping[str, str]) -> list[str]:
    """Writers whose digest is not that of more than half of them; all of them when there is no such digest."""
    if len(set(digests.values())) < 2:
        return []
    common, count = Counter(digests.values()).most_common(1)[0]
    return [writer for writer, own in digests.items() if own != common or 2 * count <= len(digests)]


class Checkpoints:
    """The checkpoints of one replica, and what it receives of those of others."""

    def __init__(self, client: Client, state: FleetState, writer: str, schedule: Schedule = SCHEDULE) -> None:
        self.writer = writer
        self._least_commits, self._wait_seconds = schedule
        self.own: dict[int, str] = {}
        """Digests at the last checkpoints, by sequence."""
        self.differs = 0
        """The newest checkpoint at which this replica was not with the majority, until one where it is; else 0."""
        self.mismatches = 0
        """How many checkpoints found it so."""
        self.worst_pause = 0.0
        """The longest that a fork stopped this process, in seconds."""
        self._client = client
        self._state = state
        self._received: dict[int, dict[str, str]] = {}
        self._waiting: set[int] = set()
        """Own checkpoints that other replicas may not have published yet."""
        # Not a lock: who begins a digest is not who waits for it.
        self._one = anyio.Semaphore(1)
        self._group: TaskGroup | None = None
        self._last = (0, "")
        self._wider = 0
        self._calm = 0

    async def run(self) -> None:
        """Note and compare until cancelled; a replica that still reads the past does not run this yet."""
        if not self.writer:
            return
        subscription = await self._client.subscribe(
            checkpoint_subject(self._state.fleet, "*"), cb=self._receive_message
        )
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                await anyio.sleep_forever()
        finally:
            self._group = None
            with anyio.move_on_after(LEAVE_SECONDS, shield=True), suppress(NatsError, OSError):
                await subscription.unsubscribe()

    def applied(self) -> None:
        """A commit was applied: note a checkpoint if this is one, unless a digest is still in the making."""
        if self._state.sequence % self._least_commits or self._group is None:
            return
        if not due(self._state, self._wider, least_commits=self._least_commits):
            return
        if not self._one.value:
            # Too slow for these: of rarer ones others that are slow note the same.
            self._wider, self._calm = min(self._wider + 1, MOST_WIDER), 0
            return
        self._calm += 1
        if self._calm > CALM and self._wider:
            self._wider, self._calm = self._wider - 1, 0
        self._one.acquire_nowait()
        try:
            copy = self._copy()
        except OSError as error:
            self._one.release()
            _log.warning("checkpoint_failed", sequence=self._state.sequence, error=str(error))
        else:
            self._group.start_soon(self._note, copy, self._state.sequence)

    def _copy(self) -> Copy:
        copy = Copy(partial(_digest, self._state))
        self.worst_pause = max(self.worst_pause, copy.pause)
        return copy

    async def _note(self, copy: Copy, sequence: int) -> None:
        try:
            own = (await copy.result()).data.getvalue().decode()
        except (WorkerDied, OSError) as error:
            _log.warning("checkpoint_failed", sequence=sequence, error=str(error))
            return
        finally:
            self._one.release()
        self.note(sequence, own)
        message = _encode(Checkpoint(self.writer, sequence, own))
        with suppress(NatsError, OSError):
            await self._client.publish(checkpoint_subject(self._state.fleet, self.writer), message)
        await anyio.sleep(self._wait_seconds)
        self.compare(sequence)

    async def now(self) -> dict[str, Any]:
        """What the state holds, in numbers, with its digest. Raises `WorkerDied` or `OSError`."""
        async with self._one:
            found = summary(self._state, digests=False)
            if self._last[0] != self._state.sequence:
                sequence, copy = self._state.sequence, self._copy()
                self._last = (sequence, (await copy.result()).data.getvalue().decode())
            return {**found, "digest": self._last[1]}

    async def _receive_message(self, message: Msg) -> None:
        try:
            checkpoint = _decode(message.data)
            spoken_for = message.subject == checkpoint_subject(self._state.fleet, checkpoint.writer)
        except (msgspec.DecodeError, BadName, UnicodeError, RecursionError) as error:
            _log.debug("bad_checkpoint", subject=message.subject, error=str(error))
            return
        if spoken_for and checkpoint.writer != self.writer:
            self.receive(checkpoint)

    def note(self, sequence: int, own: str) -> None:
        """This replica's digest at a checkpoint."""
        self.own[sequence] = own
        for old in sorted(self.own)[:-KEPT]:
            del self.own[old]
        self._waiting.add(sequence)

    def compare(self, sequence: int) -> None:
        """Replicas as fast as this one have sent their digests by now: whose digest nobody else has is judged from here on."""
        self._waiting.discard(sequence)
        self._judge(sequence)

    def receive(self, checkpoint: Checkpoint) -> None:
        """Another replica's digest. Those of the future are kept as well: this one may be behind, or slower with its digest."""
        if (
            checkpoint.sequence % self._least_commits
            or checkpoint.sequence < min(self.own, default=0)
            or len(checkpoint.digest) != DIGEST_DIGITS
        ):
            return
        received = self._received.setdefault(checkpoint.sequence, {})
        if len(received) < WRITERS_LIMIT or checkpoint.writer in received:
            received[checkpoint.writer] = checkpoint.digest
        if len(self._received) > 2 * KEPT:
            # What is farthest from where this replica is shows the least: old ones, and a future that nobody can know.
            del self._received[max(self._received, key=lambda sequence: abs(sequence - self._state.sequence))]
        self._judge(checkpoint.sequence)

    def _judge(self, sequence: int) -> None:
        own = self.own.get(sequence)
        digests = self._received.get(sequence, {})
        if own is None or not digests or sequence in self._waiting:
            return
        others = odd({**digests, self.writer: own})
        if self.writer in others:
            if self.differs != sequence:
                self.mismatches += 1
            self.differs = max(self.differs, sequence)
            _log.error(
                "replica_differs", fleet=self._state.fleet, writer=self.writer, sequence=sequence, digest=own,
                others=digests, remedy="restart it; if it differs again, report it with the log. `kvplane doctor` says more",
            )  # fmt: skip
            return
        if others:
            _log.warning("other_replica_differs", fleet=self._state.fleet, writers=others, sequence=sequence)
        if sequence >= self.differs:
            self.differs = 0

    def status(self) -> dict[str, Any]:
        """What `status` shows of them."""
        return {
            "checkpoints": {str(sequence): own for sequence, own in sorted(self.own.items())},
            "differs": self.differs,
            "mismatches": self.mismatches,
        }


def _digest(state: FleetState) -> bytes:
    return digest(state).encode()
