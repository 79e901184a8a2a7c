"""The history is for its owner alone, whatever the process is told to let others do."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from kvplane.projections.history.store import Store
from kvplane.services.process.owner import LOCK, Owner, this_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _lets_others_read() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "history.duckdb", folder / "archive")
    }


def test_a_new_history_and_one_of_an_older_kvplane(tmp_path: Path) -> None:
    folder = tmp_path / "history"
    wanted = {"history": 0o700, "history.duckdb": 0o600, "archive": 0o700}
    Store(folder, "default").close()
    assert modes(folder) == wanted
    for name, mode in (("", 0o755), ("archive", 0o755), ("history.duckdb", 0o644)):
        (folder / name).chmod(mode)
    Store(folder, "default").close()
    assert modes(folder) == wanted


def test_a_folder_that_is_owned(tmp_path: Path) -> None:
    made, older, strange = tmp_path / "made", tmp_path / "older", tmp_path / "strange"
    for folder in (older, strange):
        folder.mkdir(mode=0o755)
    (older / LOCK).touch()
    for folder in (made, older, strange):
        owner = Owner(folder, this_process("test", "nats://x"), "{url}")
        owner.take()
        owner.forget()
        os.close(owner.descriptor)
    # A folder that somebody made for other things stays as open as he wants it.
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made, older, strange)] == [0o700, 0o700, 0o755]
