"""The power fails: what was acknowledged is on the disk, of one server and of three that lose it at the same moment.

The log lies on a file system in an image file. What the server wrote and did not sync is in the memory of that file
system, not in the image; so the image, read as it is at any moment, is the disk as a power cut leaves it. (Writes that
reached the disk's own cache are in it as well; that a disk keeps what it was told to flush is taken for granted.) The copy
is mounted, which replays the journal as after a crash, and servers are started on it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events import codec, types
from kvplane.events.errors import LogError
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.events.log.stream import open_stream
from tests.chaos.network import Plain
from tests.chaos.world import Servers
from tests.support.three_servers import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvplane.events.codec import Message

pytestmark = pytest.mark.anyio

NAME = "power"
IMAGE_BYTES = 64 << 20
WRITERS = 4
SYNCED = "  sync_interval: always\n"


def _can_mount() -> str:
    """Why no image can be mounted here; nothing when one can."""
    if os.geteuid() != 0:
        return "only root can mount an image"
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount", "losetup") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if subprocess.run(["losetup", "--find"], capture_output=True, check=False).returncode:
        return "there is no loop device"
    return ""


@pytest.fixture(autouse=True)
def _root() -> None:
    why = _can_mount()
    if why:
        pytest.skip(why)


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    """A file system in an image for the length of a block."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def new_image(image: Path) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    # Nothing is left to be written later, beside what the server writes.
    late = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", late, str(image)], check=True)


def copy_of_a_moment(images: Sequence[Path], folder: Path) -> list[Path]:
    """Copies of images, as they were at one moment: nothing was written to any of them while they were copied."""
    copies = [folder / f"cut-{image.name}" for image in images]
    for _ in range(50):
        contents = [image.read_bytes() for image in images]
        if all(image.read_bytes() == content for image, content in zip(images, contents, strict=True)):
            for copy, content in zip(copies, contents, strict=True):
                copy.write_bytes(content)
            return copies
    raise AssertionError("the images never stood still")


class Cut:
    """Servers on images, writers, and what was acknowledged to them until the power failed."""

    def __init__(self, folder: Path, names: tuple[str, ...], seed: int, *, synced: bool = True) -> None:
        self.folder = folder
        self.names = names
        self.acknowledged: dict[int, str] = {}
        self._rng = random.Random(seed)
        self._synced = synced

    def servers(self, where: str) -> Servers:
        def settings(text: str) -> str:
            assert SYNCED in text
            return text if self._synced else text.replace(SYNCED, "")

        return Servers(self.folder / where, Plain(), self.names, settings)

    async def _write(self, urls: list[str], number: int) -> None:
        rng = random.Random(self._rng.random())
        async with connected(urls, "writer") as client:
            appender = Appender(client, NAME, new_writer("power"))
            batch = 0
            while True:
                batch += 1
                blocks = pack_hashes(rng.sample(range(1 << 20), rng.randrange(1, 60)))
                body = codec.encode([types.BlocksStored(f"n{number}", 1, batch, blocks)])
                with suppress(LogError):
                    sequence = await appender.append_encoded(f"kv.{NAME}.cache.n{number}", body)
                    self.acknowledged[sequence] = codec.checksum(body)

    async def lost(self) -> list[int]:
        """Run until the power fails, start again from what is on the disks; acknowledged sequences that are not there."""
        images = [self.folder / f"{name}.img" for name in self.names]
        before, after = self.servers("before"), self.servers("after")
        with ExitStack() as stack:
            for name, image in zip(self.names, images, strict=True):
                new_image(image)
                stack.enter_context(mounted(image, before.members[name].folder / "data"))
            try:
                copies = await self._until_cut(before, images)
            finally:
                await before.stop()
        with ExitStack() as stack:
            for name, image in zip(self.names, copies, strict=True):
                stack.enter_context(mounted(image, after.members[name].folder / "data"))
            try:
                await after.start(*self.names)
                return await self._missing(after.urls)
            finally:
                await after.stop()

    async def _until_cut(self, servers: Servers, images: list[Path]) -> list[Path]:
        await servers.start(*self.names)
        async with connected(servers.urls, "first") as client:
            await open_stream(client.jetstream(), NAME, replicas=len(self.names), create=True)
        # The stream itself is older than what is at stake.
        os.sync()
        async with anyio.create_task_group() as group:
            for number in range(WRITERS):
                group.start_soon(self._write, servers.urls, number)
            await anyio.sleep(self._rng.uniform(0.8, 2.5))
            for member in servers.members.values():
                member.send(signal.SIGSTOP)
            copies = copy_of_a_moment(images, self.folder)
            # Acknowledgements that had left before count, too.
            await anyio.sleep(0.2)
            group.cancel_scope.cancel()
        return copies

    async def _missing(self, urls: list[str]) -> list[int]:
        found: dict[int, str] = {}

        def handle(message: Message) -> None:
            found[message.sequence] = codec.checksum(message.body)

        async with connected(urls, "reader") as client:
            # Without a sync even the stream may be gone, or begin anywhere.
            with nullcontext() if self._synced else suppress(LogError):
                await replay(client, NAME, handle)
        return sorted(sequence for sequence, crc in self.acknowledged.items() if found.get(sequence) != crc)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_one_server_keeps_what_it_acknowledged(tmp_path: Path, seed: int) -> None:
    cut = Cut(tmp_path, NAMES[:1], seed)
    assert await cut.lost() == []
    assert len(cut.acknowledged) > 20


async def test_three_servers_keep_what_they_acknowledged(tmp_path: Path) -> None:
    cut = Cut(tmp_path, NAMES, 4)
    assert await cut.lost() == []
    assert len(cut.acknowledged) > 20


async def test_a_server_that_syncs_now_and_then_does_not(tmp_path: Path) -> None:
    # Not of kvplane, but of this attack: it must be able to find a loss.
    cut = Cut(tmp_path, NAMES[:1], 5, synced=False)
    assert len(await cut.lost()) > len(cut.acknowledged) // 2 > 50
