"""Snapshots on the server: an object each, in a bucket beside the log, named after their sequence.

What is in them is the projections' business (`projections.snapshot`); here they are bytes. An object is there whole or not at
all, with a checksum of it, as NATS' object store lays it out (ADR-20). Whoever may write anything can have a server's
acknowledgement land on any subject of the bucket, so what is no object's description is passed over, and what comes behind an
object's last piece is not read; the client's own object store would fail on both.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from datetime import UTC, datetime
from hashlib import sha256
from io import BytesIO
from secrets import token_hex
from typing import TYPE_CHECKING

import anyio
import msgspec
from nats.errors import Error as NatsError
from nats.js.api import ObjectStoreConfig, StorageType
from nats.js.errors import APIError, NotFoundError
from nats.js.errors import Error as JetStreamError

from kvplane.events.errors import LogUnavailable
from kvplane.events.log.deliveries import Deliveries
from kvplane.events.log.stream import stream_info
from kvplane.events.subjects import check_fleet

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

CHUNK_BYTES = 1 << 20
"""Largest piece in which an object travels: for so long as one is hashed and sent the event loop stands still."""
IDLE_SECONDS = 10.0
"""When no piece of an object comes for so long it is given up: it may have been deleted meanwhile."""
HEARTBEAT_SECONDS = 1.0
PENDING_BYTES = 64 << 20
"""Bytes of a snapshot that may wait in the client."""
LEFT_SECONDS = 600.0
"""Pieces that no object lists and that are older than this are left over from a writer that was killed."""

_FAILURES = (NatsError, JetStreamError, APIError, OSError, TimeoutError, ValueError, TypeError, KeyError)


class _Object(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a bucket says of one object."""

    name: str
    bucket: str
    nuid: str
    """Where its pieces are."""
    size: int
    chunks: int
    digest: str = ""
    mtime: str = ""
    deleted: bool = False


_decode = msgspec.json.Decoder(_Object).decode


class SnapshotStore:
    """The snapshots of one fleet. Every method raises `LogUnavailable` when the server does not answer as it must."""

    def __init__(self, client: Client, fleet: str, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._client = client
        self._fleet = fleet
        self._bucket = f"KV_{check_fleet(fleet)}_snapshots"
        self._stream = f"OBJ_{self._bucket}"
        self._there = False
        self._idle_seconds = idle_seconds

    @property
    def _js(self) -> JetStreamContext:
        return self._client.jetstream()

    async def _open(self, *, create: bool = False) -> bool:
        """Whether there is a bucket."""
        if not self._there:
            try:
                await self._js.stream_info(self._stream)
            except NotFoundError:
                if not create:
                    return False
                copies = (await stream_info(self._js, self._fleet)).config.num_replicas or 1
                config = ObjectStoreConfig(
                    description=f"snapshots of fleet {self._fleet}", storage=StorageType.FILE, replicas=copies
                )
                await self._js.create_object_store(self._bucket, config=config)
            self._there = True
        return self._there

    def _described(self, name: str) -> str:
        """Subject of what is said of an object."""
        return f"$O.{self._bucket}.M.{urlsafe_b64encode(name.encode()).decode()}"

    def _pieces(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"

    async def sequences(self) -> list[int]:
        """Sequences of all snapshots, the newest first."""
        try:
            return sorted((int(name) for name in await self._objects() if name.isdigit()), reverse=True)
        except _FAILURES as error:
            raise self._unavailable("listed", error) from error

    async def _objects(self, where: str = "") -> dict[str, _Object]:
        """All objects, or those that a subject speaks of, by name."""
        found: dict[str, _Object] = {}
        if not await self._open():
            return found

        def take(message: Msg) -> None:
            try:
                described = _decode(message.data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return
            if message.subject != self._described(described.name):
                return
            if described.deleted:
                found.pop(described.name, None)
            else:
                found[described.name] = described

        await self._read(where or f"$O.{self._bucket}.M.>", take)
        return found

    async def _read(self, subject: str, take: Callable[[Msg], object], most: int | None = None) -> int:
        """Hand on what is stored on a subject, and say how many pieces. Raises `TimeoutError` when no more comes."""
        count, whole, heard = 0, True, anyio.Event()

        def got(_: int, __: int, message: Msg) -> None:
            nonlocal count, heard
            if most is None or count < most:
                take(message)
            count += 1
            heard.set()
            heard = anyio.Event()

        def broken() -> None:
            nonlocal whole
            whole = False
            heard.set()

        deliveries = Deliveries(self._client, self._stream, "snapshots", got, broken)
        try:
            stored = await deliveries.open(
                self._js, after=0, heartbeat=HEARTBEAT_SECONDS, pending_bytes=PENDING_BYTES, subjects=[subject]
            )
            stored = stored if most is None else min(stored, most)
            while count < stored:
                with anyio.move_on_after(self._idle_seconds) as scope:
                    await heard.wait()
                if scope.cancelled_caught or not whole:
                    # They may have been deleted meanwhile.
                    raise TimeoutError(f"nothing came for {self._idle_seconds:g} s after {count} of {stored} pieces")
        finally:
            await deliveries.close()
        return stored

    async def put(self, sequence: int, data: bytes | BytesIO) -> None:
        """Keep a snapshot, read from its beginning."""
        name, nuid = f"{sequence:020}", token_hex(16)
        source = BytesIO(data) if isinstance(data, bytes) else data
        chunk, digest = min(CHUNK_BYTES, self._client.max_payload // 2), sha256()
        described = _Object(name=name, bucket=self._bucket, nuid=nuid, size=0, chunks=0)
        try:
            await self._open(create=True)
            before = await self._objects(self._described(name))
            while piece := source.read(chunk):
                digest.update(piece)
                await self._js.publish(self._pieces(nuid), piece)
                described.size += len(piece)
                described.chunks += 1
            described.digest = f"SHA-256={urlsafe_b64encode(digest.digest()).decode()}"
            described.mtime = datetime.now(UTC).isoformat()
            # It takes the place of all that was said of the object before.
            await self._js.publish(
                self._described(name), msgspec.json.encode(described), headers={"Nats-Rollup": "sub"}
            )
            for old in before.values():
                await self._js.purge_stream(self._stream, subject=self._pieces(old.nuid))
        except _FAILURES as error:
            raise self._unavailable("written", error) from error

    async def get(self, sequence: int) -> bytes:
        """A snapshot's bytes."""
        name, data = f"{sequence:020}", BytesIO()
        try:
            described = (await self._objects(self._described(name)))[name]
            read = await self._read(self._pieces(described.nuid), lambda m: data.write(m.data), described.chunks)
            if read != described.chunks:
                raise ValueError("pieces are missing")
            # A gigabyte takes a second.
            found = await anyio.to_thread.run_sync(lambda: sha256(data.getbuffer()).digest())
            if described.digest.partition("=")[2] != urlsafe_b64encode(found).decode():
                raise ValueError("its checksum is wrong")
        except _FAILURES as error:
            raise self._unavailable("read", error) from error
        return data.getvalue()

    async def sweep(self, *, seconds: float = LEFT_SECONDS) -> int:
        """Delete what belongs to no snapshot and has not grown for so long; on how many subjects there was some.

        A writer that is killed leaves pieces, and nobody else knows of them.
        """
        left = 0
        try:
            if not await self._open():
                return 0
            # Whatever subject it has: what a consumer delivers here keeps its own.
            subjects = (await self._js.stream_info(self._stream, subjects_filter=">")).state.subjects or {}
            objects = (await self._objects()).values()
            listed = {where for each in objects for where in (self._pieces(each.nuid), self._described(each.name))}
            for subject in subjects.keys() - listed:
                written = (await self._js.get_last_msg(self._stream, subject)).time
                if written is not None and (datetime.now(UTC) - written).total_seconds() >= seconds:
                    await self._js.purge_stream(self._stream, subject=subject)
                    left += 1
        except _FAILURES as error:
            raise self._unavailable("swept", error) from error
        return left

    async def delete(self, sequence: int) -> None:
        """Let a snapshot go."""
        name = f"{sequence:020}"
        try:
            described = (await self._objects(self._described(name))).get(name)
            await self._js.purge_stream(self._stream, subject=self._described(name))
            if described is not None:
                await self._js.purge_stream(self._stream, subject=self._pieces(described.nuid))
        except _FAILURES as error:
            raise self._unavailable("deleted", error) from error

    def _unavailable(self, what: str, error: BaseException) -> LogUnavailable:
        return LogUnavailable(f"snapshots of fleet {self._fleet!r} could not be {what}: {error!r}")
