"""Which of an engine's batches were received, and which life of the engine they are of. Pure.

Batches are numbered from 0 in each life, and nothing else on the wire tells lives apart. What was lost is asked of the engine's
replay buffer, from the last batch that was applied: when that one comes back byte for byte (every batch holds the time at
which it was made), it is the same life. A hole that the buffer can't fill makes all that was known uncertain: the cache is
reported as cleared and learned anew from what is left.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from kvplane.events.hashing import unpack_hashes
from kvplane.events.types import CacheCleared
from kvplane.services.engines.dialect import decode
from kvplane.services.engines.groups import Group
from kvplane.services.protocol.errors import BadBatch, EngineUnfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.types import Event
    from kvplane.services.engines.translate import Translator
    from kvplane.services.protocol.remembered import Remembered

Numbered = tuple[int, bytes]
"""A batch's number and its bytes."""


class Verdict(Enum):
    """What a look at the engine's replay buffer has shown."""

    SAME = "same"
    """Nothing is missing."""
    GAP = "gap"
    """Something is missing for ever; what is known was learned anew and must be reported anew."""
    RESTARTED = "restarted"
    """The engine has begun another life; nothing that was known holds."""


class Look(NamedTuple):
    """Outcome of a look. `events` goes on from what was reported before, when there was a position and nothing is missing."""

    verdict: Verdict
    events: list[Event]
    reason: str = ""


class Track:
    """The position in one engine's batches. `live` takes batches as they come, `resync` what the replay buffer gave.

    Both raise `EngineUnfit` for batches of another data-parallel rank than `ranks`; where those are none, than the first one's.
    """

    def __init__(
        self, translator: Translator, *, ranks: frozenset[int] = frozenset(), where: str = "its endpoint"
    ) -> None:
        self.translator = translator
        self._ranks = ranks
        self._where = where
        self.next: int | None = None
        """Number of the batch that comes next; none while no position is known."""
        self.adrift = False
        """Without a position, and none can be had: the next batch gives it."""
        self.gaps = 0
        self.applied = 0
        """Batches that were applied, replayed ones included."""
        self.unreadable = 0
        """Batches that could not be decoded, since the last that could."""
        self.overfull = ""
        """Why all was forgotten because more was held than fits, the last time; empty when it never was."""
        self._print: int | None = None
        self._from_log = False
        """What is known was read from the log, and the engine was not asked since."""

    @property
    def ask_from(self) -> int:
        """Number of the first batch to ask of the replay buffer."""
        return 0 if self.next is None or self._from_log else max(0, self.next - 1)

    @property
    def position(self) -> int:
        """Number of the last batch that was applied; 0 before the first."""
        return max(0, (self.next or 0) - 1)

    def restore(self, before: Remembered, position: int) -> None:
        """Go on from what the log says: what is held, and the last batch of which it knows."""
        for tier, known in before.engine_hashes().items():
            self.translator.restore(tier, known)
        for number, (kind, window, span, hashes, names) in before.groups.items():
            group = Group(kind, window, span)
            self.translator.restore_group(number, group, dict(zip(names, unpack_hashes(hashes), strict=True)))
        self.next, self._from_log = position + 1, True

    def restart(self) -> None:
        """Know nothing: another life begins."""
        self.translator.forget()
        self.next, self._print, self.adrift, self._from_log = None, None, False, False

    def live(self, number: int, payload: bytes) -> list[Event] | None:
        """Events of a batch that was published; none when the replay buffer must be asked before it can be applied."""
        if self.adrift:
            self.adrift, self.next = False, number
        if self._from_log or number != self.next:
            return None
        try:
            return self._apply(number, payload)
        except BadBatch as error:
            self._lost(number + 1, payload)
            return self.cleared(f"gap: {error}")

    def cleared(self, reason: str) -> list[Event]:
        """The event that takes back all that was reported."""
        translator = self.translator
        return [CacheCleared(translator.node, translator.epoch, self.position, reason[:500])]

    def resync(
        self, replies: Sequence[Numbered], *, ended: bool, same_life: bool | None, missing: bool = False
    ) -> Look:
        """Go on with what the replay buffer gave, all that it has from `ask_from` on, in order.

        `ended` is whether it came to its end, `same_life` what is known from elsewhere, `missing` that a later batch
        was received.
        """
        from_log, self._from_log = self._from_log, False
        if not ended:
            if same_life is False:
                return Look(Verdict.RESTARTED, [])
            if self.adrift:
                # Nothing is known since then, and that was said.
                return Look(Verdict.SAME, [])
            if self.next is not None and same_life and not from_log and not missing:
                return Look(Verdict.SAME, [])
            self._lost(0)
            self.next, self.adrift = None, True
            return Look(Verdict.GAP, [], "gap: the engine's replay endpoint does not answer")
        self.adrift = False
        if self.next is None:
            if self._learn(replies, 0) and (not replies or not replies[0][0]):
                return Look(Verdict.SAME, [])
            return Look(Verdict.GAP, [], "gap: the engine's replay buffer does not reach back to its beginning")
        if from_log:
            return self._on_from_log(replies, same_life=same_life)
        last = self.next - 1
        if last < 0:
            return self._go_on(replies)
        if not replies or same_life is False:
            return Look(Verdict.RESTARTED, [])
        first, payload = replies[0]
        if first == last and self._print is not None:
            if xxh3_64_intdigest(payload) != self._print:
                return Look(Verdict.RESTARTED, [])
            return self._go_on(replies[1:])
        if first == last + 1 and same_life:
            return self._go_on(replies)
        return self._gap(replies, f"gap: batches from {last + 1} on are no longer in the engine's replay buffer")

    def _on_from_log(self, replies: Sequence[Numbered], *, same_life: bool | None) -> Look:
        """Go on where the log ends. Some of its last batch may be missing there."""
        last = self.position
        if same_life is not True or not replies or replies[-1][0] < last:
            return Look(Verdict.RESTARTED, [])
        if replies[0][0] == 0 and replies[-1][0] == len(replies) - 1:
            # The buffer holds all that the engine ever published, so nothing need be taken from the log.
            self.translator.forget()
            return Look(
                Verdict.SAME if self._learn(replies, 0) else Verdict.GAP, [], "gap: a batch can't be understood"
            )
        if not any(number == last for number, _ in replies):
            return self._gap(replies, f"gap: the log ends at batch {last}, the replay buffer begins at {replies[0][0]}")
        for number, payload in replies:
            if number < last:
                self._teach(payload)
        self.next = last
        return self._go_on([pair for pair in replies if pair[0] >= last], again=last)

    def _teach(self, payload: bytes) -> None:
        try:
            self.translator.learn(decode(payload))
        except BadBatch:
            return

    def _apply(self, number: int, payload: bytes, *, again: bool = False) -> list[Event]:
        self.unreadable += 1
        batch = decode(payload)
        self.unreadable = 0
        self._check_rank(batch.rank)
        events = self.translator.apply(batch, number, again=again)
        self.next, self._print = number + 1, xxh3_64_intdigest(payload)
        self.applied += 1
        overfull = self.translator.overfull()
        if overfull:
            # What is held besides what this batch stores may have gone long ago.
            self.gaps += 1
            self.overfull = overfull
            self.translator.counts["overfull"] += 1
            self.translator.clear()
            events = [*self.cleared(f"gap: {overfull}"), *self.translator.apply(batch, number)]
            if self.translator.overfull():
                self.translator.clear()
                events = self.cleared(f"gap: {overfull}")
        return events

    def _check_rank(self, rank: int | None) -> None:
        if rank is None or rank in self._ranks:
            return
        if self._ranks:
            wanted = max(self._ranks)
            raise EngineUnfit(
                f"what comes at {self._where} is of data-parallel rank {rank}, and that of rank {wanted} was to come; give "
                f"--rank {rank}, or the endpoint of rank {wanted}; two ranks can't share one"
            )
        self._ranks = frozenset({rank})

    def _lost(self, following: int, payload: bytes | None = None) -> None:
        """What a batch held is lost, and with it all certainty."""
        self.gaps += 1
        self.translator.clear()
        self.next, self._print = following, None if payload is None else xxh3_64_intdigest(payload)

    def _go_on(self, replies: Sequence[Numbered], *, again: int | None = None) -> Look:
        """Apply batches behind the position, as long as none is missing."""
        events: list[Event] = []
        for at, (number, payload) in enumerate(replies):
            if number != self.next:
                return self._gap(replies[at:], f"gap: batches {self.next} to {number - 1} do not exist")
            try:
                events += self._apply(number, payload, again=again == number)
            except BadBatch as error:
                self._lost(number + 1, payload)
                self._learn(replies[at + 1 :], number + 1)
                return Look(Verdict.GAP, [], f"gap: {error}")
        return Look(Verdict.SAME, events)

    def _gap(self, replies: Sequence[Numbered], reason: str) -> Look:
        """Forget what is held, and learn what can be known from these batches on."""
        self._lost(replies[0][0])
        self._learn(replies, replies[0][0])
        return Look(Verdict.GAP, [], reason)

    def _learn(self, replies: Sequence[Numbered], following: int) -> bool:
        """Take batches without events, wherever they begin. True when none is missing among them."""
        whole = True
        if replies:
            following = replies[0][0]
        if self.next != following:
            self.next, self._print = following, None
        for number, payload in replies:
            if number != self.next:
                whole = False
                self._lost(number)
            try:
                self._apply(number, payload)
            except BadBatch:
                whole = False
                self._lost(number + 1, payload)
        return whole


def joined(held: Sequence[Numbered], replies: Sequence[Numbered]) -> list[Numbered]:
    """Batches that were received and batches that were replayed, of one life, in order."""
    found = dict(held)
    found.update(replies)
    if replies:
        # What was received before the question and is beyond the answer is of another life.
        last = replies[-1][0]
        found = {number: payload for number, payload in found.items() if number <= last}
    return sorted(found.items())
