"""Whether a service can do its work now: what `/readyz` answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvplane.events.log.follow import Follower


class Readiness(NamedTuple):
    """`reason` says why it can't, and is empty when it can. `facts` are shown beside it."""

    reason: str
    facts: dict[str, object]


def readiness(follower: Follower, *, serving: bool, reason: str = "", **facts: object) -> Readiness:
    """Of a service that follows the log: it can when the log was read, it takes requests, and nothing else speaks against."""
    if not follower.caught_up.is_set():
        reason = f"the log is still being read: {follower.applied} of {follower.target} commits"
    elif not serving:
        reason = "it takes no requests yet, or no more"
    return Readiness(reason, {"applied": follower.applied, "behind": follower.behind, **facts})
