"""Why a valid commit changes nothing, and what is said of each that was applied."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvplane.events.errors import NewerFormat
from kvplane.events.types import FormatRaised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.codec import Commit
    from kvplane.events.types import Event

REASONS = {
    "duplicate": "the writer's counter says that this commit is on the log already",
    "stale": "the writer had not seen the last change of the node when it decided",
    "unknown_node": "the node is not registered",
    "stale_epoch": "the event is of an earlier life of the node's cache",
    "no_change": "it is in that state already",
    "block_size": "another node of the model has another block size",
    "wrong_mode": "the node's cache is not of the kind that this event is for",
    "node_lost": "the node is lost",
    "not_held": "a block to be evicted is not held, named twice, or stored by the same commit",
    "protected": "a block to be evicted is used by a running request",
    "capacity": "the node would hold more blocks than its capacity, or than twice of it where the engine reports",
    "too_many_nodes": "the fleet has as many nodes as it can have",
    "too_fast": "the node wrote more than one node may in that time",
    "defect": "kvplane failed on it, alike everywhere; report it with the commit",
}
"""Why a valid commit is skipped, beside `codec.REASONS`."""


class Applied(NamedTuple):
    """What became of a message: its commit, or the reason why it was skipped."""

    commit: Commit | None
    skipped: str | None
    detail: str = ""


class Skip(Exception):
    """A commit changes nothing."""


def judge_formats(events: Sequence[Event], sequence: int, in_force: int, newest: int) -> None:
    """Raise `Skip` unless formats only go up, and `NewerFormat` when the last is beyond the newest that is known here."""
    raised = [event for event in events if isinstance(event, FormatRaised)]
    if not raised:
        return
    formats = [in_force, *(event.format for event in raised)]
    if any(later <= before for before, later in pairwise(formats)):
        raise Skip("no_change")
    last = raised[-1]
    if last.format > newest:
        raise NewerFormat(
            f"from commit {sequence} on the log is in format {last.format}, which kvplane {last.kvplane or '?'} "
            f"wrote; this kvplane reads up to format {newest}: install that version or a newer one"
        )
