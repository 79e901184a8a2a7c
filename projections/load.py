"""Load: the requests that run on each node, and the prefill work that is queued there.

Known from the log alone: a request runs from its `RequestRouted` to its `RequestCompleted`, its node's loss, or, when
nobody ever reports its end, for `ACTIVE_SECONDS` of log time. Queued prefill is a virtual clock a node: each routed
request adds its uncached tokens divided by the node's prefill speed, starting now or when the queue before it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


class NodeLoad(Struct):
    """Load of one node: requests, blocks and tokens that run there; when its queued prefill is done (unix ns)."""

    speed: float
    active: int = 0
    blocks: int = 0
    tokens: int = 0
    prefill_done: int = 0

    def queue(self, tokens: float, now: int) -> None:
        """Queue this many uncached tokens at time `now`."""
        self.prefill_done = max(self.prefill_done, now) + int(tokens / self.speed * _NS)


class Load:
    """Load of every node."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeLoad] = {}
        self.active: dict[str, Active] = {}
        """Requests that run, oldest first."""

    def add_node(self, node: str, speed: float) -> None:
        """Start counting for a node, from nothing."""
        self.nodes[node] = NodeLoad(speed)

    def routed(self, event: RequestRouted, block_size: int, time: int) -> None:
        """A request goes to a node that is known here."""
        if event.request in self.active:
            self.completed(event.request, time)
        active = Active(event.node, event.model, event.tokens, event.blocks, time, event.hashes)
        self.active[event.request] = active
        load = self.nodes[event.node]
        load.active += 1
        load.blocks += event.blocks
        load.tokens += event.tokens
        load.queue(max(0, event.tokens - event.match * block_size), time)

    def completed(self, request: str, time: int) -> Active | None:
        """A request is over; what it was, or none when it was not running."""
        active = self.active.pop(request, None)
        if active is not None:
            load = self.nodes[active.node]
            load.active -= 1
            load.blocks -= active.blocks
            load.tokens -= active.tokens
            if not load.active:
                load.prefill_done = min(load.prefill_done, time)
        return active

    def expired(self, time: int) -> list[str]:
        """Requests that have run longer than `ACTIVE_SECONDS` at this log time."""
        before = time - ACTIVE_SECONDS * _NS
        old = []
        for request, active in self.active.items():
            if active.time > before:
                break
            old.append(request)
        return old

    def node_gone(self, node: str) -> list[str]:
        """Stop counting for a node; the requests that ran there are over and returned."""
        gone = [request for request, active in self.active.items() if active.node == node]
        for request in gone:
            del self.active[request]
        self.nodes.pop(node, None)
        return gone
