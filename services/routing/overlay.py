"""What a router knows beyond the log: its own decisions that are not there yet, and blocks that will be soon.

Two things that a burst of requests with one prefix needs. A decision's load counts at once, and is taken back when the
decision is seen on the log, where the fold counts it. And a node that was just given a request will hold its blocks when
its prefill is done, long before it says so: until then the blocks are *predicted*. A prediction needs no proof to go
away: predictions lie in two generations, and every `PREDICTION_SECONDS` the older one is forgotten, so each lives between
one and two periods. What the node reported meanwhile is in the fold. A node's own word that a block is gone ends its
prediction at once.

All of it follows from the log: from what this router decided, from what others did, and from the times of both. So the
overlay of any past decision can be made again.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from msgspec import Struct

from kvplane.events import types
from kvplane.events.hashing import unpack_hashes
from kvplane.services.routing.predictions import Predictions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvplane.events.codec import Commit
    from kvplane.events.types import RequestRouted
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.nodes import Node

PREDICTION_SECONDS = 15.0
PENDING_SECONDS = 120.0
"""A decision that was not seen on the log for this long no longer counts as load."""
RECENT_SECONDS = 60.0
"""What another router decided longer ago than this predicts nothing any more, so it need not be looked at."""

PREDICTED_BYTES = 128 << 20
"""Most bytes of block hashes that are predicted in one period; what comes then is predicted in the next one."""

SET_BACK_PERIODS = 8
"""Time that is so many periods earlier than before is another clock's, not a late message's."""

SCANNED_BLOCKS = 8
"""So few blocks at the most are looked for in a chain without unpacking it."""
_NS = 1_000_000_000
_GENERATION_NS = int(PREDICTION_SECONDS * _NS)


class Pending(Struct, frozen=True):
    """A decision that was not seen on the log yet. `at` is the node's ordinal, `tokens` are those left to prefill."""

    node: str
    at: int
    tokens: int
    blocks: int
    time: int


class OnTheWay(NamedTuple):
    """What is on its way to each node."""

    active: NDArray[np.float64]
    tokens: NDArray[np.float64]
    blocks: NDArray[np.float64]


class Overlay:
    """Pending decisions and predicted blocks of one router. Time is unix nanoseconds and comes with each call.

    Columns and predictions go by the ordinals of `projections.load.Load`; when an ordinal passes to another node,
    `node_changed` was called for the one that had it.
    """

    def __init__(self, *, scanned_blocks: int = SCANNED_BLOCKS) -> None:
        self._scanned_blocks = scanned_blocks
        self.pending: dict[str, Pending] = {}
        self.active = array("d")
        """Requests that are on their way to each node."""
        self.tokens = array("d")
        """Uncached tokens of those."""
        self.blocks = array("d")
        """Blocks of those."""
        self.columns = OnTheWay(*[np.zeros(0)] * 3)
        """These three as arrays that change with them."""
        self.begun: dict[str, int] = {}
        """Tokens of those that begin a conversation, where such are held."""
        self.begun_tokens = 0
        """Their sum."""
        self.sessions: dict[tuple[str, str], str] = {}
        """Assignments made here that are not on the log yet."""
        self._young: dict[str, Predictions] = {}
        self._old: dict[str, Predictions] = {}
        self._predicted = [0, 0]
        """Bytes of hashes that the young generation was given, and the old one."""
        self._ordinals: dict[str, int] = {}
        self._generation = 0
        """Number of the young generation: time in periods."""

    def fit(self, count: int) -> None:
        """Make the columns as long as those of the fold."""
        missing = count - len(self.active)
        if missing > 0:
            # New arrays: one that is looked at can't grow.
            more = array("d", [0] * missing)
            self.active, self.tokens, self.blocks = self.active + more, self.tokens + more, self.blocks + more
            self.columns = OnTheWay(*(np.frombuffer(each) for each in (self.active, self.tokens, self.blocks)))

    def decided(
        self, event: RequestRouted, at: int, block_size: int, now: int, *, predict: str = "", begins: bool = False
    ) -> None:
        """A decision was made here, for the node with ordinal `at`; with `predict`, its blocks in this model's cache."""
        # Not only predictions expire: what only hits, or is managed, must as well.
        self.expire(now)
        self.on_log(event.request)
        self.fit(at + 1)
        tokens = max(0, event.tokens - event.match * block_size)
        self.pending[event.request] = Pending(event.node, at, tokens, event.blocks, now)
        self.active[at] += 1
        self.tokens[at] += tokens
        self.blocks[at] += event.blocks
        if begins:
            self.begun[event.request] = event.tokens
            self.begun_tokens += event.tokens
        if predict and event.match < event.blocks and event.hashes:
            self.predict(predict, event.node, at, event.hashes, now)

    def on_log(self, request: str) -> bool:
        """A decision is on the log; whether it was made here."""
        pending = self.pending.pop(request, None)
        if pending is None:
            return False
        self.active[pending.at] -= 1
        self.tokens[pending.at] -= pending.tokens
        self.blocks[pending.at] -= pending.blocks
        if self.begun:
            self.begun_tokens -= self.begun.pop(request, 0)
        return True

    def predict(self, model: str, node: str, at: int, hashes: bytes, now: int) -> None:
        """The node with ordinal `at` will hold these blocks soon, from the root of their chain on."""
        self.expire(now)
        behind = self._generation - now // _GENERATION_NS
        if behind > 1:
            return
        indexes = self._old if behind else self._young
        predicted = self._predicted[behind] + len(hashes)
        if predicted > PREDICTED_BYTES:
            return
        self._predicted[behind] = predicted
        index = indexes.get(model)
        if index is None:
            index = indexes[model] = Predictions()
        self._ordinals[node] = at
        index.store(at, hashes)

    def lift(self, model: str, hashes: bytes, blocks: int, lengths: list[int]) -> bool:
        """Raise each ordinal's entry to the leading blocks of a request that are predicted there; whether any are.

        The old generation is asked only for what the young one has never seen: of a prefix that is in use, the old one
        knows what nodes have long reported.
        """
        for generation in (self._young, self._old):
            index = generation.get(model)
            if index is not None and index.lift(hashes, blocks, lengths):
                return True
        return False

    def expire(self, now: int) -> None:
        """Forget what is too old."""
        generation = now // _GENERATION_NS
        if self._generation - generation > SET_BACK_PERIODS:
            self._set_back(generation, now)
        if generation <= self._generation:
            return
        # After a long pause both generations are too old.
        next_one = generation == self._generation + 1
        self._old, self._predicted = (self._young, [0, self._predicted[0]]) if next_one else ({}, [0, 0])
        self._young = {}
        self._generation = generation
        # By the period, not by the moment: who looks first must make no difference.
        before = generation * _GENERATION_NS - int(PENDING_SECONDS * _NS)
        for request in [request for request, pending in self.pending.items() if pending.time < before]:
            self.on_log(request)

    def _set_back(self, generation: int, now: int) -> None:
        """The clock was ahead and is right again: what has its times would never expire."""
        self._young, self._old, self._predicted = {}, {}, [0, 0]
        self._generation = generation
        for request in [request for request, pending in self.pending.items() if pending.time > now]:
            self.on_log(request)

    def observe(self, commit: Commit, time: int, state: FleetState, writer: str, now: int) -> None:
        """Come in line with a commit of this log time that the fold has just applied.

        `writer` is this router's name, `now` its clock: what is long past then is not looked at.
        """
        topic = commit.place.topic
        if topic == "access":
            own = commit.writer == writer
            recent = time > now - RECENT_SECONDS * _NS
            for event in commit.events:
                if type(event) is not types.RequestRouted:
                    continue
                if own:
                    self.on_log(event.request)
                elif recent and event.hashes and event.node in state.load.ordinal:
                    # Another router sent a request to a node that will report its blocks.
                    node = state.nodes[event.node]
                    if not node.managed:
                        self.predict(node.model, event.node, state.load.ordinal[event.node], event.hashes, time)
        elif topic == "session":
            for event in commit.events:
                key = (event.model, event.session)  # type: ignore[attr-defined]
                if self.sessions.get(key) == getattr(event, "node", None):
                    self.sessions.pop(key, None)
        elif topic == "node":
            if type(commit.events[0]) in {types.NodeRegistered, types.NodeLost, types.NodeRemoved}:
                self.node_changed(commit.place.name)
                for key in [key for key, node in self.sessions.items() if node == commit.place.name]:
                    del self.sessions[key]
        elif topic == "cache":
            name = commit.place.name
            removed: list[bytes] = []
            for event in commit.events:
                kind = type(event)
                if kind is types.BlocksRemoved:
                    removed.append(event.hashes)  # type: ignore[attr-defined]
                elif kind is types.CacheCleared:
                    self.node_changed(name)
            if removed and name in self._ordinals:
                self._removed(state.nodes[name], b"".join(removed), state)

    def _removed(self, node: Node, hashes: bytes, state: FleetState) -> None:
        """What a node says is gone is not to be expected there any more, whatever was predicted before.

        What it stored ends nothing: chains are reported in parts, and the rest is still to come.
        """
        at = self._ordinals[node.name]
        predicted = [
            index for generation in (self._young, self._old) if (index := generation.get(node.model)) is not None
        ]
        blocks = unpack_hashes(hashes)
        given = [index.given(at, blocks) for index in predicted]
        fold, slots = state.caches.index(node.model), node.slots.values()
        # A block that lies in another tier, or came back in the same commit, is still there.
        gone = {block for each in given for block in each if not any(fold.holds(slot, block) for slot in slots)}
        if not gone:
            return
        # What has still to be computed for a prompt that waits there will be back.
        load = state.load
        for request in load.prefills[load.ordinal[node.name]].waiting:
            gone -= _among(gone, load.running[request].hashes, self._scanned_blocks)
        for index, each in zip(predicted, given, strict=True):
            index.drop(at, gone.intersection(each))

    def node_changed(self, node: str) -> None:
        """The node is gone, or its cache is another one now: nothing is on its way to it, nothing predicted there."""
        for request in [request for request, pending in self.pending.items() if pending.node == node]:
            self.on_log(request)
        at = self._ordinals.pop(node, None)
        if at is not None:
            for generation in (self._young, self._old):
                for index in generation.values():
                    index.clear(at)


def _among(blocks: set[int], packed: bytes, scanned: int) -> set[int]:
    """Those of some blocks that are in a chain. Up to `scanned` of them are looked for without unpacking it."""
    if len(blocks) > scanned:
        return blocks.intersection(unpack_hashes(packed))
    # Engines tell of one eviction after the other, while many long prompts wait.
    chain = np.frombuffer(packed, "<u8")
    return {block for block in blocks if (chain == np.uint64(block)).any()}
