"""What the tests of folds and decisions begin with: a log told commit by commit, and the rules of the fold told again.

`Given` is the log and its fold. `Reference` is the fold a second time, by other means: sets of facts, stamps instead of
orders, no columns, no index.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from events import codec, types
from events.codec import Message
from events.hashing import pack_hashes
from events.subjects import Room, subject
from projections.fleet import Applied, FleetState

if TYPE_CHECKING:
    from collections.abc import Sequence

SECOND = 10**9
START = 1_700_000_000 * SECOND

Mode = Literal["managed", "reported"]


def headers_of(
    body: bytes, *, writer: str = "", counter: int = 0, based_on: int | None = None, crc: bool = False
) -> dict[str, str]:
    """Headers of a commit, those that are asked for."""
    headers = {codec.CRC32: codec.checksum(body)} if crc else {}
    if writer:
        headers[codec.WRITER] = writer
    if counter:
        headers[codec.WRITER_SEQ] = str(counter)
    if based_on is not None:
        headers[codec.BASED_ON] = str(based_on)
    return headers


def replayed(messages: Sequence[Message], fleet: str = "f") -> FleetState:
    """The state that another replica makes of the same log."""
    state = FleetState(fleet)
    for message in messages:
        state.apply(message)
    return state


def registered(
    node: str,
    *,
    models: Sequence[str] = ("m",),
    size: int = 16,
    capacity: int = 8,
    mode: Mode = "reported",
    most: int = 0,
    speed: int = 1000,
) -> types.NodeRegistered:
    """A registration. At 1,000 tokens a second, seconds of prefill are thousandths of tokens."""
    return types.NodeRegistered(
        node, "host:1", list(models), size, {"gpu": capacity, "cpu": 64}, mode, max_active=most,
        labels={"prefill_tokens_per_s": str(speed)},
    )  # fmt: skip


class Given:
    """A fleet's log and its fold. Each commit is a second after the one before, unless told otherwise."""

    def __init__(self) -> None:
        self.state = FleetState("f")
        self.messages: list[Message] = []
        self.now = START

    def raw(self, where: str, body: bytes, headers: dict[str, str] | None = None, *, after: float = 1) -> Applied:
        """Any bytes on any subject."""
        self.now += int(after * SECOND)
        message = Message(len(self.messages) + 1, where, self.now, headers, body)
        self.messages.append(message)
        return self.state.apply(message)

    def put(
        self,
        room: Room,
        name: str,
        *events: types.Event,
        writer: str = "",
        counter: int = 0,
        based_on: int | None = None,
        after: float = 1,
    ) -> str | None:
        """A commit; the reason why it was skipped, none when it was applied."""
        body = codec.encode(events)
        headers = headers_of(body, writer=writer, counter=counter, based_on=based_on, crc=True)
        return self.raw(subject("f", room, name), body, headers, after=after).skipped

    def node(self, event: types.NodeRegistered) -> int:
        """A node registers; its epoch."""
        assert self.put("node", event.node, event) is None
        return self.state.sequence

    def change(self, kind: type[types.Event], node: str, *, based_on: int | None = None) -> str | None:
        """A node is cordoned, lost, removed, and so on."""
        return self.put("node", node, kind(node), based_on=based_on)

    def stores(self, node: str, *blocks: int, tier: types.Tier = "gpu", epoch: int | None = None) -> str | None:
        """A node reports blocks."""
        life = self.state.nodes[node].epoch if epoch is None else epoch
        return self.put("cache", node, types.BlocksStored(node, life, 1, pack_hashes(blocks), None, tier))

    def drops(self, node: str, *blocks: int, tier: types.Tier = "gpu") -> str | None:
        """A node reports that blocks have left."""
        life = self.state.nodes[node].epoch
        return self.put("cache", node, types.BlocksRemoved(node, life, 1, pack_hashes(blocks), tier))

    def places(self, node: str, *stored: int, evicted: Sequence[int] = (), based_on: int | None = None) -> str | None:
        """Blocks are placed on a managed node."""
        event = types.BlocksPlaced(node, self.state.nodes[node].epoch, pack_hashes(stored), pack_hashes(evicted))
        return self.put("cache", node, event, based_on=based_on)

    def routes(
        self,
        request: str,
        node: str,
        *blocks: int,
        match: int = 0,
        tokens: int = 0,
        session: str = "",
        after: float = 1,
    ) -> str | None:
        """A request is sent to a node."""
        event = types.RequestRouted(
            request, "m", node, match, len(blocks), tokens or len(blocks) * 16, pack_hashes(blocks), session
        )
        return self.put("access", "w", event, after=after)

    def completes(self, request: str, node: str) -> str | None:
        """A request is over."""
        return self.put("access", "w", types.RequestCompleted(request, node))

    def assigns(self, session: str, node: str) -> str | None:
        """A session is put on a node."""
        return self.put("session", "m", types.SessionAssigned(session, "m", node))

    def held(self, node: str, tier: types.Tier = "gpu") -> set[int]:
        """Blocks that a node holds in a tier."""
        known = self.state.nodes[node]
        slot = known.slots.get(tier)
        return set() if slot is None else set(self.state.caches.index(known.model).held(slot))

    def matches(self, node: str, *blocks: int) -> int:
        """How many leading blocks a node holds on its GPU."""
        known = self.state.nodes[node]
        return self.state.caches.index(known.model).match(pack_hashes(blocks))[known.slots["gpu"]]


LIMIT = 900
"""Seconds after which a request that nobody ended is over."""


def blocks_of(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]


@dataclass
class Facts:
    """What is known of one node."""

    told: types.NodeRegistered
    epoch: int
    changed: int
    cordoned: bool = False
    lost: bool = False
    queue: float = 0.0

    @property
    def managed(self) -> bool:
        return self.told.cache_mode == "managed"


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
        self.counters: dict[tuple[str, str], int] = {}
        self.buried: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.applied = 0
        self.policy = types.PolicyChanged("ttft")

    def deliver(self, time: int, where: tuple[Room, str], events: Sequence[Any], headers: dict[str, str]) -> str | None:
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
        self.clock = max(self.clock, time)
        for request, (_, since) in list(self.running.items()):
            if self.clock - since >= LIMIT * SECOND:
                self.finish(request)

    def tick(self) -> int:
        self.stamp += 1
        return self.stamp

    def judge(self, where: tuple[Room, str], events: Sequence[Any], headers: dict[str, str]) -> str | None:
        room, name = where
        writer, number = headers.get(codec.WRITER, ""), int(headers.get(codec.WRITER_SEQ, 0))
        if writer and number:
            key = (subject("f", room, name), writer)
            seen = self.counters.get(key, 0)
            self.counters[key] = max(seen, number)
            if number <= seen:
                return "duplicate"
        based_on = headers.get(codec.BASED_ON)
        node = self.nodes.get(name)
        if room == "cache":
            if node is None:
                return "unknown_node"
            for event in events:
                if event.epoch != node.epoch:
                    return "stale_epoch"
                kinds = (types.BlocksPlaced,) if node.managed else (types.BlocksStored, types.BlocksRemoved)
                if not isinstance(event, (*kinds, types.CacheCleared)):
                    return "wrong_mode"
            if node.managed and based_on is not None and int(based_on) < node.changed:
                return "stale"
            return self.cache(name, node, events)
        if room == "node":
            changed = node.changed if node else self.buried.get(name, 0)
            if based_on is not None and int(based_on) < changed:
                return "stale"
            return self.lifecycle(name, node, events[0])
        for event in events:
            getattr(self, type(event).__name__)(event)
        return None

    def lifecycle(self, name: str, node: Facts | None, event: Any) -> str | None:
        if isinstance(event, types.NodeRegistered):
            peers = [n for other, n in self.nodes.items() if other != name and set(n.told.models) & set(event.models)]
            if any(peer.told.block_size != event.block_size for peer in peers):
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
        if len(after) > node.told.capacity_blocks["gpu"]:
            return "capacity"
        self.blocks = {fact for fact in self.blocks if fact[0] != name} | {(name, "gpu", block) for block in after}
        self.used = {key: stamp for key, stamp in self.used.items() if key[0] != name or key[1] not in out}
        self.use(name, event.stored)
        node.changed = self.sequence
        return None

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
        speed = float(node.told.labels["prefill_tokens_per_s"])
        work = max(0, event.tokens - event.match * node.told.block_size) / speed
        node.queue = max(node.queue, self.clock / SECOND) + work
        if (event.model, event.session) in self.sessions:
            self.sessions[event.model, event.session] = (*self.sessions[event.model, event.session][:3], self.tick())
        if node.managed:
            self.use(event.node, event.hashes)

    def RequestCompleted(self, event: types.RequestCompleted) -> None:  # noqa: N802
        if event.request in self.running:
            self.finish(event.request)
        else:
            self.ignored["unknown_request"] += 1

    def PolicyChanged(self, event: types.PolicyChanged) -> None:  # noqa: N802
        self.policy = event

    def finish(self, request: str) -> None:
        event, _ = self.running.pop(request)
        node = self.nodes[event.node]
        if all(other.node != event.node for other, _ in self.running.values()):
            node.queue = min(node.queue, self.clock / SECOND)
