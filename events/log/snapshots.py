"""Snapshots on the server: an object each, in a bucket beside the log, named after their sequence.

What is in them is the projections' business (`projections.snapshot`); here they are bytes. An object is there whole or not at
all, and the server keeps a checksum of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from nats.errors import Error as NatsError
from nats.js.api import ObjectMeta, ObjectMetaOptions, ObjectStoreConfig, StorageType
from nats.js.errors import APIError, BucketNotFoundError, NotFoundError
from nats.js.errors import Error as JetStreamError

from events.errors import LogUnavailable
from events.log.stream import stream_info
from events.subjects import check_fleet

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.object_store import ObjectStore

CHUNK_BYTES = 4 << 20
"""Largest piece in which an object travels; the client joins them by copying, so they must not be many."""

_FAILURES = (NatsError, JetStreamError, APIError, OSError, TimeoutError, ValueError, TypeError, KeyError)


class SnapshotStore:
    """The snapshots of one fleet. Every method raises `LogUnavailable` when the server does not answer as it must."""

    def __init__(self, client: Client, fleet: str) -> None:
        self._client = client
        self._fleet = fleet
        self._bucket = f"KV_{check_fleet(fleet)}_snapshots"
        self._store: ObjectStore | None = None

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
            store = await self._open()
            if store is None:
                return []
            with suppress(NotFoundError):
                found = [info.name for info in await store.list() if not info.deleted]
                return sorted((int(name) for name in found if name.isdigit()), reverse=True)
        except _FAILURES as error:
            raise self._unavailable("listed", error) from error
        return []

    async def put(self, sequence: int, data: bytes) -> None:
        """Keep a snapshot."""
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
        try:
            store = await self._open()
            if store is None:
                raise NotFoundError
            data = (await store.get(f"{sequence:020}")).data
        except _FAILURES as error:
            raise self._unavailable("read", error) from error
        return bytes(data or b"")

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
