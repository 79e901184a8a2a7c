"""The fold again, naively: dictionaries of sets, no segments, no columns, nothing shared with the real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvplane.events import types

if TYPE_CHECKING:
    from collections.abc import Sequence


def blocks_of(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]


@dataclass
class NaiveNode:
    registered: types.NodeRegistered
    epoch: int
    changed: int
    lost: bool = False
    cordoned: bool = False
    tiers: dict[str, set[int]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    """Blocks of a managed node, least recently used first."""

    @property
    def managed(self) -> bool:
        return self.registered.cache_mode == "managed"


class Naive:
    """What a fleet is after a list of commits. `apply` gives the reason of a skip, as the real fold does."""

    def __init__(self) -> None:
        self.nodes: dict[str, NaiveNode] = {}
        self.sessions: dict[tuple[str, str], str] = {}
        self.early: dict[str, str] = {}
        self.running: dict[str, tuple[str, list[int]]] = {}
        self.counters: dict[tuple[str, str], int] = {}
        self.removed: dict[str, int] = {}
        self.policy = "ttft"
        self.skipped: dict[str, int] = {}

    def apply(
        self,
        sequence: int,
        subject: str,
        events: Sequence[types.Event],
        writer: str,
        counter: int,
        based_on: int | None,
    ) -> str | None:
        reason = self._apply(sequence, subject, events, writer, counter, based_on)
        if reason is not None:
            self.skip(reason)
        return reason

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _apply(
        self,
        sequence: int,
        subject: str,
        events: Sequence[types.Event],
        writer: str,
        counter: int,
        based_on: int | None,
    ) -> str | None:
        if writer and counter:
            last = self.counters.get((subject, writer), 0)
            self.counters[subject, writer] = max(last, counter)
            if counter <= last:
                return "duplicate"
        first = events[0]
        if isinstance(first, types.BlocksStored | types.BlocksRemoved | types.BlocksPlaced | types.CacheCleared):
            return self._cache(sequence, events, based_on)
        name = getattr(first, "node", "")
        if isinstance(
            first,
            types.NodeRegistered
            | types.NodeCordoned
            | types.NodeUncordoned
            | types.NodeLost
            | types.NodeRecovered
            | types.NodeRemoved,
        ):
            changed = self.nodes[name].changed if name in self.nodes else self.removed.get(name, 0)
            if based_on is not None and based_on < changed:
                return "stale"
            return self._node(sequence, first)
        for event in events:
            self._other(event)
        return None

    def _node(self, sequence: int, event: types.Event) -> str | None:
        name = event.node  # type: ignore[attr-defined]
        node = self.nodes.get(name)
        if isinstance(event, types.NodeRegistered):
            for other, each in self.nodes.items():
                same = bool(set(each.registered.models) & set(event.models))
                if other != name and same and each.registered.block_size != event.block_size:
                    return "block_size"
            self._stop_all(name)
            self.nodes[name] = NaiveNode(event, sequence, sequence, cordoned=bool(node and node.cordoned))
            self.removed.pop(name, None)
            return None
        if node is None:
            return "unknown_node"
        if isinstance(event, types.NodeCordoned | types.NodeUncordoned):
            wanted = isinstance(event, types.NodeCordoned)
            if node.cordoned == wanted:
                return "no_change"
            node.cordoned = wanted
        elif isinstance(event, types.NodeLost):
            if node.lost:
                return "no_change"
            node.lost = True
            node.tiers, node.order = {}, []
            self._stop_all(name)
            self._homeless(name)
        elif isinstance(event, types.NodeRecovered):
            if not node.lost:
                return "no_change"
            node.lost = False
            # What a lost managed node is said to hold can't be placed; what a reported one reported counts.
            node.order = []
        else:
            self._stop_all(name)
            self._homeless(name)
            del self.nodes[name]
            self.removed[name] = sequence
            return None
        node.changed = sequence
        return None

    def _stop_all(self, name: str) -> None:
        self.running = {request: run for request, run in self.running.items() if run[0] != name}

    def _homeless(self, name: str) -> None:
        self.sessions = {key: "" if node == name else node for key, node in self.sessions.items()}

    def _cache(self, sequence: int, events: Sequence[types.Event], based_on: int | None) -> str | None:
        name = events[0].node  # type: ignore[attr-defined]
        node = self.nodes.get(name)
        if node is None:
            return "unknown_node"
        for event in events:
            if event.epoch != node.epoch:  # type: ignore[attr-defined]
                return "stale_epoch"
            if isinstance(event, types.BlocksPlaced) and not node.managed:
                return "wrong_mode"
            if isinstance(event, types.BlocksStored | types.BlocksRemoved) and node.managed:
                return "wrong_mode"
            if isinstance(event, types.BlocksStored):
                most = min(2 * node.registered.capacity_blocks.get(event.tier, 1 << 26), 1 << 26)
                if len(node.tiers.get(event.tier, ())) > most:
                    return "capacity"
        if node.managed and based_on is not None and based_on < node.changed:
            return "stale"
        for event in events:
            if isinstance(event, types.BlocksStored):
                node.tiers.setdefault(event.tier, set()).update(blocks_of(event.hashes))
            elif isinstance(event, types.BlocksRemoved):
                node.tiers.setdefault(event.tier, set()).difference_update(blocks_of(event.hashes))
            elif isinstance(event, types.CacheCleared):
                node.tiers, node.order = {}, []
                if node.managed:
                    node.changed = sequence
            elif isinstance(event, types.BlocksPlaced):
                return self._placed(sequence, name, node, event)
        return None

    def _placed(self, sequence: int, name: str, node: NaiveNode, event: types.BlocksPlaced) -> str | None:
        if node.lost:
            return "node_lost"
        stored, evicted = blocks_of(event.stored), blocks_of(event.evicted)
        held = node.tiers.setdefault("gpu", set())
        if len(set(evicted)) < len(evicted) or set(evicted) & set(stored) or not set(evicted) <= held:
            return "not_held"
        protected = {block for where, blocks in self.running.values() if where == name for block in blocks}
        if protected & set(evicted):
            return "protected"
        if len((held - set(evicted)) | set(stored)) > node.registered.capacity_blocks["gpu"]:
            return "capacity"
        node.tiers["gpu"] = (held - set(evicted)) | set(stored)
        node.order = [block for block in node.order if block not in evicted]
        self._use(node, stored, add=True)
        node.changed = sequence
        return None

    @staticmethod
    def _use(node: NaiveNode, blocks: list[int], *, add: bool) -> None:
        for block in reversed(blocks):
            if block in node.order:
                node.order.remove(block)
            elif not add:
                continue
            node.order.append(block)

    def _other(self, event: types.Event) -> None:
        if isinstance(event, types.SessionAssigned):
            node = self.nodes.get(event.node)
            if node is not None and not node.lost:
                self.sessions[event.model, event.session] = event.node
        elif isinstance(event, types.SessionEnded):
            self.sessions.pop((event.model, event.session), None)
        elif isinstance(event, types.RequestRouted):
            node = self.nodes.get(event.node)
            if node is not None and not node.lost:
                self.running[event.request] = (event.node, blocks_of(event.hashes))
                if node.managed:
                    self._use(node, blocks_of(event.hashes), add=False)
                if self.early.get(event.request) == event.node:
                    del self.early[event.request], self.running[event.request]
        elif isinstance(event, types.RequestCompleted):
            if self.running.pop(event.request, None) is None:
                self.early[event.request] = event.node
        elif isinstance(event, types.PolicyChanged):
            self.policy = event.policy
