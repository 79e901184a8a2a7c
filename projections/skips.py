"""Why a valid commit changes nothing, and what is said of each that was applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvplane.events.codec import Commit

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
