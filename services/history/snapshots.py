"""Snapshots of the fold as files of the history, so that a past moment is never far from one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from kvplane.projections.errors import BadSnapshot
from kvplane.projections.snapshot import dump, load

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.projections.fleet import FleetState

MOST = 64
"""Snapshots that are kept. Beyond it every second one of the older half goes, so that old moments are further from one."""

_log = structlog.get_logger("kvplane.history")


class Snapshots:
    """A folder of snapshots, each named after its sequence."""

    def __init__(self, folder: Path, fleet: str) -> None:
        self.folder = folder
        self._fleet = fleet
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("*.unfinished"):
            unfinished.unlink()

    def save(self, state: FleetState) -> Path:
        """Write a snapshot, whole or not at all."""
        path = self.folder / f"{state.sequence:020}.snapshot"
        unfinished = path.with_suffix(".unfinished")
        try:
            with unfinished.open("wb") as file:
                file.write(dump(state))
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._thin()
        return path

    def _thin(self) -> None:
        paths = sorted(self.folder.glob("*.snapshot"))
        if len(paths) > MOST:
            for path in paths[1 : len(paths) // 2 : 2]:
                path.unlink()

    def upto(self, sequence: int) -> list[Path]:
        """Snapshots at or before a sequence, the nearest first."""
        return [path for path in sorted(self.folder.glob("*.snapshot"), reverse=True) if int(path.stem) <= sequence]


def nearest(paths: list[Path], fleet: str) -> FleetState | None:
    """The state of the first snapshot that can be used; what can't is passed over with a warning."""
    for path in paths:
        try:
            return load(fleet, path.read_bytes())
        except (BadSnapshot, OSError) as error:
            _log.warning("snapshot_passed_over", snapshot=path.name, error=str(error))
    return None
