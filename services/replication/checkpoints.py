"""Checkpoints: every replica notes its digest at the same sequences and publishes it, so that one that differs is found.

A forked copy makes the digest; the replica stands still for the fork and no longer. Which sequences are checkpoints follows
from the log and the size of the state alone, so that all replicas note the same ones without a word. They travel on core
NATS (`kv.<fleet>.checkpoint.<role>.<writer>`) and are never stored; each service's `status` has its last few.

Not everyone has a vote. Coordinators do, whose credentials alone may speak for one; two or more of them that agree decide. A
router has one when it has written to the log, and only for as long as nobody else has spoken in its name.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio
import msgspec
import structlog
from nats.errors import Error as NatsError

from kvplane.events.errors import BadName
from kvplane.events.log.deliveries import LEAVE_SECONDS
from kvplane.events.subjects import checkpoint_subject, subject
from kvplane.projections.digest import digest
from kvplane.projections.overview import summary
from kvplane.services.process.forked import Copy
from kvplane.services.protocol.errors import WorkerDied
from kvplane.services.protocol.messages import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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
LOGGED_MOST = 4
"""So many different verdicts on one checkpoint are logged."""
NAMED_MOST = 8
"""So many replicas are named in a line of the log."""
COORDINATOR = "coordinator"

Name = TypeVar("Name")

_log = structlog.get_logger("kvplane.checkpoints")


class Schedule(NamedTuple):
    """When checkpoints are noted and compared. All replicas of a fleet must have the same `least_commits`."""

    least_commits: int = LEAST_COMMITS
    wait_seconds: float = WAIT_SECONDS


SCHEDULE = Schedule()

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Checkpoint).decode


class Voter(NamedTuple):
    """A replica: its role, by the subject that it publishes on, and its writer's name."""

    role: str
    writer: str


def _role(writer: str) -> str:
    """Role of a writer of this process's own."""
    return COORDINATOR if writer.startswith(f"{COORDINATOR}-") else "router"


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


def odd(digests: Mapping[Name, str], deciding: Collection[Name] = ()) -> list[Name]:
    """Whose digest is not that of more than half of them; all when there is no such digest.

    Two or more that are `deciding` decide alone, if more than half of them agree.
    """
    if len(set(digests.values())) < 2:
        return []
    for voters in (deciding, digests):
        if len(voters) > 1:
            common, count = Counter(digests[voter] for voter in voters).most_common(1)[0]
            if 2 * count > len(voters):
                return [voter for voter, own in digests.items() if own != common]
    return list(digests)


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
        self._received: dict[int, dict[Voter, str]] = {}
        """Digests of others; an empty one of whom different ones came."""
        self._logged: dict[int, list[tuple[bool, frozenset[Voter]]]] = {}
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
            checkpoint_subject(self._state.fleet, "*", "*"), cb=self._receive_message
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
            where = checkpoint_subject(self._state.fleet, _role(self.writer), self.writer)
            await self._client.publish(where, message)
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
            role = message.subject.split(".")[3]
            spoken_for = message.subject == checkpoint_subject(self._state.fleet, role, checkpoint.writer)
        except (msgspec.DecodeError, BadName, UnicodeError, IndexError, RecursionError) as error:
            _log.debug("bad_checkpoint", subject=message.subject, error=str(error))
            return
        if spoken_for and checkpoint.writer != self.writer:
            self.receive(checkpoint, role)

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

    def receive(self, checkpoint: Checkpoint, role: str) -> None:
        """Another replica's digest. Those of the future are kept as well: this one may be behind, or slower with its digest."""
        if (
            checkpoint.sequence % self._least_commits
            or checkpoint.sequence < min(self.own, default=0)
            or len(checkpoint.digest) != DIGEST_DIGITS
        ):
            return
        received = self._received.setdefault(checkpoint.sequence, {})
        voter = Voter(role, checkpoint.writer)
        votes = self._votes(voter)
        if voter not in received and len(received) >= WRITERS_LIMIT:
            stranger = next((each for each in received if votes and not self._votes(each)), None)
            if stranger is None:
                return
            del received[stranger]
        # Of two that speak in one name neither is believed.
        received[voter] = checkpoint.digest if received.get(voter, checkpoint.digest) == checkpoint.digest else ""
        if len(self._received) > 2 * KEPT:
            # What is farthest from where this replica is shows the least: old ones, and a future that nobody can know.
            del self._received[max(self._received, key=lambda sequence: abs(sequence - self._state.sequence))]
        if votes:
            self._judge(checkpoint.sequence)

    def _votes(self, voter: Voter) -> bool:
        """Whether somebody's digest counts."""
        if voter.role == COORDINATOR:
            return True
        return (subject(self._state.fleet, "access", voter.writer), voter.writer) in self._state.writers

    def _judge(self, sequence: int) -> None:
        own = self.own.get(sequence)
        received = self._received.get(sequence, {})
        digests = {voter: found for voter, found in received.items() if found and self._votes(voter)}
        if own is None or not digests or sequence in self._waiting:
            return
        me = Voter(_role(self.writer), self.writer)
        digests[me] = own
        others = odd(digests, [voter for voter in digests if voter.role == COORDINATOR])
        verdict = (me in others, frozenset(others))
        logged = self._logged.setdefault(sequence, [])
        news = verdict not in logged and len(logged) < LOGGED_MOST
        if news:
            logged.append(verdict)
        for old in sorted(self._logged)[: -2 * KEPT]:
            del self._logged[old]
        if me in others:
            if self.differs != sequence:
                self.mismatches += 1
            self.differs = max(self.differs, sequence)
            if news:
                _log.error(
                    "replica_differs", fleet=self._state.fleet, writer=self.writer, sequence=sequence, digest=own,
                    others={voter.writer: digests[voter] for voter in list(digests)[:NAMED_MOST] if voter != me},
                    of=len(digests),
                    remedy="restart it; if it differs again, report it with the log. `kvplane doctor` says more",
                )  # fmt: skip
            return
        if others and news:
            named = [voter.writer for voter in others[:NAMED_MOST]]
            _log.warning(
                "other_replica_differs", fleet=self._state.fleet, writers=named, of=len(others), sequence=sequence
            )
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
