"""Load: the requests that run on each node, and the prefill work that is queued there.

Known from the log alone: a request runs from its `RequestRouted` to its `RequestCompleted`, its node's loss, or, when
nobody ever reports its end, for `ACTIVE_SECONDS` of log time. Queued prefill is a virtual clock a node: each routed
request adds its uncached tokens divided by the node's prefill speed, starting now or when the queue before it is done.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

if TYPE_CHECKING:
    from events.types import RequestRouted

ACTIVE_SECONDS = 900
"""After this long without a completion a request is taken as over, in seconds of log time."""

PREFILL_LABEL = "prefill_tokens_per_s"
"""Node label with the node's prefill speed."""
PREFILL_SPEED = 8000.0
"""Prefill speed of a node that does not say, in tokens per second (an 8B model on one data-centre GPU)."""

_NS = 1_000_000_000


def prefill_speed(labels: dict[str, str]) -> float:
    """Prefill speed in tokens per second from a node's labels; the default when it is missing or makes no sense."""
    try:
        speed = float(labels.get(PREFILL_LABEL, PREFILL_SPEED))
    except ValueError:
        return PREFILL_SPEED
    return speed if 1 <= speed <= 1e9 else PREFILL_SPEED


class Active(Struct, frozen=True):
    """A request that runs. `hashes` is empty when the router did not record them."""

    node: str
    model: str
    tokens: int
    blocks: int
    time: int
    hashes: bytes


class NodeLoad(NamedTuple):
    """Load of one node: requests, blocks and tokens that run there; when its queued prefill is done (unix seconds)."""

    speed: float
    active: int
    blocks: int
    tokens: int
    prefill_done: float


class Load:
    """Load of every node, as columns: a decision over 1,000 nodes reads arrays, not objects.

    `ordinal` is a node's place in each column; the places of nodes that left are used again.
    """

    def __init__(self) -> None:
        self.ordinal: dict[str, int] = {}
        self.speed = array("d")
        self.active = array("d")
        self.blocks = array("q")
        self.tokens = array("q")
        self.prefill_done = array("d")
        self.running: dict[str, Active] = {}
        """Requests that run, oldest first."""
        self._free: list[int] = []
        self._columns: tuple[array[Any], ...] = (self.speed, self.active, self.blocks, self.tokens, self.prefill_done)

    def add_node(self, node: str, speed: float) -> None:
        """Start counting for a node, from nothing."""
        self.node_gone(node)
        if self._free:
            at = self._free.pop()
        else:
            at = len(self.speed)
            for column in self._columns:
                column.append(0)
        self.ordinal[node] = at
        for column in self._columns:
            column[at] = 0
        self.speed[at] = speed

    def of(self, node: str) -> NodeLoad | None:
        """Load of a node that is known here."""
        at = self.ordinal.get(node)
        if at is None:
            return None
        return NodeLoad(self.speed[at], int(self.active[at]), self.blocks[at], self.tokens[at], self.prefill_done[at])

    def routed(self, event: RequestRouted, block_size: int, time: int) -> None:
        """A request goes to a node that is known here."""
        if event.request in self.running:
            self.completed(event.request, time)
        self.running[event.request] = Active(event.node, event.model, event.tokens, event.blocks, time, event.hashes)
        at = self.ordinal[event.node]
        self.active[at] += 1
        self.blocks[at] += event.blocks
        self.tokens[at] += event.tokens
        uncached = max(0, event.tokens - event.match * block_size)
        self.prefill_done[at] = max(self.prefill_done[at], time / _NS) + uncached / self.speed[at]

    def completed(self, request: str, time: int) -> Active | None:
        """A request is over; what it was, or none when it was not running."""
        active = self.running.pop(request, None)
        if active is not None:
            at = self.ordinal[active.node]
            self.active[at] -= 1
            self.blocks[at] -= active.blocks
            self.tokens[at] -= active.tokens
            if not self.active[at]:
                self.prefill_done[at] = min(self.prefill_done[at], time / _NS)
        return active

    def expired(self, time: int) -> list[str]:
        """Requests that have run longer than `ACTIVE_SECONDS` at this log time."""
        before = time - ACTIVE_SECONDS * _NS
        old = []
        for request, active in self.running.items():
            if active.time > before:
                break
            old.append(request)
        return old

    def node_gone(self, node: str) -> None:
        """Stop counting for a node; the requests that ran there are over."""
        at = self.ordinal.pop(node, None)
        if at is None:
            return
        self._free.append(at)
        for request in [request for request, active in self.running.items() if active.node == node]:
            del self.running[request]
