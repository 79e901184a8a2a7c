"""Huge pages for this process's memory. An index of millions is found faster in them, and a fork copies few page tables.

Linux only, with transparent huge pages not switched off; elsewhere nothing happens, and starts and forks take longer.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
LEAST_BYTES = 16 << 20
"""Smaller regions are left as they are."""

TUNABLE = "glibc.malloc.hugetlb"
"""Setting of glibc, read from `GLIBC_TUNABLES` as a process starts; 1 asks the kernel for huge pages."""
TUNABLE_SINCE = (2, 35)
"""Version of glibc that brought it."""
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def from_the_start() -> None:
    """Have all memory of this process in huge pages, for which it begins again when it has begun without.

    To be called before there is anything to lose. Whoever sets `TUNABLE` decides for himself.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not _on_request():
        return
    environment = {**os.environ, "GLIBC_TUNABLES": f"{tunables}:{TUNABLE}=1".removeprefix(":")}
    # Ctrl-C waits until the interpreter is up again: `kvplane.__main__` lets it through.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - this program
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_request() -> bool:
    """Whether the kernel gives huge pages to those who ask, and glibc can."""
    try:
        version = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
        known = tuple(map(int, version.split(".")[:2])) >= TUNABLE_SINCE
        return known and "[madvise]" in _ENABLED.read_text(encoding="ascii")
    except (OSError, ValueError):
        return False


def collapse() -> int:
    """Move large regions of memory into huge pages, and have the kernel keep them so; the bytes that could be moved.

    Needs Linux 6.1, and takes up to a second a gigabyte, for which threads that need memory wait: for the time before a service
    answers. What is written while a forked copy lives leaves its huge page; the kernel moves it back in its own time.
    """
    if not sys.platform.startswith("linux"):
        return 0
    import ctypes  # noqa: PLC0415 - every command loads this module

    moved = 0
    with suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
            where, permissions, _, _, inode, *name = line.split(maxsplit=5)
            begin, end = (int(bound, 16) for bound in where.split("-"))
            private = permissions == "rw-p" and inode == "0" and (not name or name[0] == "[heap]")
            if private and end - begin >= LEAST_BYTES and madvise(begin, end - begin, _MADV_HUGEPAGE) == 0:
                moved += end - begin if madvise(begin, end - begin, _MADV_COLLAPSE) == 0 else 0
    return moved
