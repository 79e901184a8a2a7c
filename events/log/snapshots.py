"""Snapshots on the server: an object each, in a bucket beside the log, named after their sequence.

What is in them is the projections' business (`projections.snapshot`); here they are bytes. An object is there whole or not at
all, and the server keeps a checksum of it.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from io import BytesIO
from typing import TYPE_CHECKING

import anyio
from nats.errors import Error as NatsError
from nats.js.api import ObjectMeta, ObjectMetaOptions, ObjectStoreConfig, StorageType
from nats.js.errors import APIError, BucketNotFoundError, NotFoundError
from nats.js.errors import Error as JetStreamError

from kvplane.events.errors import LogUnavailable
from kvplane.events.log.stream import stream_info
from kvplane.events.subjects import check_fleet

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.object_store import ObjectStore

CHUNK_BYTES = 1 << 20
"""Largest piece in which an object travels: for so long as one is hashed and sent the event loop stands still."""
IDLE_SECONDS = 10.0
"""When no piece of an object comes for so long it is given up: it may have been deleted meanwhile."""
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
            store = await self._open()
            if store is None:
                return []
            with suppress(NotFoundError):
                found = [info.name for info in await store.list() if not info.deleted]
                return sorted((int(name) for name in found if name.isdigit()), reverse=True)
        except _FAILURES as error:
            raise self._unavailable("listed", error) from error
        return []

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
        done = anyio.Event()
        failures: list[BaseException] = []

        async def read(store: ObjectStore) -> None:
            try:
                await store.get(f"{sequence:020}", writeinto=data)
            except _FAILURES as error:
                failures.append(error)
            done.set()

        try:
            store = await self._open()
            if store is None:
                raise NotFoundError
        except _FAILURES as error:
            raise self._unavailable("read", error) from error
        async with anyio.create_task_group() as group:
            group.start_soon(read, store)
            while not done.is_set() and not failures:
                before = data.tell()
                with anyio.move_on_after(self._idle_seconds):
                    await done.wait()
                if not done.is_set() and data.tell() == before:
                    # The client would wait for ever for pieces that are not there any more.
                    failures.append(TimeoutError(f"nothing came for {self._idle_seconds:g} s after {before} bytes"))
            group.cancel_scope.cancel()
        for failure in failures:
            raise self._unavailable("read", failure) from failure
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
            listed: set[str] = set()
            with suppress(NotFoundError):
                listed = {f"{pieces}{info.nuid}" for info in await store.list()}
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
