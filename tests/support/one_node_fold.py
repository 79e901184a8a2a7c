"""A fleet's fold with one reported node, and events put into it as commits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events import codec
from kvplane.events.types import FormatRaised, NodeRegistered
from kvplane.projections.fleet import FleetState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.types import Event, Tier


class Folded:
    """What the fleet knows of one node."""

    def __init__(self, node: str = "a", block_size: int = 32, in_force: int = 1) -> None:
        self.state = FleetState("default")
        self.node = node
        self.block_size = block_size
        if in_force > 1:
            raised = codec.Message(1, "kv.default.control", 1, None, codec.encode([FormatRaised(in_force)]))
            assert self.state.apply(raised).skipped is None
        self.register()

    def register(self) -> int:
        registered = NodeRegistered(self.node, "here", ["m"], self.block_size, {"gpu": 1000})
        return self.commit("node", [registered])

    def commit(self, topic: str, events: Sequence[Event]) -> int:
        sequence = self.state.sequence + 1
        message = codec.Message(sequence, f"kv.default.{topic}.{self.node}", sequence, None, codec.encode(events))
        assert self.state.apply(message).skipped is None
        return sequence

    def put(self, events: Sequence[Event]) -> None:
        if events:
            self.commit("cache", events)

    def held(self, tier: Tier = "gpu") -> set[int]:
        slot = self.state.nodes[self.node].slots.get(tier)
        return set() if slot is None else set(self.state.caches.index("m").held(slot))

    def hit(self, hashes: bytes, limit: int) -> int:
        """What of the match all KV cache groups can serve."""
        node = self.state.nodes[self.node]
        return self.state.caches.groups.limit([node], [self.match(hashes, limit)], hashes)[0]

    def match(self, hashes: bytes, limit: int) -> int:
        return self.state.caches.index("m").match(hashes, limit)[self.state.nodes[self.node].slots["gpu"]]
