"""What a coordinator reads from the log for an adapter, which may not read it: its node's last word, and its engine's hashes.

One reading at a time; the others wait. Whoever asks gets an answer in a few seconds: if it is an empty piece, the subject in
it goes on waiting. So one who asks learns soon that a coordinator is gone, however long the reading takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import anyio.to_thread
import msgspec
import structlog

from kvplane.events.errors import KvplaneError
from kvplane.events.hashing import pack_hashes
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Busy
from kvplane.services.protocol.remembered import Remembered
from kvplane.services.roles import memory
from kvplane.services.rpc.pieces import PIECE_BYTES, Pieces

if TYPE_CHECKING:
    from anyio.abc import TaskGroup
    from nats.aio.client import Client

POLL_SECONDS = 2.0
"""How long one question waits for a reading."""
GONE_SECONDS = 20.0
"""So long after it was last asked for, a reading is given up."""
BUSY_SECONDS = 60.0
"""How long a reading waits for those before it."""
HELD_BYTES = 256 << 20
"""While so much is not yet fetched, nothing more is read."""

_log = structlog.get_logger("kvplane.engines")


class ReadingLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long readings take and how large they get at the most, see the constants of these names."""

    poll_seconds: float = POLL_SECONDS
    gone_seconds: float = GONE_SECONDS
    busy_seconds: float = BUSY_SECONDS
    held_bytes: int = HELD_BYTES
    piece_bytes: int = PIECE_BYTES
    most_entries: int = memory.MOST_ENTRIES


LIMITS = ReadingLimits()


def _encoded(read: memory.Memory | None) -> bytes:
    if read is None or read.registered is None:
        return msgspec.msgpack.encode(None)
    tiers = {tier: (pack_hashes(names.values()), list(names)) for tier, names in read.engine_hashes().items()}
    return msgspec.msgpack.encode(
        Remembered(
            epoch=read.epoch, block_size=read.registered.block_size, labels=read.registered.labels,
            position=read.position, tiers=tiers, groups=read.groups(),
        )
    )  # fmt: skip


class _Reading:
    """One reading that somebody waits for."""

    def __init__(self, node: str, gone_seconds: float) -> None:
        self.node = node
        self._gone_seconds = gone_seconds
        self.result = uuid4().hex
        self.scope = anyio.CancelScope()
        self.ended, self.fetched = anyio.Event(), anyio.Event()
        self.piece: messages.Piece | None = None
        self.failed: Exception = Busy(f"node {node!r} asked again, or waited too long; ask again")
        self.touch()

    def touch(self) -> None:
        """Somebody asks for it now."""
        self.scope.deadline = anyio.current_time() + self._gone_seconds


class EngineHashes:
    """Answers of one coordinator. `subject` is its own, where further pieces are asked for."""

    def __init__(self, client: Client, fleet: str, subject: str, limits: ReadingLimits = LIMITS) -> None:
        self.client = client
        self.fleet = fleet
        self.subject = subject
        self.limits = limits
        self._pieces = Pieces(subject, client, piece_bytes=limits.piece_bytes)
        self._lock = anyio.Lock()
        self._readings: dict[str, _Reading] = {}
        self._given: dict[str, str] = {}
        """The last result of each node: there is one at most."""
        self._group: TaskGroup

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Read what is asked for, until cancelled."""
        async with anyio.create_task_group() as self._group:
            self._group.start_soon(self._pieces.run)
            task_status.started()

    async def last(self, request: messages.NodeRequest) -> messages.NodeLast:
        """The log's last commit about the node itself."""
        messages.names((request.node, "node"))
        return await memory.last(self.client, self.fleet, request.node)

    async def first(self, request: messages.NodeRequest) -> messages.Piece:
        """Begin to read what the log says of a node's cache. A node that asks again gives up what it asked for before."""
        messages.names((request.node, "node"))
        for before in [reading for reading in self._readings.values() if reading.node == request.node]:
            before.scope.cancel()
        self._pieces.forget(self._given.pop(request.node, ""))
        reading = _Reading(request.node, self.limits.gone_seconds)
        self._readings[reading.result] = reading
        self._group.start_soon(self._read, reading)
        return await self._wait(reading)

    async def more(self, request: messages.PieceRequest) -> messages.Piece:
        """Wait on for a reading, or give a further piece of what was read."""
        reading = self._readings.get(request.result)
        return await (self._pieces.more(request) if reading is None else self._wait(reading))

    async def _wait(self, reading: _Reading) -> messages.Piece:
        reading.touch()
        with anyio.move_on_after(self.limits.poll_seconds):
            await reading.ended.wait()
        if not reading.ended.is_set():
            return messages.Piece(result=reading.result, offset=0, size=0, data=b"", next=self.subject)
        reading.fetched.set()
        if reading.piece is None:
            raise reading.failed
        return reading.piece

    async def _read(self, reading: _Reading) -> None:
        try:
            with reading.scope:
                try:
                    await self._one_by_one(reading)
                except KvplaneError as error:
                    reading.failed = error
                reading.ended.set()
                await reading.fetched.wait()
        finally:
            reading.ended.set()
            del self._readings[reading.result]

    async def _one_by_one(self, reading: _Reading) -> None:
        limits = self.limits
        with anyio.move_on_after(limits.busy_seconds) as waiting:
            async with self._lock:
                if self._pieces.size >= limits.held_bytes:
                    raise Busy(f"{self._pieces.size:,} bytes that were read for nodes are not yet fetched; ask again")
                waiting.deadline = float("inf")
                # In a thread, since the hashes of a large cache take a second of time that others need.
                read = await memory.read(self.client, self.fleet, reading.node, most_entries=limits.most_entries)
                data = await anyio.to_thread.run_sync(_encoded, read)
                reading.piece = self._pieces.first(data)
                if read is not None:
                    self._given[reading.node] = reading.piece.result
        if waiting.cancelled_caught:
            reading.failed = Busy(
                f"this coordinator has read what other nodes held before for {limits.busy_seconds:g} s; ask again"
            )
            _log.warning("names_busy", node=reading.node, waiting=len(self._readings))
