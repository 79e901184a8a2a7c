"""Turns of tests that run in several workers: some need the machine for themselves."""

from __future__ import annotations

from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """A test's turn among those of all workers, which have a folder in common: together with others, or alone."""
    with (folder / "gate.lock").open("w") as gate, (folder / "tests.lock").open("w") as tests:
        # Who waits to be alone keeps the gate: nobody comes in before it.
        flock(gate, LOCK_EX)
        flock(tests, LOCK_EX if alone else LOCK_SH)
        flock(gate, LOCK_UN)
        try:
            yield
        finally:
            # A process that was forked in between has the file as well: closing it would not be enough.
            flock(tests, LOCK_UN)
