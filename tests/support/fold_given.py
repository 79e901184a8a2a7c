"""What the tests of folds and decisions begin with: a log written commit by commit, and its fold.

`Given` is the log and its fold; `tests.support.reference_fold` has the fold a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.hashing import pack_hashes
from kvplane.events.subjects import Topic, subject
from kvplane.projections.fleet import FleetState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.projections.skips import Applied

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


def two_nodes() -> Given:
    """Two reported nodes of one model, both with a chain of three blocks."""
    given = Given()
    for name in ("a", "b"):
        given.node(registered(name))
        given.stores(name, 1, 2, 3)
    return given


class Given:
    """A fleet's log and its fold. Each commit is a second after the one before, unless `after` says otherwise."""

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
        topic: Topic,
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
        return self.raw(subject("f", topic, name), body, headers, after=after).skipped

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
