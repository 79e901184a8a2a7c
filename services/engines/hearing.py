"""Whether an engine that serves also publishes its cache events. One that does not is a node whose cache nobody knows of.

Judged by its metrics: who has computed more new tokens than a block for each request has filled a block, and publishes that.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Protocol

import structlog

from kvplane.services.engines.facts import TURN_ON

if TYPE_CHECKING:
    from kvplane.services.engines.facts import Kind, Served

PATIENCE_SECONDS = 5.0
"""How long what an engine publishes may take to arrive."""
AGAIN_SECONDS = 300.0

_log = structlog.get_logger("kvplane.engines")


class Heard(Protocol):
    """Where the adapter hears it."""

    endpoint: str

    @property
    def live(self) -> int:
        """How many publishers are connected there."""


class Hearing:
    """One node's engine: what it has served since the adapter began, and whether any event of its cache came."""

    def __init__(self, kind: Kind, node: str, block_size: int, where: Heard) -> None:
        self._kind, self._node, self._size, self._where = kind, node, block_size, where
        self._before: Served | None = None
        self._silent_since = inf
        self._warn_at = 0.0
        self.missing = False
        """It serves, and no event of its cache came."""
        self._connected_at: float | None = None
        self.nobody = ""
        """That nobody is connected where it should publish, in a sentence; empty when somebody is, or may be soon."""

    def connected(self, now: float) -> None:
        """Judge whether anybody publishes at all, and say it when nobody does."""
        if self._connected_at is None or self._where.live:
            self._connected_at = now
        before, silent = self.nobody, now - self._connected_at >= PATIENCE_SECONDS
        self.nobody = f"nobody publishes at {self._where.endpoint}" if silent else ""
        if silent and not before:
            _log.warning(
                "nobody_publishes", node=self._node, endpoint=self._where.endpoint,
                hint=f"no publisher is connected there, so nothing is known of its cache: {TURN_ON[self._kind]}; if it "
                "was, give --events where it publishes, with connect: or bind: before it",
            )  # fmt: skip

    def look(self, served: Served | None, now: float, *, received: bool) -> None:
        """Judge anew, and warn now and then. `served` is none where metrics don't show it; `received`: an event has come."""
        if received or served is None:
            self._silent_since, self.missing = inf, False
            return
        before = self._before
        if before is None or served.tokens < before.tokens or served.requests < before.requests:
            # The first look, or another life of the engine.
            before = self._before = served
        if served.tokens - before.tokens <= self._size * (served.requests - before.requests):
            self._silent_since = inf
            return
        self._silent_since = min(self._silent_since, now)
        self.missing = now - self._silent_since >= PATIENCE_SECONDS
        if self.missing and now >= self._warn_at:
            self._warn_at = now + AGAIN_SECONDS
            _log.warning(
                "no_events_heard", node=self._node, endpoint=self._where.endpoint,
                tokens=int(served.tokens - before.tokens),
                hint="the engine serves and nothing is heard of its cache, so nothing is routed by it: "
                f"{TURN_ON[self._kind]}; if it was, give --events where it publishes, and let no firewall be between",
            )  # fmt: skip
