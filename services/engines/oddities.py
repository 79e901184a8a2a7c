"""What an engine publishes and can't be followed, in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from kvplane.services.engines.translate import MISFITS

if TYPE_CHECKING:
    from kvplane.services.engines.sequence import Track

_log = structlog.get_logger("kvplane.engines")


def not_understood(track: Track) -> str:
    """That nothing of what comes is understood, in a sentence; empty when something was a short while ago."""
    if track.unreadable >= MISFITS:
        return f"none of the engine's last {track.unreadable:,} batches could be decoded"
    return track.translator.misfits()


class Oddities:
    """What was logged of one node's oddities: each is worth a line when it begins, and when it has doubled."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._logged: dict[str, int] = {}
        self._strange = False
        self._trouble = ""

    def look(self, track: Track) -> None:
        """Log what is new."""
        odd = track.translator.oddities()
        if odd != self._logged:
            _log.info("not_followed", node=self._node, **odd)
            if odd.get("overfull") != self._logged.get("overfull"):
                _log.warning("more_held_than_fits", node=self._node, reason=track.overfull)
            self._logged = odd
        reason = not_understood(track)
        if reason and not self._strange:
            _log.warning("not_understood", node=self._node, reason=reason)
        self._strange = bool(reason)
        trouble = track.translator.groups.trouble()
        if trouble and trouble != self._trouble:
            _log.warning("groups_not_followed", node=self._node, reason=trouble)
        self._trouble = trouble
