"""The fold a second time, by other means: sets of facts, stamps instead of orders, no columns, no index."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvplane.events import codec, types
from kvplane.events.subjects import subject
from kvplane.projections.load import MEASURED_DECAY, TRUSTED_ALIKE_SECONDS, TRUSTED_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.subjects import Topic

SECOND = 10**9
LIMIT = 900
"""Seconds after which a request that nobody ended is over."""


def blocks_of(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]


@dataclass
class Facts:
    """What is known of one node."""

    registered: types.NodeRegistered
    epoch: int
    changed: int
    cordoned: bool = False
    lost: bool = False
    queue: float = 0.0
    since: float = 0.0
    predicted_seconds: float = 0.0
    measured_seconds: float = 0.0

    @property
    def speed(self) -> float:
        return float(self.registered.labels["prefill_tokens_per_s"])

    @property
    def managed(self) -> bool:
        return self.registered.cache_mode == "managed"


class Reference:
    """The rules once more. A refusal is a word, as in the fold; nothing is changed before all was checked."""

    def __init__(self) -> None:
        self.sequence = 0
        self.clock = 0
        self.stamp = 0
        self.nodes: dict[str, Facts] = {}
        self.blocks: set[tuple[str, str, int]] = set()
        self.used: dict[tuple[str, int], int] = {}
        self.sessions: dict[tuple[str, str], tuple[str, int, str, int]] = {}
        self.running: dict[str, tuple[types.RequestRouted, int]] = {}
        self.early: dict[str, tuple[str, int, bool]] = {}
        self.counters: dict[tuple[str, str], int] = {}
        self.buried: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.applied = 0
        self.policy = types.PolicyChanged("ttft")
        self.prompts: list[tuple[str, str, int, int | None]] = []
        """Prompts not known to be computed: node, request, uncached tokens, the block whose storing would tell."""
        self.measured = (0.0, 0.0)

    def deliver(
        self, time: int, where: tuple[Topic, str], events: Sequence[Any], headers: dict[str, str]
    ) -> str | None:
        self.pass_time(time)
        reason = self.judge(where, events, headers)
        self.count(reason)
        return reason

    def deliver_bad(self, time: int, reason: str) -> None:
        self.pass_time(time)
        self.count(reason)

    def count(self, reason: str | None) -> None:
        if reason is None:
            self.applied += 1
        else:
            self.skipped[reason] += 1

    def pass_time(self, time: int) -> None:
        self.sequence += 1
        if time < self.clock - 60 * SECOND:
            self.set_clock_back(self.clock - time)
        self.clock = max(self.clock, time)
        for request, (_, since) in list(self.running.items()):
            if self.clock - since >= LIMIT * SECOND:
                self.finish(request)

    def set_clock_back(self, by: int) -> None:
        """It was wrong before, and whatever it gave a time to was as much too late."""
        self.clock -= by
        self.running = {request: (event, since - by) for request, (event, since) in self.running.items()}
        self.early = {request: (node, when - by, served) for request, (node, when, served) in self.early.items()}
        for node in self.nodes.values():
            node.queue -= by / SECOND
            node.since -= by / SECOND

    def tick(self) -> int:
        self.stamp += 1
        return self.stamp

    def judge(self, where: tuple[Topic, str], events: Sequence[Any], headers: dict[str, str]) -> str | None:
        topic, name = where
        writer, number = headers.get(codec.WRITER, ""), int(headers.get(codec.WRITER_SEQ, 0))
        if writer and number:
            key = (subject("f", topic, name), writer)
            seen = self.counters.get(key, 0)
            self.counters[key] = max(seen, number)
            if number <= seen:
                return "duplicate"
        based_on = headers.get(codec.BASED_ON)
        node = self.nodes.get(name)
        if topic == "cache":
            if node is None:
                return "unknown_node"
            for event in events:
                if event.epoch != node.epoch:
                    return "stale_epoch"
                kinds = (types.BlocksPlaced,) if node.managed else (types.BlocksStored, types.BlocksRemoved)
                if not isinstance(event, (*kinds, types.CacheCleared)):
                    return "wrong_mode"
                if isinstance(event, types.BlocksStored):
                    limit = 2 * node.registered.capacity_blocks.get(event.tier, 1 << 40)
                    if len(self.held(name, event.tier)) > limit:
                        return "capacity"
            if node.managed and based_on is not None and int(based_on) < node.changed:
                return "stale"
            return self.cache(name, node, events)
        if topic == "node":
            changed = node.changed if node else self.buried.get(name, 0)
            if based_on is not None and int(based_on) < changed:
                return "stale"
            return self.lifecycle(name, node, events[0])
        for event in events:
            getattr(self, type(event).__name__)(event)
        return None

    def lifecycle(self, name: str, node: Facts | None, event: Any) -> str | None:
        if isinstance(event, types.NodeRegistered):
            peers = [
                n for other, n in self.nodes.items() if other != name and set(n.registered.models) & set(event.models)
            ]
            if any(peer.registered.block_size != event.block_size for peer in peers):
                return "block_size"
            self.empty(name)
            self.nodes[name] = Facts(event, self.sequence, self.sequence, cordoned=bool(node and node.cordoned))
            self.buried.pop(name, None)
            return None
        if node is None:
            return "unknown_node"
        before = replace(node)
        match event:
            case types.NodeCordoned() | types.NodeUncordoned():
                node.cordoned = isinstance(event, types.NodeCordoned)
            case types.NodeLost():
                node.lost = True
            case types.NodeRecovered():
                node.lost, node.queue = False, 0.0 if node.lost else node.queue
            case _:
                self.empty(name, homeless=True)
                del self.nodes[name]
                self.buried[name] = self.sequence
                return None
        if (node.lost, node.cordoned) == (before.lost, before.cordoned):
            return "no_change"
        if node.lost and not before.lost:
            self.empty(name, homeless=True)
        node.changed = self.sequence
        return None

    def empty(self, name: str, *, homeless: bool = False) -> None:
        self.forget_blocks(name)
        self.running = {request: run for request, run in self.running.items() if run[0].node != name}
        self.prompts = [prompt for prompt in self.prompts if prompt[0] != name]
        if name in self.nodes:
            self.nodes[name].predicted_seconds = self.nodes[name].measured_seconds = 0.0
        if homeless:
            for key, (node, since, _, stamp) in self.sessions.items():
                if node == name:
                    self.sessions[key] = ("", since, name, stamp)

    def forget_blocks(self, name: str) -> None:
        self.blocks = {fact for fact in self.blocks if fact[0] != name}
        self.used = {key: stamp for key, stamp in self.used.items() if key[0] != name}

    def cache(self, name: str, node: Facts, events: Sequence[Any]) -> str | None:
        for event in events:
            match event:
                case types.BlocksStored():
                    self.blocks |= {(name, event.tier, block) for block in blocks_of(event.hashes)}
                    self.stored(name, event.hashes)
                case types.BlocksRemoved():
                    self.blocks -= {(name, event.tier, block) for block in blocks_of(event.hashes)}
                case types.CacheCleared():
                    self.forget_blocks(name)
                    node.changed = self.sequence if node.managed else node.changed
                case types.BlocksPlaced():
                    return self.place(name, node, event)
        return None

    def place(self, name: str, node: Facts, event: types.BlocksPlaced) -> str | None:
        if node.lost:
            return "node_lost"
        held = self.held(name, "gpu")
        out = Counter(blocks_of(event.evicted))
        coming = set(blocks_of(event.stored))
        if any(times > 1 or block in coming or block not in held for block, times in out.items()):
            return "not_held"
        if out.keys() & self.protected(name).keys():
            return "protected"
        after = (held - out.keys()) | coming
        if len(after) > node.registered.capacity_blocks["gpu"]:
            return "capacity"
        self.blocks = {fact for fact in self.blocks if fact[0] != name} | {(name, "gpu", block) for block in after}
        self.used = {key: stamp for key, stamp in self.used.items() if key[0] != name or key[1] not in out}
        self.use(name, event.stored)
        self.stored(name, event.stored)
        node.changed = self.sequence
        return None

    def stored(self, name: str, packed: bytes) -> None:
        if packed and not self.nodes[name].lost:
            last = blocks_of(packed)[-1]
            for node, request, _, end in self.prompts:
                if (node, end) == (name, last):
                    self.computed(name, request)
                    return

    def computed(self, name: str, request: str) -> None:
        """Engines prefill in order: whatever the node got before this request is computed as well."""
        node, now = self.nodes[name], self.clock / SECOND
        mine = [prompt for prompt in self.prompts if prompt[0] == name]
        done = mine[: [prompt[1] for prompt in mine].index(request) + 1]
        self.prompts = [prompt for prompt in self.prompts if prompt not in done]
        tokens = sum(prompt[2] for prompt in done)
        if tokens and now > node.since:
            self.measured = (
                self.measured[0] * MEASURED_DECAY + tokens / node.speed,
                self.measured[1] * MEASURED_DECAY + now - node.since,
            )
            node.predicted_seconds = node.predicted_seconds * MEASURED_DECAY + tokens / node.speed / self.ratio
            node.measured_seconds = node.measured_seconds * MEASURED_DECAY + now - node.since
        node.since = now
        node.queue = now + self.pending(name) / self.pace(node)

    @property
    def ratio(self) -> float:
        return (self.measured[0] + TRUSTED_SECONDS) / (self.measured[1] + TRUSTED_SECONDS)

    def pace(self, node: Facts) -> float:
        alike = (node.predicted_seconds + TRUSTED_ALIKE_SECONDS) / (node.measured_seconds + TRUSTED_ALIKE_SECONDS)
        return node.speed * alike * self.ratio

    def pending(self, name: str) -> int:
        return sum(prompt[2] for prompt in self.prompts if prompt[0] == name)

    def decoding(self, name: str) -> int:
        wait = {request for node, request, _, _ in self.prompts if node == name}
        return sum(event.node == name and request not in wait for request, (event, _) in self.running.items())

    def use(self, name: str, packed: bytes) -> None:
        """The last block of a chain is the first to be old."""
        for block in reversed(blocks_of(packed)):
            if (name, "gpu", block) in self.blocks:
                self.used[name, block] = self.tick()

    def held(self, name: str, tier: str) -> set[int]:
        return {block for where, level, block in self.blocks if (where, level) == (name, tier)}

    def protected(self, name: str) -> Counter[int]:
        return Counter(b for event, _ in self.running.values() if event.node == name for b in blocks_of(event.hashes))

    def lives(self, name: str) -> bool:
        if name in self.nodes and not self.nodes[name].lost:
            return True
        self.ignored["unknown_node"] += 1
        return False

    def SessionAssigned(self, event: types.SessionAssigned) -> None:  # noqa: N802 - found by the event's name
        if self.lives(event.node):
            self.sessions[event.model, event.session] = (event.node, self.sequence, "", self.tick())

    def SessionEnded(self, event: types.SessionEnded) -> None:  # noqa: N802
        if self.sessions.pop((event.model, event.session), None) is None:
            self.ignored["unknown_session"] += 1

    def RequestRouted(self, event: types.RequestRouted) -> None:  # noqa: N802
        if not self.lives(event.node):
            return
        if event.request in self.running:
            self.finish(event.request)
        node = self.nodes[event.node]
        self.running[event.request] = (event, self.clock)
        uncached = max(0, event.tokens - event.match * node.registered.block_size)
        node.queue = max(node.queue, self.clock / SECOND) + uncached / self.pace(node)
        mine = [prompt for prompt in self.prompts if prompt[0] == event.node]
        if not mine:
            node.since = self.clock / SECOND
        end = blocks_of(event.hashes)[-1] if event.hashes and event.match < event.blocks else None
        if any(prompt[3] == end for prompt in mine):
            end = None
        self.prompts.append((event.node, event.request, uncached, end))
        if (event.model, event.session) in self.sessions:
            self.sessions[event.model, event.session] = (*self.sessions[event.model, event.session][:3], self.tick())
        if node.managed:
            self.use(event.node, event.hashes)
        where, when, served = self.early.get(event.request, ("", 0, False))
        if where == event.node and event.decided * 1000 <= when:
            del self.early[event.request]
            self.finish(event.request, served=served)

    def RequestCompleted(self, event: types.RequestCompleted) -> None:  # noqa: N802
        if event.request in self.running:
            self.finish(event.request, served=event.status == "ok")
        else:
            self.ignored["unknown_request"] += 1
            self.early[event.request] = (event.node, self.clock, event.status == "ok")

    def PolicyChanged(self, event: types.PolicyChanged) -> None:  # noqa: N802
        self.policy = event

    def finish(self, request: str, *, served: bool = False) -> None:
        event, _ = self.running.pop(request)
        node = self.nodes[event.node]
        for prompt in self.prompts:
            if prompt[1] == request:
                if served:
                    self.computed(event.node, request)
                else:
                    self.prompts.remove(prompt)
                    node.queue -= prompt[2] / self.pace(node)
                break
        if all(other.node != event.node for other, _ in self.running.values()):
            node.queue = min(node.queue, self.clock / SECOND)
