"""What the log says of a node: the engine's names of its blocks, and the last batch. Read from the node's own subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import structlog
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from events import codec
from events.errors import BadCommit, LogUnavailable
from events.hashing import unpack_hashes
from events.subjects import stream_name, subject
from events.types import BlocksRemoved, BlocksStored, CacheCleared, NodeRegistered

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from events.types import Event, Tier
    from services.engines.dialect import EngineHash

READ_SECONDS = 30.0
"""How long nothing may arrive while the log is read."""

_log = structlog.get_logger("kvplane.engines")


class Memory:
    """A fold of one node's cache events in one epoch. Pure."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.registered: NodeRegistered | None = None
        self.position: int | None = None
        """Last batch of which the log knows; some of it may be missing."""
        self._tiers: dict[Tier, dict[int, EngineHash]] = {}
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
            # What another writer stored without the engine's names can't be followed, so it is not taken over.
            tier.update(zip(blocks, event.engine_hashes or (), strict=False))
        elif isinstance(event, BlocksRemoved):
            tier = self._tiers.setdefault(event.tier, {})
            for block in unpack_hashes(event.hashes):
                tier.pop(block, None)
        elif isinstance(event, CacheCleared):
            self._tiers.clear()
        else:
            return
        self.position = event.batch

    def names(self) -> dict[Tier, dict[EngineHash, int]]:
        """Blocks by the engine's names, in each tier."""
        return {tier: {name: block for block, name in blocks.items()} for tier, blocks in self._tiers.items()}


async def read(client: Client, fleet: str, node: str) -> Memory | None:
    """Read the last epoch of a node's cache; none when the log knows of none. Raises `LogUnavailable`."""
    try:
        return await _read(client, fleet, node)
    except (NatsError, APIError, OSError, TimeoutError) as error:
        raise LogUnavailable(f"the log can't be read for what node {node!r} held before ({error!r})") from None


async def _read(client: Client, fleet: str, node: str) -> Memory | None:
    js, stream, where = client.jetstream(), stream_name(fleet), subject(fleet, "cache", node)
    try:
        last = await js.get_last_msg(stream, where)
        events = codec.decode_body("cache", last.data or b"")
        memory = Memory(getattr(events[0], "epoch", 0))
        begun = await js.get_msg(stream, seq=memory.epoch)
        registered = codec.decode_body("node", begun.data or b"")[0]
    except (NotFoundError, BadCommit):
        return None
    if not isinstance(registered, NodeRegistered) or registered.node != node:
        return None
    memory.registered = registered
    end, done, heard = last.seq or 0, anyio.Event(), anyio.Event()

    async def take(message: Msg) -> None:
        nonlocal heard
        sequence = message.metadata.sequence.stream
        if sequence <= end:
            stored = codec.Message(sequence, message.subject, 0, message.headers, message.data)
            try:
                memory.apply(codec.decode(fleet, stored))
            except BadCommit:
                _log.debug("commit_passed_over", node=node, sequence=sequence)
        if sequence >= end:
            done.set()
        heard.set()
        heard = anyio.Event()

    reader = await js.subscribe(
        where, ordered_consumer=True, cb=take, stream=stream,
        config=ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=memory.epoch + 1, ack_policy=AckPolicy.NONE
        ),
    )  # fmt: skip
    try:
        while not done.is_set():
            before = heard
            with anyio.fail_after(READ_SECONDS):
                await before.wait()
    finally:
        await reader.unsubscribe()
    return memory
