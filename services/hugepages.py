"""Huge pages for this process's memory, so that a fork copies few page tables: a fork of gigabytes takes milliseconds.

Linux only, 6.1 or newer and with transparent huge pages not switched off; elsewhere nothing happens, and forks take longer.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
LEAST_BYTES = 16 << 20
"""Smaller regions are left as they are."""


def collapse() -> int:
    """Move large regions of memory into huge pages, and have the kernel keep them so; the bytes that could be moved.

    Takes a second a gigabyte, for which threads that need memory wait: for the time before a service answers. What is written
    while a forked copy lives leaves its huge page; the kernel moves it back in its own time.
    """
    if not sys.platform.startswith("linux"):
        return 0
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
