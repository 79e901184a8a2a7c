"""What every node may write at this moment, see `events.allowance`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.allowance import NS_AT_ONCE, after
from kvplane.events.subjects import NODE_ACCESS, NODE_ACCESS_LONG, beginning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.types import Event

SUBJECTS_LIMIT = 100_000
"""Most subjects remembered; those that were written to first are forgotten."""


class Allowances(dict[str, int]):
    """By subject, when all that may be written there at once is there again, in log time, unix nanoseconds."""

    def __init__(self, fleet: str) -> None:
        super().__init__()
        self.by_nodes = (
            beginning(fleet, "cache"), beginning(fleet, "access", NODE_ACCESS), beginning(fleet, "access", NODE_ACCESS_LONG),
        )  # fmt: skip
        """How the subjects begin on which nodes write."""

    def spent(self, subject: str, time: int) -> bool:
        """Whether nothing may be written there now."""
        return subject in self and self[subject] - time > NS_AT_ONCE

    def take(self, subject: str, time: int, events: Sequence[Event]) -> None:
        """A commit with these events was written there, or one that can't be read."""
        self[subject] = after(self.get(subject, 0), time, events)
        if len(self) > SUBJECTS_LIMIT:
            del self[next(iter(self))]

    def set_back(self, by: int) -> None:
        """The log's clock was ahead by so many nanoseconds and is right again."""
        self.update([(subject, full - by) for subject, full in self.items()])
