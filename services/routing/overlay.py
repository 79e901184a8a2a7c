"""What a router knows beyond the log: its own decisions that are not there yet, and blocks that will be soon.

Two things that a burst of requests with one prefix needs. A decision's load counts at once, and is taken back when the
decision is seen on the log, where the fold counts it. And a node that was just given a request will hold its blocks when
its prefill is done, long before it says so: until then the blocks are *predicted*. A prediction needs no proof to go
away: predictions lie in two generations, and every `PREDICTION_SECONDS` the older one is forgotten, so each lives between
one and two periods. What the node reported meanwhile is in the fold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from projections.prefix import PrefixIndex

if TYPE_CHECKING:
    from events.types import RequestRouted

PREDICTION_SECONDS = 15.0
PENDING_SECONDS = 120.0
"""A decision that was not seen on the log for this long no longer counts as load."""

_NS = 1_000_000_000


class Extra(Struct):
    """Load of a node that the fold does not count yet."""

    active: int = 0
    tokens: int = 0


class Pending(Struct, frozen=True):
    """A decision that was not seen on the log yet. `tokens` are those left to prefill."""

    node: str
    tokens: int
    time: int


class Predictions:
    """One generation of predicted blocks of one model."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.nodes: list[str] = []
        self._slots: dict[str, int] = {}

    def store(self, node: str, hashes: bytes) -> None:
        """The node will hold these blocks, from the root of their chain on."""
        slot = self._slots.get(node)
        if slot is None:
            slot = self._slots[node] = len(self.nodes)
            self.nodes.append(node)
        self.index.store(slot, hashes)

    def clear(self, node: str) -> None:
        """The node's cache is gone."""
        slot = self._slots.get(node)
        if slot is not None:
            self.index.clear(slot)


class Overlay:
    """Pending decisions and predicted blocks of one router. Time is unix nanoseconds and comes with each call."""

    def __init__(self) -> None:
        self.pending: dict[str, Pending] = {}
        self.extra: dict[str, Extra] = {}
        self.sessions: dict[tuple[str, str], str] = {}
        """Assignments made here that are not on the log yet."""
        self._young: dict[str, Predictions] = {}
        self._old: dict[str, Predictions] = {}
        self._turned = 0

    def decided(self, event: RequestRouted, block_size: int, now: int, *, predict: bool) -> None:
        """A decision was made here."""
        tokens = max(0, event.tokens - event.match * block_size)
        before = self.pending.pop(event.request, None)
        if before is not None:
            self._take_back(before)
        self.pending[event.request] = Pending(event.node, tokens, now)
        extra = self.extra.get(event.node)
        if extra is None:
            extra = self.extra[event.node] = Extra()
        extra.active += 1
        extra.tokens += tokens
        if predict and event.hashes:
            self.predict(event.model, event.node, event.hashes, now)

    def on_log(self, request: str) -> bool:
        """A decision is on the log; whether it was made here."""
        pending = self.pending.pop(request, None)
        if pending is None:
            return False
        self._take_back(pending)
        return True

    def _take_back(self, pending: Pending) -> None:
        extra = self.extra.get(pending.node)
        if extra is None:
            return
        extra.active -= 1
        extra.tokens -= pending.tokens
        if extra.active <= 0:
            del self.extra[pending.node]

    def predict(self, model: str, node: str, hashes: bytes, now: int) -> None:
        """The node will hold these blocks soon."""
        self.turn(now)
        young = self._young.get(model)
        if young is None:
            young = self._young[model] = Predictions()
        young.store(node, hashes)

    def predictions(self, model: str) -> list[Predictions]:
        """Generations to be asked for a model."""
        return [generation[model] for generation in (self._young, self._old) if model in generation]

    def turn(self, now: int) -> None:
        """Forget what is too old."""
        if now - self._turned < PREDICTION_SECONDS * _NS:
            return
        # After a long pause both generations are too old.
        self._old = self._young if now - self._turned < 2 * PREDICTION_SECONDS * _NS else {}
        self._young = {}
        self._turned = now
        before = now - int(PENDING_SECONDS * _NS)
        for request in [request for request, pending in self.pending.items() if pending.time < before]:
            self.on_log(request)

    def node_changed(self, node: str) -> None:
        """The node's cache is gone, or is another one now."""
        for generation in (self._young, self._old):
            for predictions in generation.values():
                predictions.clear(node)
