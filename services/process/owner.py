"""One owner for each folder: two processes that write to one folder lose what either of them acknowledged.

The owner holds a lock (flock), which the kernel frees when it dies in whatever way, and keeps a record of who it is beside it.
Where a folder is on a file system of the network, hosts may not see each other's locks: there the record counts as well, which
the owner renews every few seconds.

    <folder>/owner.lock     locked for as long as the owner lives
    <folder>/owner.json     the owner's record; its time of modification says when it was renewed last
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec
import structlog

from kvplane.services.protocol.errors import FolderTaken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kvplane.events.errors import KvplaneError

PRIVATE = 0o700
"""What is in such a folder is for its owner alone: prompts' hashes, requests, addresses."""
LOCK = "owner.lock"
RECORD = "owner.json"

RENEW_SECONDS = 3.0
FRESH_SECONDS = 15.0
"""A record that another host renewed within this time is of an owner that lives."""
ENDING_SECONDS = 10.0
"""So long what a killed owner left behind may take to let the folder go."""
DYING_SECONDS = 1.0
"""So long an owner that was just killed may seem to live."""
SETTLE_SECONDS = 1.0
"""After this time two hosts that took a folder at the same moment see whose record is there."""
POLL_SECONDS = 0.02

_LOCAL = frozenset(
    (
        "apfs",
        "bcachefs",
        "btrfs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "hfs",
        "jfs",
        "overlay",
        "ramfs",
        "tmpfs",
        "xfs",
        "zfs",
    )
)
"""File systems that one kernel has for itself, so that its locks are enough."""
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL))

_log = structlog.get_logger("kvplane.owner")


class Record(msgspec.Struct, frozen=True):
    """Who owns a folder. `machine` is one boot of one machine, `pids` the space that `pid` is of, `born` when it began."""

    host: str
    pid: int
    what: str
    """Its command, such as `kvplane up`."""
    url: str
    """Where it can be reached, or the server that it works with."""
    machine: str
    pids: str
    born: int


def this_process(what: str, url: str) -> Record:
    """The record of this process."""
    return Record(socket.gethostname(), os.getpid(), what, url, machine(), _pids(), _born(os.getpid()))


def machine() -> str:
    """This boot of this machine: containers on one kernel have it in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _pids() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _born(pid: int) -> int:
    """When a process began, in ticks since boot; 0 where that can't be known, and -1 when it has ended and is not buried."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return -1 if stat[0] in {"Z", "X"} else int(stat[19])
    except (OSError, ValueError, IndexError):
        return 0


def file_system(folder: Path) -> str:
    """Kind of the file system of a folder, such as `ext4` or `nfs4`; empty where that can't be known."""
    folder = folder.resolve()
    found = [("", "")]
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            place, kind = line.split()[4], line.partition(" - ")[2].split()[0]
            if folder.is_relative_to(place.encode().decode("unicode_escape")):
                found.append((place, kind))
    # Of two at one place the later one lies over the other.
    return max(reversed(found), key=lambda mount: len(mount[0]))[1]


def lock(path: Path) -> tuple[int, bool]:
    """Lock a file: its descriptor, and whether locks work there. Raises `BlockingIOError` when another has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return descriptor, False
        os.close(descriptor)
        raise
    return descriptor, True


class Owner:
    """The hold that this process has on a folder, until `release` or its end.

    `instead` is what the one who is refused may do; `{url}` in it is where the owner can be reached.
    """

    def __init__(self, folder: Path, record: Record, instead: str) -> None:
        self.folder = folder
        self.record = record
        self.instead = instead
        self.descriptor = -1
        self.locks = True
        """Whether a lock is enough: false where other hosts may not see it, or there are none."""

    def take(self) -> None:
        """Become the owner. Raises `FolderTaken` when another one is, and `OSError` when the folder can't be written."""
        if (self.folder / LOCK).exists():
            # An older kvplane let everybody read.
            with suppress(PermissionError):
                self.folder.chmod(PRIVATE)
        self.folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        begin = time.monotonic()
        while True:
            try:
                self._take()
            except FolderTaken:
                holder = self.read()
                ending = holder is None or self._mine(holder) or _gone(holder)
                if time.monotonic() - begin > (ENDING_SECONDS if ending else DYING_SECONDS):
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return

    def _take(self) -> None:
        kind = file_system(self.folder)
        try:
            self.descriptor, work = lock(self.folder / LOCK)
        except BlockingIOError:
            raise self._taken(self.read()) from None
        self.locks = work and kind in _LOCAL
        try:
            self._check_record()
            self._write()
            if not self.locks:
                _log.warning(
                    "folder_may_be_shared", folder=str(self.folder), file_system=kind or "unknown",
                    locks="not seen by other hosts" if work else "none",
                    instead="the record in the folder keeps others away; a disk of this machine is safer",
                )  # fmt: skip
                time.sleep(SETTLE_SECONDS)
                self.check()
        except BaseException:
            self.hand_over()
            raise

    def _check_record(self) -> None:
        holder = self.read()
        if holder is None or self._mine(holder):
            return
        here = holder.machine == self.record.machine
        if here and holder.pids == self.record.pids:
            # It has no lock, or not the one that is there now.
            if not _gone(holder):
                raise self._taken(holder)
        elif not self.locks:
            age = self._age()
            if age < FRESH_SECONDS:
                left = FRESH_SECONDS - age
                reason = f"it renewed its record {max(0.0, age):.0f} s ago; if it is gone, try again in {left:.0f} s"
                raise self._taken(holder, reason)

    def _age(self) -> float:
        """Seconds since the record was renewed. Both times are of the file system's clock; hosts may have others."""
        os.utime(self.descriptor)
        try:
            # Opened, so that a file system of the network asks its server.
            with (self.folder / RECORD).open("rb") as record:
                return (os.fstat(self.descriptor).st_mtime_ns - os.fstat(record.fileno()).st_mtime_ns) / 1e9
        except FileNotFoundError:
            return FRESH_SECONDS

    def _mine(self, holder: Record) -> bool:
        mine = self.record
        return (holder.machine, holder.pids, holder.pid, holder.born) == (mine.machine, mine.pids, mine.pid, mine.born)

    def _taken(self, holder: Record | None, more: str = "") -> FolderTaken:
        if holder is None:
            return FolderTaken(
                f"another process has {self.folder.absolute()} open (`fuser {self.folder / LOCK}` says which); stop it"
            )
        gone = "" if not _gone(holder) else ", which has ended, but left something that has it open"
        who = f"process {holder.pid} on host {holder.host} ({holder.what}, {holder.url}){gone}"
        return FolderTaken("; ".join(filter(None, (
            f"folder {self.folder.absolute()} is in use by {who}", more, self.instead.format(url=holder.url)
        ))))  # fmt: skip

    def read(self) -> Record | None:
        """The record that is there, if it can be read."""
        try:
            return msgspec.json.decode((self.folder / RECORD).read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None

    def _write(self) -> None:
        path = self.folder / RECORD
        new = path.with_name(f".{RECORD}.{self.record.pid}")
        try:
            new.write_bytes(msgspec.json.encode(self.record))
            new.rename(path)
        except OSError as error:
            # With a full disk the lock still counts.
            with suppress(OSError):
                new.unlink(missing_ok=True)
            if not self.locks:
                raise
            _log.warning("owner_not_recorded", folder=str(self.folder), error=str(error))

    def check(self) -> None:
        """Renew the record. Raises `FolderTaken` when another has taken the folder meanwhile."""
        holder = self.read()
        if holder is None:
            self._write()
        elif holder != self.record:
            raise self._taken(holder, "it took the folder while this process did not renew its record")
        else:
            os.utime(self.folder / RECORD)

    def hand_over(self) -> None:
        """Close the lock here; processes that inherited it still hold it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def forget(self) -> None:
        """Take this process's record away."""
        with suppress(OSError):
            if self.read() == self.record:
                (self.folder / RECORD).unlink()

    def release(self) -> None:
        """Be the owner no more."""
        self.forget()
        self.hand_over()


def _gone(holder: Record) -> bool:
    """Whether a process of this machine has ended; false where that can't be known."""
    if (holder.machine, holder.pids) != (machine(), _pids()):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    # Another process may have its number by now.
    return holder.born != 0 and _born(holder.pid) not in {0, holder.born}


@asynccontextmanager
async def owned(
    folder: Path, what: str, *, url: str, instead: str, failed: Callable[[OSError], KvplaneError]
) -> AsyncIterator[Owner]:  # fmt: skip
    """Be the owner of a folder for the length of a block. Raises `FolderTaken`, also later.

    `failed` makes the error of a folder that can't be written.
    """
    owner = Owner(folder, this_process(what, url), instead)
    try:
        await anyio.to_thread.run_sync(owner.take)
    except OSError as error:
        raise failed(error) from None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_renew_forever, owner)
            yield owner
            group.cancel_scope.cancel()
    finally:
        owner.release()


async def _renew_forever(owner: Owner) -> None:
    while True:
        await anyio.sleep(RENEW_SECONDS)
        try:
            await anyio.to_thread.run_sync(owner.check, abandon_on_cancel=True)
        except OSError as error:
            _log.warning("owner_not_renewed", folder=str(owner.folder), error=str(error))
