"""How often a node may register: each time all that was known of it is forgotten, and the log has one more commit.

Pure: time comes with each call. Every coordinator counts for itself.
"""

from __future__ import annotations

from kvplane.services.protocol.errors import TooOften

AT_ONCE = 30
"""So often a node may register one time after the other."""
EVERY_SECONDS = 4.0
"""After that, once in so many seconds."""
NAMES_LIMIT = 20_000
"""Nodes that are remembered; those that registered longest ago are forgotten first."""


class Registrations:
    """When each node may register again. Times are seconds of any clock."""

    def __init__(self) -> None:
        self._full: dict[str, float] = {}
        """When what each node may do at once is all there again; a node that is not here has all of it."""

    def register(self, node: str, now: float) -> None:
        """A node registers. Raises `TooOften`."""
        full = max(self._full.pop(node, now), now)
        wait = full - now - (AT_ONCE - 1) * EVERY_SECONDS
        self._full[node] = full if wait > 0 else full + EVERY_SECONDS
        if len(self._full) > NAMES_LIMIT:
            del self._full[next(iter(self._full))]
        if wait > 0:
            raise TooOften(
                f"node {node[:80]!r} has registered {AT_ONCE} times within moments; it may again in {wait:.0f} s. What "
                "makes it register over and over?"
            )
