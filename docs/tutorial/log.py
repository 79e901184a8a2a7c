"""The log that the tutorial asks: a simulated fleet in which things happen, the same at every run.

Four nodes serve conversations for twenty minutes. The policy is changed, one node is cordoned for a minute, another is lost and
comes back, a fifth joins, and three clients write what nobody accepts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from kvplane.events import types
from kvplane.events.codec import WRITER, Message, encode
from kvplane.events.hashing import pack_hashes
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.rows import Rows, Waiting
from kvplane.services.simulation.hardware import Hardware
from kvplane.services.simulation.trace import work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, generate
from kvplane.services.simulation.world import FLEET, Change, Settings, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.projections.history.store import Store

BEGIN = 1_769_852_400.0
"""2026-01-31 09:40:00 UTC, in unix seconds."""
SEED = 7
REQUESTS = 2142
RATE = 1.7
"""Requests per second."""
LOST = "node-3"
LOST_SECONDS = 780.0
"""When it fails, from the beginning."""
_NS = 1_000_000_000

_SETTINGS = Settings(
    nodes=4, capacity=4000, block_size=GENERATED_BLOCK_SIZE, policy="least_loaded", seed=SEED, routers=2,
    changes=(
        Change(LOST_SECONDS, LOST, joins=False), Change(900.0, "node-5", joins=True), Change(1080.0, LOST, joins=True)
    ),
    hardware=Hardware(name="a slower node", operations=Hardware().operations / 2.5),
)  # fmt: skip


class _Recorder(World):
    """A world that keeps its log, and has a few more things happen."""

    start = BEGIN

    def _begin(self) -> None:
        self.messages: list[Message] = []
        super()._begin()
        old = types.BlocksStored(LOST, self._epochs[LOST], 1, pack_hashes([11, 12, 13]))
        misplaced = types.NodeCordoned("node-4", "maintenance")
        unknown = b'[{"type": "BlocksSaved.1", "node": "node-1", "hashes": ["0x1f"]}]'
        self._changes += [
            (420.0, partial(self._put, 420.0, "control", types.PolicyChanged("ttft", {}))),
            (600.0, partial(self._put, 600.0, "node.node-2", types.NodeCordoned("node-2", "new driver"))),
            (660.0, partial(self._put, 660.0, "node.node-2", types.NodeUncordoned("node-2"))),
            *((time, partial(self._write, time, "cache.node-1", unknown, "adapter-0.9")) for time in (200.0, 500.0, 800.0)),
            (610.0, partial(self._write, 610.0, "node.node-1", encode([misplaced]), "night-script")),
            *((time, partial(self._write, time, f"cache.{LOST}", encode([old]), "node-3-old")) for time in (1100.0, 1110.0)),
        ]  # fmt: skip

    def _apply(
        self, visible: float, where: str, events: Sequence[types.Event], headers: dict[str, str] | None = None
    ) -> None:
        super()._apply(visible, where, events, headers)
        time = int((self.start + visible - self.settings.delay) * _NS)
        self.messages.append(Message(self._sequence, where, time, headers, encode(events)))

    def _write(self, now: float, topic: str, body: bytes, writer: str) -> None:
        """Bytes of a stranger, at once on the log."""
        self._see(now)
        self._sequence += 1
        # What is not visible yet comes after it.
        time = int((self.start + now - self.settings.delay) * _NS)
        message = Message(self._sequence, f"kv.{FLEET}.{topic}", time, {WRITER: writer}, body)
        self.messages.append(message)
        self.state.apply(message)

    def log(self) -> list[Message]:
        """All that was written in the run."""
        self.run()
        self._see(math.inf)
        return self.messages


def make() -> list[Message]:
    """The log."""
    requests = generate("multi-turn", REQUESTS, seed=SEED, rate=RATE)
    return _Recorder(_SETTINGS, [work_of(request, GENERATED_BLOCK_SIZE) for request in requests]).log()


def store(into: Store, log: Sequence[Message]) -> FleetState:
    """Store what a historian makes of a log; the state at its end."""
    state, rows, waiting = FleetState(FLEET), Rows(), Waiting()
    for message in log:
        rows.add(message, state.apply(message), state, waiting)
    into.write(rows, time=state.time)
    return state
