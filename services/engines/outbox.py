"""What waits for the log, within a bound. Whatever does not fit need not be kept: all is reported anew when the log is back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from kvplane.events.types import BlocksRemoved, BlocksStored, GroupRemoved, GroupStored

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvplane.events.log.group import GroupWriter
    from kvplane.events.types import Event

BUFFER_EVENTS = 20_000
BUFFER_BLOCKS = 2_000_000
"""So much waits for the log at the most."""

_BLOCKS = (BlocksStored, BlocksRemoved, GroupStored, GroupRemoved)

_log = structlog.get_logger("kvplane.engines")


class Outbox:
    """Hands the events of one node to its writer."""

    def __init__(self, writer: GroupWriter, node: str, most_events: int) -> None:
        self.writer = writer
        self.behind = False
        """More was to be written than could wait; nothing is taken before `begin`."""
        self.overflows = 0
        """How often that was so."""
        self._node = node
        self._most_events = most_events
        self._blocks = 0

    @property
    def may_begin(self) -> bool:
        """Whether it was behind, and the log has taken what waited before."""
        return self.behind and not self.writer.waiting

    def begin(self, events: Iterable[Event]) -> None:
        """Take all that is to be written for a fleet that knows nothing, however much it is."""
        self.behind, self._blocks = False, 0
        for event in events:
            self.writer.put(event)

    def put(self, events: Sequence[Event]) -> None:
        """Take what goes on from what was sent before, if there is space for it."""
        if self.behind or not events:
            return
        if not self.writer.waiting:
            self._blocks = 0
        self._blocks += sum(len(event.hashes) >> 3 for event in events if isinstance(event, _BLOCKS))
        if self.writer.waiting + len(events) > self._most_events or self._blocks > BUFFER_BLOCKS:
            self.behind = True
            self.overflows += 1
            _log.warning("log_away_too_long", node=self._node, waiting=self.writer.waiting)
            return
        for event in events:
            self.writer.put(event)
