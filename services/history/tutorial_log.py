"""The log that the tutorial asks: a simulated fleet in which things happen, the same at every run.

Four nodes serve agents for twenty minutes. A policy is changed, a node is cordoned, another one is lost and a fifth joins, and
a client with old settings writes what nobody accepts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from events import types
from events.codec import Message, encode
from events.subjects import token
from projections.history.rows import Rows, Waiting
from projections.fleet import FleetState
from services.simulator.hardware import Hardware
from services.simulator.workloads import GENERATED_BLOCK_SIZE, generate
from services.simulator.world import FLEET, Change, Settings, World
from services.trace import work_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from projections.history.store import Store

SEED = 7
REQUESTS = 1800
RATE = 1.5
"""Requests per second."""
BEGIN = 1_769_852_400.0
"""2026-01-31 09:40:00 UTC, in unix seconds."""
_NS = 1_000_000_000

SETTINGS = Settings(
    nodes=4, capacity=6000, block_size=GENERATED_BLOCK_SIZE, policy="least_loaded", seed=SEED, routers=2,
    changes=(Change(780.0, "node-3", joins=False), Change(900.0, "node-5", joins=True)),
    hardware=Hardware(name="a slow node", operations=9e15 * 0.395 / 8),
)  # fmt: skip


class Recorder(World):
    """A world that keeps its log."""

    start = BEGIN

    def _begin(self) -> None:
        self.messages: list[Message] = []
        super()._begin()
        self._changes += [
            (420.0, partial(self._put, 420.0, "control", types.PolicyChanged("ttft", {}))),
            (600.0, partial(self._put, 600.0, "node.node-2", types.NodeCordoned("node-2", "new driver"))),
            (660.0, partial(self._put, 660.0, "node.node-2", types.NodeUncordoned("node-2"))),
        ]

    def _apply(
        self, visible: float, where: str, events: Sequence[types.Event], headers: dict[str, str] | None = None
    ) -> None:
        super()._apply(visible, where, events, headers)
        time = int((self.start + visible - self.settings.delay) * _NS)
        self.messages.append(Message(self._sequence, where, time, headers, encode(events)))
