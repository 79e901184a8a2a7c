"""A historian under `up` that can't work says one sentence, answers with it, and begins when the reason is gone."""

from __future__ import annotations

import json
import shutil
import socket
import time
from typing import TYPE_CHECKING, Any

import anyio
import duckdb
import pytest

from kvplane.projections.history.store import FILE
from kvplane.services.cli.common import Common
from kvplane.services.cli.historian import kept
from kvplane.services.protocol import messages
from tests.support.commands import asked, run, up
from tests.support.historians import commanded, historian
from tests.support.waiting import until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.fleet import Fleet

PAUSE_SECONDS = 0.3
"""Between two commands that ask for the same: each costs as much processor time."""
OPTIONS = ("--simulate", "1", "--http", "off")


def newer(folder: Path) -> None:
    connection = duckdb.connect(str(folder / FILE))
    connection.execute("UPDATE checkpoint SET version = 99")
    connection.close()


def garbage(folder: Path) -> None:
    (folder / FILE).write_bytes(b"garbage " * 9000)


def replaced(folder: Path) -> None:
    shutil.rmtree(folder.parent / "jetstream")


def answered(url: str, words: str) -> str:
    """Ask until the answer has these words; all of it."""
    deadline = time.monotonic() + 60
    while words not in (done := run("sql", "SELECT 1 AS one", KVPLANE_SERVER=url)).stdout + done.stderr:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(PAUSE_SECONDS)
    return done.stdout + done.stderr


def logged(process: subprocess.Popen[str]) -> list[dict[str, str]]:
    """What it logged about a history that can't be kept, once it has ended; no traceback and nothing else."""
    process.terminate()
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    assert not [line for line in lines if "Traceback" in line or "ExceptionGroup" in line]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert not [entry for entry in found if entry["event"] in {"historian_ended", "historian_failed"}]
    return [entry for entry in found if entry["event"] == "historian_cannot_work"]


def not_found_out(url: str, reason: str) -> bool:
    """Whether the doctor does not say, as its one problem with the history, why."""
    findings: list[dict[str, Any]] = json.loads(run("doctor", "--json", KVPLANE_SERVER=url).stdout)
    found = [(each["level"], reason in each["said"]) for each in findings if each["what"] == "history"]
    return found != [("problem", True)]


@pytest.mark.parametrize(
    ("damage", "code", "reason"),
    [
        (garbage, "bad_history", "history.duckdb can't be opened"),
        (newer, "bad_history", "is of version 99"),
        (replaced, "log_corrupt", "the log was replaced"),
    ],
    ids=["garbage", "newer", "replaced"],
)
def test_it_says_why_until_the_history_is_mended(
    tmp_path: Path, damage: Callable[[Path], None], code: str, reason: str
) -> None:
    folder = tmp_path / "history"
    with up(tmp_path, *OPTIONS) as (url, _):
        answered(url, "one")
        deadline = time.monotonic() + 30
        # So that a log that begins anew is shorter.
        for _ in range(3):
            run("node", "cordon", "sim-1", KVPLANE_SERVER=url)
            run("node", "uncordon", "sim-1", KVPLANE_SERVER=url)
        while asked(url, "history", "status")["stored"] < 6:
            assert time.monotonic() < deadline
            time.sleep(PAUSE_SECONDS)
    damage(folder)
    with up(tmp_path, *OPTIONS) as (url, process):
        output = answered(url, "is there, but can't work")
        assert reason in output
        assert str(folder) in output
        assert f"[{code}]" in output
        assert f"[{code}]" in run("explain", "x", KVPLANE_SERVER=url).stderr
        deadline = time.monotonic() + 30
        # On a busy machine the doctor may not wait long enough for its answer.
        while not_found_out(url, reason):
            assert time.monotonic() < deadline
            time.sleep(PAUSE_SECONDS)
        if damage is replaced:
            shutil.rmtree(folder)
        else:
            done = run("history", "rebuild", "--history", str(folder), KVPLANE_SERVER=url)
            assert done.returncode == 0, done.stderr
        answered(url, "one")
        entries = [entry for entry in logged(process) if entry["code"] != "folder_taken"]
        assert [(entry["code"], reason in entry["error"]) for entry in entries] == [(code, True)]


def test_a_folder_that_another_historian_has(tmp_path: Path) -> None:
    folder = tmp_path / "own" / "history"
    with (
        up(tmp_path / "other", *OPTIONS, "--no-history") as (other, _),
        commanded("historian", "--history", str(folder), "--server", other) as owner,
    ):
        answered(other, "one")
        who = f"process {owner.pid} on host {socket.gethostname()} (kvplane historian, {other})"
        done = run("historian", "--history", str(folder), "--server", other)
        assert (done.returncode, who in done.stderr, "Traceback" in done.stderr) == (1, True, False)
        assert "[folder_taken]" in done.stderr
        done = run("history", "rebuild", "--history", str(folder), "--server", other)
        assert (done.returncode, who in done.stderr) == (1, True)
        with up(tmp_path / "own", *OPTIONS) as (url, process):
            assert who in answered(url, "is there, but can't work")
            owner.kill()
            owner.wait()
            # What it has kept is of its own log.
            answered(url, "the log was replaced")
            assert [entry["code"] for entry in logged(process)] == ["folder_taken", "log_corrupt"]


@pytest.mark.anyio
async def test_questions_are_left_to_a_historian_that_works(fleet: Fleet, tmp_path: Path) -> None:
    """Both have the subjects of the fleet; half of the answers would be the reason."""
    await fleet.coordinator()
    (tmp_path / "bad").mkdir()
    garbage(tmp_path / "bad")
    service = kept(await fleet.connect("bad"), tmp_path / "bad", (), Common(server=(fleet.url,)))
    async with anyio.create_task_group() as group:
        async with historian(fleet.url, tmp_path / "good"):
            group.start_soon(service.run)
            await until(lambda: service.answers)
            assert service.answers == "for itself"
            assert (await fleet.ask(f"history.{service.id}.status", messages.StatusRequest()))["failure"]
            for _ in range(20):
                assert (await fleet.ask("history.status", messages.StatusRequest()))["healthy"]
        await until(lambda: service.answers == "for the fleet", seconds=20)
        assert await fleet.refused("history.status", messages.StatusRequest()) == "bad_history"
        group.cancel_scope.cancel()
