"""How much one node may write: a token bucket, by the log's time.

Every replica folds what every node writes, so one node that writes without end would take the time of all. The server's time
is the log's, so here it can be held: what goes beyond is skipped, before it is decoded, by every replica alike. Adapters and
simulated nodes wait before they write, and never meet it.

What is counted is the work of a fold, as many blocks as could be stored in that time. It follows from the events alone, so
that commits made again from the history count the same. An engine that computes 100,000 tokens a second in blocks of 16, and
forgets as many, tells 12,500 blocks a second.

The form is the generic cell rate algorithm (ITU-T I.371): one number, the time at which the bucket is full again.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.types import Event

ALLOWANCE_FORMAT = 4
"""From this format of the log on, nodes are held to it."""
BLOCKS_A_SECOND = 65_536
"""So much one node may write for ever, on each of its subjects."""
BLOCKS_AT_ONCE = 262_144
"""So much at once when it was silent before; the commit that goes beyond is still taken."""
COMMIT_BLOCKS, EVENT_BLOCKS = 64, 8
"""What a commit, and each of its events, counts beside its blocks."""

_NS = 1_000_000_000
NS_AT_ONCE = BLOCKS_AT_ONCE * _NS // BLOCKS_A_SECOND
"""The time in which so much is there again."""
_NS_A_BLOCK = _NS // BLOCKS_A_SECOND
_HASH = 8
_HASHES = attrgetter("hashes")


def _size(event: Event) -> int:
    """Bytes of an event's hashes, whatever it is."""
    return sum(len(getattr(event, field, b"")) for field in ("hashes", "stored", "evicted"))


def after(full: int, now: int, events: Sequence[Event]) -> int:
    """When the bucket is full again once a commit with these events was taken; all in unix nanoseconds of the log.

    While `full` is more than `NS_AT_ONCE` ahead, nothing may be written.
    """
    try:
        # Mostly all of them have these alone, and then it is done without a step of Python for each.
        size = sum(map(len, map(_HASHES, events)))
    except AttributeError:
        size = sum(map(_size, events))
    blocks = COMMIT_BLOCKS + EVENT_BLOCKS * len(events) + size // _HASH
    return (full if full > now else now) + blocks * _NS_A_BLOCK  # noqa: FURB136 - each commit's, and `max` takes twice as long


def cost(event: Event) -> int:
    """What an event counts, in blocks."""
    return EVENT_BLOCKS + _size(event) // _HASH


class Pace:
    """For who writes as a node: how long to wait before the next commit.

    It begins with an empty bucket, since whoever wrote there before may have emptied it, and it never takes all: commits
    take longer on one day than on another until they are on the log.
    """

    RATE = 0.8 * BLOCKS_A_SECOND
    SPARE_SECONDS = BLOCKS_AT_ONCE / BLOCKS_A_SECOND / 2

    def __init__(self, now: float) -> None:
        self._next = now
        """When the next commit may be written, in seconds of the writer's clock."""

    def wait(self, now: float) -> float:
        """Seconds until the next commit may be written."""
        return self._next - now

    def wrote(self, blocks: int, now: float) -> None:
        """Events were written that count so many blocks, see `cost`."""
        self._next = max(self._next, now - self.SPARE_SECONDS) + (COMMIT_BLOCKS + blocks) / self.RATE
