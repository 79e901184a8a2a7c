"""The page on policies of one's own: its module and its commands, run as they are printed, and its table of what a view has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvplane.services.routing.view import Request, View
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "policies-of-your-own.md"
TEXT = PAGE.read_text()
PATIENCE = 60.0


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def environment(url: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "160", "KVPLANE_SERVER": url}


@contextmanager
def left_running(command: str, folder: Path, url: str, port: int) -> Iterator[None]:
    """What runs until Ctrl-C; on a port of its own, since another server may have the usual one."""
    process = subprocess.Popen(
        f"exec {command} --port {port} --http off", shell=True, cwd=folder, env=environment(url),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        else:
            pytest.fail("".join(lines))
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


async def done(command: str, folder: Path, url: str, *, shows: str = "") -> str:
    """What a command printed. The fleet may not be ready at once, nor the history: then it is asked again."""
    ended: list[subprocess.CompletedProcess[str]] = []

    def succeeds() -> bool:
        ended.append(
            subprocess.run(
                command, shell=True, cwd=folder, env=environment(url), capture_output=True, text=True, check=False,
                timeout=PATIENCE,
            )
        )  # fmt: skip
        return ended[-1].returncode == 0 and shows in ended[-1].stdout

    try:
        await until(succeeds, PATIENCE, every=0.3)
    except TimeoutError:
        pytest.fail(f"{command}: {ended[-1].stdout}{ended[-1].stderr}")
    return ended[-1].stdout


async def test_the_page_does_what_it_prints(tmp_path: Path) -> None:
    (module,) = blocks("python")
    (tmp_path / module.splitlines()[0].removeprefix("# ")).write_text(module)
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    printed: dict[str, str] = {}
    with ExitStack() as stack:
        for line in "".join(blocks("sh")).splitlines():
            if line.startswith("kvplane up"):
                stack.enter_context(left_running(line, tmp_path, url, port))
            elif line.startswith("kvplane sql"):
                # The history is a moment behind.
                printed[line] = await done(line, tmp_path, url, shows="my_policies")
            else:
                printed[line] = await done(line, tmp_path, url)
        doctor = await done("kvplane doctor --json || true", tmp_path, url)
    simulated = next(text for line, text in printed.items() if line.startswith("kvplane simulate"))
    explained = next(text for line, text in printed.items() if line.startswith("kvplane explain"))
    asked = next(text for line, text in printed.items() if line.startswith("kvplane sql"))
    assert "failed" not in simulated
    assert "my_policies:patient" in asked
    assert "my_policies:patient" in explained
    assert "active_seconds=0.1" in explained
    assert "agrees" in explained
    assert "the policy failed" not in doctor


async def test_the_figures_of_the_page_are_those_that_its_command_shows(tmp_path: Path) -> None:
    (module,) = blocks("python")
    (tmp_path / "my_policies.py").write_text(module)
    for line in blocks("sh")[0].splitlines():
        text = await done(f"{line} --json" if line.startswith("kvplane simulate") else line, tmp_path, "")
    found = json.loads(text)
    rows = [
        f"| {row['policy']} | {row['mean']:.3f} | {row['p99']:.3f} | {row['hit_rate']:.1%} |"
        for row in found["policies"]
    ]
    assert len(rows) == 4
    assert "\n" + "\n".join(rows) + "\n" in TEXT
    assert not any(row["policy_failures"] for row in found["policies"])


def test_the_table_has_all_that_a_view_has_and_nothing_else() -> None:
    named = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    has = [name for name in dir(View) if not name.startswith("_")]
    assert sorted(named) == sorted(has)
    for field in Request._fields:
        assert f"`{field}`" in TEXT
