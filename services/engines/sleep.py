"""An engine that sleeps (vLLM's `/sleep`): it is well and takes no steps, and what it had cached is gone, or as good as gone.

At level 1 and 2 the cache is discarded, and the event that says so is published only with the first step after waking up. At
level 0, and when the cache alone was released, metrics show the same, so that is not told apart: blocks that may be gone are
not promised.
"""

from __future__ import annotations

import structlog

REASON = "the engine sleeps"
TOLD = 3
"""So many heartbeats say that it sleeps. Then there are none: earlier coordinators take each for a sign of life."""

_log = structlog.get_logger("kvplane.engines")


class Sleep:
    """Whether one node's engine sleeps, and what was told of it."""

    def __init__(self, node: str) -> None:
        self.asleep = False
        self._node = node
        self._clears = False
        self._told = 0

    def look(self, *, asleep: bool) -> None:
        """What the engine says now."""
        if asleep is not self.asleep:
            self.asleep, self._clears, self._told = asleep, asleep, 0
            _log.info("engine_sleeps" if asleep else "engine_awake", node=self._node)

    def falls(self) -> bool:
        """Whether it has fallen asleep, and its cache is to be forgotten; once each time."""
        clears, self._clears = self._clears, False
        return clears

    def tells(self) -> bool:
        """Whether the next heartbeat is to say that it sleeps."""
        self._told += 1
        return self._told <= TOLD
