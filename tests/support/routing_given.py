"""A fleet that a router decides about, made event by event."""

from __future__ import annotations

from typing import Any

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.hashing import pack_hashes
from kvplane.projections.fleet import FleetState
from kvplane.services.routing.decide import Chooser, Decision
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.query import Query

Parameters = dict[str, float]


NOW = 1_700_000_000 * 10**9


CHAIN = [*range(1, 33)]


class Given:
    """A fleet, made event by event."""

    def __init__(self) -> None:
        self.state = FleetState("f")
        self.overlay = Overlay()
        self.chooser = Chooser(self.state, self.overlay)
        self.at = 0
        """Nanoseconds since `NOW`."""

    def put(self, subject: str, event: types.Event) -> None:
        message = Message(self.state.sequence + 1, f"kv.f.{subject}", NOW + self.at, None, codec.encode([event]))
        assert self.state.apply(message).skipped is None

    def node(self, name: str, *, model: str = "m", most: int = 0, mode: Any = "reported", **labels: str) -> None:
        self.put(f"node.{name}", types.NodeRegistered(name, "x", [model], 16, {"gpu": 64}, mode, "", most, 0.0, labels))

    def holds(self, name: str, length: int, *, start: int = 0, tier: types.Tier = "gpu") -> None:
        epoch = self.state.nodes[name].epoch
        hashes = pack_hashes(CHAIN[start:length])
        self.put(f"cache.{name}", types.BlocksStored(name, epoch, 1, hashes, None, tier))

    def runs(self, name: str, count: int) -> None:
        for number in range(count):
            self.put("access.w", types.RequestRouted(f"{name}{number}", "m", name, 0, 0, 0))

    def policy(self, name: str, **parameters: float) -> None:
        self.put("control", types.PolicyChanged(name, parameters))

    def decide(
        self, request: str = "q", blocks: int = 32, session: str = "", exclude: tuple[str, ...] = ()
    ) -> Decision:
        query = Query(
            request, "m", pack_hashes(CHAIN[:blocks]), blocks * 16 + 1, blocks, 16, session, frozenset(exclude)
        )
        return self.chooser.decide(query, NOW)
