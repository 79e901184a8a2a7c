"""Disks that are small, and disks that are full."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def small_disk(folder: Path, *, megabytes: int = 16) -> Iterator[Path]:
    """A file system of a few megabytes, mounted on a new folder; who may not mount skips the test."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def filled(disk: Path, *, free: int = 0) -> Iterator[None]:
    """Take the disk's room away, all but a few bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(b"x" * 65536):
            pass
    if free:
        with ballast.open("rb+") as file:
            file.truncate(ballast.stat().st_size - free)
    yield
    ballast.unlink()
