"""Snapshots on the server: an object each, in a bucket beside the log, named after their sequence.

What is in them is the projections' business (`projections.snapshot`); here they are bytes. An object is there whole or not at
all, and the server keeps a checksum of it.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from datetime import UTC, datetime
from hashlib import sha256
from io import BytesIO
from typing import TYPE_CHECKING, Any

import anyio
from nats.errors import Error as NatsError
from nats.js.api import ObjectMeta, ObjectMetaOptions, ObjectStoreConfig, StorageType
from nats.js.errors import APIError, BucketNotFoundError, NotFoundError
from nats.js.errors import Error as JetStreamError

from kvplane.events.errors import LogUnavailable
from kvplane.events.log.deliveries import Deliveries
from kvplane.events.log.stream import stream_info
from kvplane.events.subjects import check_fleet

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js.object_store import ObjectStore

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


class SnapshotStore:
    """The snapshots of one fleet. Every method raises `LogUnavailable` when the server does not answer as it must."""

    def __init__(self, client: Client, fleet: str, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._client = client
        self._fleet = fleet
        self._bucket = f"KV_{check_fleet(fleet)}_snapshots"
        self._store: ObjectStore | None = None
        self._idle_seconds = idle_seconds

    async def _open(self, *, create: bool = False) -> ObjectStore | None:
        if self._store is None:
            js = self._client.jetstream()
            try:
                self._store = await js.object_store(self._bucket)
            except (BucketNotFoundError, NotFoundError):
                if not create:
                    return None
                copies = (await stream_info(js, self._fleet)).config.num_replicas or 1
                config = ObjectStoreConfig(
                    description=f"snapshots of fleet {self._fleet}", storage=StorageType.FILE, replicas=copies
                )
                self._store = await js.create_object_store(self._bucket, config=config)
        return self._store

    async def sequences(self) -> list[int]:
        """Sequences of all snapshots, the newest first."""
        try:
            found = [info["name"] for info in await self._listed() if not info.get("deleted")]
            return sorted((int(name) for name in found if name.isdigit()), reverse=True)
        except _FAILURES as error:
            raise self._unavailable("listed", error) from error

    async def _listed(self) -> list[dict[str, Any]]:
        """What the bucket says of every object that is or was there."""
        if await self._open() is None:
            return []
        found: list[dict[str, Any]] = []
        await self._read(f"$O.{self._bucket}.M.>", lambda data: found.append(json.loads(data)))
        return found

    async def _read(self, subject: str, take: Callable[[bytes], object]) -> int:
        """Hand on all that is stored on a subject, and how many pieces. Raises `TimeoutError` when no more comes."""
        count, whole, heard = 0, True, anyio.Event()

        def got(_: int, __: int, message: Msg) -> None:
            nonlocal count, heard
            take(message.data)
            count += 1
            heard.set()
            heard = anyio.Event()

        def broken() -> None:
            nonlocal whole
            whole = False
            heard.set()

        deliveries = Deliveries(self._client, f"OBJ_{self._bucket}", "snapshots", got, broken)
        try:
            stored = await deliveries.open(
                self._client.jetstream(), after=0, heartbeat=HEARTBEAT_SECONDS, pending_bytes=PENDING_BYTES,
                subjects=[subject],
            )  # fmt: skip
            while count < stored:
                with anyio.move_on_after(self._idle_seconds) as scope:
                    await heard.wait()
                if scope.cancelled_caught or not whole:
                    # They may have been deleted meanwhile.
                    raise TimeoutError(f"nothing came for {self._idle_seconds:g} s after {count} of {stored} pieces")
        finally:
            await deliveries.close()
        return count

    async def put(self, sequence: int, data: bytes | BytesIO) -> None:
        """Keep a snapshot, read from its beginning."""
        options = ObjectMetaOptions(max_chunk_size=min(CHUNK_BYTES, self._client.max_payload // 2))
        name = f"{sequence:020}"
        try:
            store = await self._open(create=True)
            if store is not None:
                await store.put(name, data, meta=ObjectMeta(name=name, options=options))
        except _FAILURES as error:
            raise self._unavailable("written", error) from error

    async def get(self, sequence: int) -> bytes:
        """A snapshot's bytes."""
        data = BytesIO()
        try:
            store = await self._open()
            if store is None:
                raise NotFoundError
            info = await store.get_info(f"{sequence:020}")
            if await self._read(f"$O.{self._bucket}.C.{info.nuid}", data.write) != info.chunks:
                raise ValueError("pieces are missing")
            # More than a gigabyte takes a second.
            found = await anyio.to_thread.run_sync(lambda: sha256(data.getbuffer()).digest())
            if str(info.digest).partition("=")[2] != urlsafe_b64encode(found).decode():
                raise ValueError("its checksum is wrong")
        except _FAILURES as error:
            raise self._unavailable("read", error) from error
        return data.getvalue()

    async def sweep(self, *, seconds: float = LEFT_SECONDS) -> int:
        """Delete pieces that belong to no snapshot and have not grown for so long; of how many writers there were some.

        A writer that is killed leaves them, and nobody else knows of them.
        """
        js = self._client.jetstream()
        stream, pieces = f"OBJ_{self._bucket}", f"$O.{self._bucket}.C."
        left = 0
        try:
            store = await self._open()
            if store is None:
                return 0
            subjects = (await js.stream_info(stream, subjects_filter=f"{pieces}*")).state.subjects or {}
            listed = {f"{pieces}{info['nuid']}" for info in await self._listed()}
            for subject in subjects.keys() - listed:
                written = (await js.get_last_msg(stream, subject)).time
                if written is not None and (datetime.now(UTC) - written).total_seconds() >= seconds:
                    await js.purge_stream(stream, subject=subject)
                    left += 1
        except _FAILURES as error:
            raise self._unavailable("swept", error) from error
        return left

    async def delete(self, sequence: int) -> None:
        """Let a snapshot go."""
        try:
            store = await self._open()
            if store is not None:
                await store.delete(f"{sequence:020}")
        except _FAILURES as error:
            raise self._unavailable("deleted", error) from error

    def _unavailable(self, what: str, error: BaseException) -> LogUnavailable:
        return LogUnavailable(f"snapshots of fleet {self._fleet!r} could not be {what}: {error!r}")
