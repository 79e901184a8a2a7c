"""Files that only their owner may read, written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kvplane.events.errors import BadCredentials

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_SECONDS = 20.0
"""How long one command waits until another has made its changes."""
_AGAIN_SECONDS = 0.01
_LOCK = ".lock"


@contextmanager
def locked(folder: Path, name: str = _LOCK) -> Iterator[None]:
    """Nobody else who locks the same file of the folder changes it meanwhile.

    Raises `BadCredentials` when another does so for long.
    """
    try:
        make_folder(folder)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise BadCredentials(f"{folder} can't be written ({error.strerror}); choose another folder") from None
    try:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise BadCredentials(
                        f"another command of kvplane has been changing {folder} for {LOCK_SECONDS:g} s; wait until it has ended"
                    ) from None
                time.sleep(_AGAIN_SECONDS)
        yield
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder that only its owner may look into, unless it is there."""
    if not path.exists():
        make_folder(path.parent) if not path.parent.exists() else None
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all. Raises `BadCredentials`."""
    try:
        make_folder(path.parent)
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise BadCredentials(f"{path} can't be written ({error.strerror}); choose another folder") from None
