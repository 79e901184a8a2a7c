"""What the log says of a node: the engine's hashes of its blocks, and the last batch. Read from the node's own subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import structlog
from msgspec.structs import replace
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from kvplane.events import codec
from kvplane.events.errors import BadCommit, LogUnavailable
from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.events.log.deliveries import Deliveries
from kvplane.events.subjects import stream_name, subject
from kvplane.events.types import BlocksRemoved, BlocksStored, CacheCleared, GroupRemoved, GroupStored, NodeRegistered
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import AnswerTooLarge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from kvplane.events.types import EngineHash, Event, GroupKind, Tier

READ_SECONDS = 30.0
"""How long nothing may arrive while the log is read."""
HEARTBEAT_SECONDS = 5.0
PENDING_BYTES = 32 << 20
"""Bytes that may wait in the client; the server's flow control keeps below it."""

MOST_ENTRIES = 4_000_000
"""Most blocks and writers of which a node's memory may consist; some 200 bytes each."""
NAME_BYTES = 64
"""Longest name of a block that is taken over. Those of engines have 32 at the most."""

_log = structlog.get_logger("kvplane.engines")


class Memory:
    """A fold of one node's cache events in one epoch. Pure."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.registered: NodeRegistered | None = None
        self.position: int | None = None
        """Last batch of which the log knows; some of it may be missing."""
        self._tiers: dict[Tier, dict[int, EngineHash]] = {}
        self._groups: dict[int, tuple[GroupStored, dict[int, EngineHash]]] = {}
        """Further KV cache groups: what was said of each last, and its blocks."""
        self._writers: dict[str, int] = {}

    def apply(self, commit: codec.Commit) -> None:
        """Apply a commit as the fleet's fold does."""
        if commit.writer and commit.writer_seq:
            if commit.writer_seq <= self._writers.get(commit.writer, 0):
                return
            self._writers[commit.writer] = commit.writer_seq
        if all(getattr(event, "epoch", None) == self.epoch for event in commit.events):
            for event in commit.events:
                self._event(event)

    def _event(self, event: Event) -> None:
        if isinstance(event, BlocksStored):
            blocks = unpack_hashes(event.hashes)
            tier = self._tiers.setdefault(event.tier, {})
            # What another writer stored without the engine's hashes can't be followed, so it is not taken over.
            self._take(tier, blocks, event.engine_hashes)
        elif isinstance(event, BlocksRemoved):
            tier = self._tiers.setdefault(event.tier, {})
            for block in unpack_hashes(event.hashes):
                tier.pop(block, None)
        elif isinstance(event, GroupStored):
            said = replace(event, batch=0, hashes=b"", engine_hashes=None)
            before, held = self._groups.get(event.group, (said, {}))
            held = held if before == said else {}
            self._take(held, unpack_hashes(event.hashes), event.engine_hashes)
            self._groups[event.group] = said, held
        elif isinstance(event, GroupRemoved):
            for block in unpack_hashes(event.hashes) if event.group in self._groups else ():
                self._groups[event.group][1].pop(block, None)
        elif isinstance(event, CacheCleared):
            self._tiers.clear()
            for _, held in self._groups.values():
                held.clear()
        else:
            return
        self.position = event.batch

    @staticmethod
    def _take(held: dict[int, EngineHash], blocks: Sequence[int], names: Sequence[EngineHash] | None) -> None:
        known = zip(blocks, names or (), strict=False)
        held.update({block: name for block, name in known if isinstance(name, int) or len(name) <= NAME_BYTES})

    def entries(self) -> int:
        """Of how many blocks and writers this consists."""
        groups = sum(len(held) for _, held in self._groups.values())
        return len(self._writers) + groups + sum(len(blocks) for blocks in self._tiers.values())

    def groups(self) -> dict[int, tuple[GroupKind, int, int, bytes, list[EngineHash]]]:
        """Further KV cache groups, as `Remembered` has them."""
        return {
            number: (said.kind, said.window, said.span, pack_hashes(held), list(held.values()))
            for number, (said, held) in self._groups.items()
        }

    def engine_hashes(self) -> dict[Tier, dict[EngineHash, int]]:
        """Blocks by the engine's hashes, in each tier."""
        return {tier: {name: block for block, name in blocks.items()} for tier, blocks in self._tiers.items()}


async def last(client: Client, fleet: str, node: str) -> messages.NodeLast:
    """The log's last commit about a node itself. Raises `LogUnavailable`."""
    try:
        message = await client.jetstream().get_last_msg(stream_name(fleet), subject(fleet, "node", node))
    except NotFoundError:
        return messages.NodeLast(sequence=0, body=b"")
    except (NatsError, APIError, OSError, TimeoutError) as error:
        raise LogUnavailable(f"the log can't be read for what became of node {node!r} ({error!r})") from None
    return messages.NodeLast(sequence=message.seq or 0, body=message.data or b"")


async def read(client: Client, fleet: str, node: str, *, most_entries: int = MOST_ENTRIES) -> Memory | None:
    """Read the last epoch of a node's cache; none when the log knows of none.

    Raises `LogUnavailable`, or `AnswerTooLarge` for more than `most_entries` blocks and writers.
    """
    try:
        return await _read(client, fleet, node, most_entries)
    except (NatsError, APIError, OSError, TimeoutError) as error:
        raise LogUnavailable(f"the log can't be read for what node {node!r} held before ({error!r})") from None


async def _read(client: Client, fleet: str, node: str, most_entries: int) -> Memory | None:
    js, stream, where = client.jetstream(), stream_name(fleet), subject(fleet, "cache", node)
    try:
        last = await js.get_last_msg(stream, where)
        events = codec.decode_body("cache", last.data or b"")
        memory = Memory(getattr(events[0], "epoch", 0))
        begun = await js.get_msg(stream, seq=memory.epoch)
        registered = codec.decode_body("node", begun.data or b"")[0]
    except (NotFoundError, BadCommit):
        return None
    end = last.seq or 0
    if not isinstance(registered, NodeRegistered) or registered.node != node or memory.epoch >= end:
        return None
    memory.registered = registered
    await _fold(client, fleet, memory, where, end, most_entries=most_entries)
    return memory


async def _fold(
    client: Client, fleet: str, memory: Memory, where: str, end: int, *, most_entries: int = MOST_ENTRIES
) -> None:  # fmt: skip
    """Apply what is on one subject after the memory's epoch. Raises `TimeoutError`, `AnswerTooLarge`."""
    done, whole, delivered = False, True, anyio.Event()

    def take(sequence: int, _: int, message: Msg) -> None:
        nonlocal done, delivered
        if sequence <= end:
            stored = codec.Message(sequence, message.subject, 0, message.headers, message.data)
            try:
                memory.apply(codec.decode(fleet, stored))
            except BadCommit:
                _log.debug("commit_passed_over", subject=where, sequence=sequence)
        done |= sequence >= end
        delivered.set()
        delivered = anyio.Event()

    def broken() -> None:
        nonlocal whole
        whole = False
        delivered.set()

    deliveries = Deliveries(client, stream_name(fleet), "memory", take, broken)
    try:
        await deliveries.open(
            client.jetstream(), after=memory.epoch, heartbeat=HEARTBEAT_SECONDS, pending_bytes=PENDING_BYTES,
            subjects=[where],
        )  # fmt: skip
        while True:
            if memory.entries() > most_entries:
                raise AnswerTooLarge(
                    f"the log says more than {most_entries:,} things of what the node held before; begin anew"
                )
            if done:
                break
            if not whole:
                raise TimeoutError("deliveries were lost")
            with anyio.fail_after(READ_SECONDS):
                await delivered.wait()
    finally:
        await deliveries.close()
