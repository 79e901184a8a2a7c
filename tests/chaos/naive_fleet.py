"""The naive fold with what a long run needs beside it: requests that nobody ends, and who could be chosen when."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from kvplane.events import types
from tests.support.naive_fold import Naive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.codec import Commit, Message

FULL_NS = 4 * 10**9
"""What a node may write at once, in the time in which that is there again."""
OVER_NS = 900 * 10**9
"""A request that nobody completes counts so long."""


class Standing(NamedTuple):
    """Whether a node could be chosen from a sequence on: why not, and the models it answers to."""

    why_not: str
    models: tuple[str, ...]


GONE = Standing("gone", ())


class NaiveFleet(Naive):
    """The naive fold, and the standing of every node at every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self._time = 0
        self._began: dict[str, int] = {}
        self._early: dict[str, tuple[int, int]] = {}
        self._buckets: dict[str, tuple[int, int]] = {}
        self._standings: dict[str, tuple[list[int], list[Standing]]] = {}

    def take(self, message: Message, commit: Commit) -> str | None:
        """Apply a commit that could be decoded; why it is skipped."""
        events = commit.events
        for event in events:
            if isinstance(event, types.RequestRouted):
                self._early_end(event)
        reason = self.apply(
            message.sequence, message.subject, events, commit.writer, commit.writer_seq, commit.based_on
        )
        if reason is None:
            for event in events:
                if isinstance(event, types.RequestRouted):
                    self._began[event.request] = self._time
                elif isinstance(event, types.RequestCompleted):
                    self._early[event.request] = (self._time, message.sequence)
            self._stand(message.sequence, events)
        return reason

    def pass_time(self, time: int) -> None:
        """The log's time goes on, whatever the message is."""
        self._time = max(self._time, time)
        for request in [each for each in self.running if self._time - self._began[each] >= OVER_NS]:
            del self.running[request]

    def too_fast(self, message: Message) -> bool:
        """Whether a node has written so much there that this is not looked at; `wrote` says what it was."""
        level, since = self._buckets.get(message.subject, (FULL_NS, 0))
        return min(FULL_NS, level + self._time - since) < 0

    def wrote(self, message: Message, events: Sequence[types.Event]) -> None:
        """A node's commit takes from what may be written: blocks, and what commits and events count."""
        level, since = self._buckets.get(message.subject, (FULL_NS, 0))
        blocks = sum(
            sum(len(getattr(event, field, b"")) for field in ("hashes", "stored", "evicted")) // 8 + 8
            for event in events
        )
        level = min(FULL_NS, level + self._time - since) - (64 + blocks) * (10**9 // 65_536)
        self._buckets[message.subject] = level, self._time

    def _early_end(self, event: types.RequestRouted) -> None:
        """An end that is on the log before its decision is another request's when it came before that was decided."""
        time, _ = self._early.get(event.request, (0, 0))
        if event.request in self.early and event.decided * 1000 > time:
            del self.early[event.request]

    def _stand(self, sequence: int, events: Sequence[types.Event]) -> None:
        for name in {getattr(event, "node", "") for event in events if not isinstance(event, types.RequestCompleted)}:
            node = self.nodes.get(name)
            standing = GONE
            if node is not None:
                why = "lost" if node.lost else "cordoned" if node.cordoned else ""
                standing = Standing(why, tuple(node.registered.models))
            sequences, standings = self._standings.setdefault(name, ([0], [GONE]))
            if standings[-1] != standing:
                sequences.append(sequence)
                standings.append(standing)

    def standing(self, name: str, sequence: int) -> Standing:
        """A node's standing when `sequence` was applied."""
        sequences, standings = self._standings.get(name, ([0], [GONE]))
        return standings[bisect_right(sequences, sequence) - 1]
