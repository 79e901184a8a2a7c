"""What every node may write at this moment, see `events.allowance`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events import allowance
from kvplane.events.subjects import NODE_ACCESS, NODE_ACCESS_LONG, beginning

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplane.events.types import Event

SUBJECTS_LIMIT = 100_000
"""Most subjects remembered; the ones written to longest ago are forgotten."""


class Allowances(dict[str, int]):
    """By subject, when all that may be written there at once is there again, in log time, unix nanoseconds."""

    def __init__(self, fleet: str) -> None:
        super().__init__()
        self._by_nodes = (
            beginning(fleet, "cache"), beginning(fleet, "access", NODE_ACCESS), beginning(fleet, "access", NODE_ACCESS_LONG),
        )  # fmt: skip

    def held(self, subject: str, in_force: int) -> bool:
        """Whether it is a node's subject, in a log whose format holds nodes to an allowance."""
        return in_force >= allowance.ALLOWANCE_FORMAT and subject.startswith(self._by_nodes)

    def spent(self, subject: str, time: int) -> bool:
        """Whether nothing may be written there now."""
        return allowance.spent(self.get(subject, 0), time)

    def take(self, subject: str, time: int, events: Iterable[Event]) -> None:
        """A commit with these events was written there, or one that can't be read."""
        full = self.pop(subject, 0)
        self[subject] = allowance.after(full, time, events)
        if len(self) > SUBJECTS_LIMIT:
            del self[next(iter(self))]

    def set_back(self, by: int) -> None:
        """The log's clock was ahead by so many nanoseconds and is right again."""
        self.update([(subject, full - by) for subject, full in self.items()])
