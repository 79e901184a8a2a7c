"""Keeping a server of our own running: it is started again when it died, and when a disk that was full has room again.

A server that could not write acknowledges nothing more, with room or without, until it is restarted (nats-server 2.15).
"""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import structlog

from kvplane.services.protocol.errors import ServerFailed
from kvplane.services.protocol.status import ServerStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from kvplane.services.embedded.server import Server

LOOK_SECONDS = 1.0
AGAIN_SECONDS = 1.0
"""Pause before a server that died is started again; doubled up to half a minute while it dies at once."""
LONGEST_SECONDS = 30.0
ROOM_BYTES = 64 << 20
"""So much room, or a twentieth of the disk, a full disk must have again."""

_NO_ROOM = (b"no space left on device", b"critical write error")

_log = structlog.get_logger("kvplane.server")


class Keeper:
    """One server and whoever replaces it. `restarts` counts them, `full` says whether its disk had no room."""

    def __init__(
        self, start: Callable[[], Awaitable[Server]], server: Server, *, look_seconds: float = LOOK_SECONDS
    ) -> None:  # fmt: skip
        self._start = start
        self._look_seconds = look_seconds
        self.server = server
        self.restarts = 0
        self.full = False
        self._read = self._end_of_log()

    async def run(self) -> None:
        """Watch until cancelled."""
        pause = AGAIN_SECONDS
        while True:
            ended: int | None = None
            with anyio.move_on_after(self._look_seconds):
                ended = await self.server.process.wait()
            if ended is not None:
                _log.error("server_ended", code=ended, log=str(self.server.log), again_in=pause)
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_SECONDS)
                await self._again()
                continue
            pause = AGAIN_SECONDS
            if not self.full and self._could_not_write():
                self.full = True
                _log.error("disk_full", data=str(self.server.log.parent), free=self._free(), acknowledges="nothing")
            if self.full and self._has_room():
                _log.warning("disk_has_room", free=self._free(), then="the server is restarted")
                await self.server.stop()
                await self._again()

    async def _again(self) -> None:
        try:
            # Its log may have no room for what the old one says last.
            self.server = await self._start()
        except ServerFailed as error:
            _log.error("server_not_started", error=str(error))
            return
        self.restarts += 1
        self.full = False
        self._read = self._end_of_log()

    def about(self) -> ServerStatus:
        """What only the one who runs the server can see of it."""
        return ServerStatus(
            name=self.server.name, url=self.server.url, sync_always=True, max_storage=self.server.max_storage,
            disk_free=self._free(), full=self.full, restarts=self.restarts,
        )  # fmt: skip

    def _end_of_log(self) -> int:
        return self.server.log.stat().st_size

    def _could_not_write(self) -> bool:
        """Whether the server's output since the last look says so, or the disk is too full for any output."""
        with self.server.log.open("rb") as log:
            log.seek(self._read)
            output = log.read()
        self._read += len(output)
        return any(words in output for words in _NO_ROOM) or self._free() == 0

    def _free(self) -> int:
        return shutil.disk_usage(self.server.log.parent).free

    def _has_room(self) -> bool:
        disk = shutil.disk_usage(self.server.log.parent)
        return disk.free >= min(ROOM_BYTES, disk.total // 20)


@asynccontextmanager
async def kept(
    start: Callable[[], Awaitable[Server]], *, look_seconds: float = LOOK_SECONDS
) -> AsyncIterator[Keeper]:  # fmt: skip
    """A server for the length of a block, and another one whenever it is needed. Raises what the first start raises."""
    keeper = Keeper(start, await start(), look_seconds=look_seconds)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(keeper.run)
            yield keeper
            group.cancel_scope.cancel()
    finally:
        await keeper.server.stop()
        _log.info("server_stopped", url=keeper.server.url)
