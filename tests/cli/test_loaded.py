"""What a command loads: it answers fast because it loads what it needs and no more.

Time itself is no test: the machine may be busy.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvplane.services.cli import COMMANDS, app
from tests.support.commands import all_there, up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEAVY = {
    "numpy",
    "rich.traceback",
    "duckdb",
    "pyarrow",
    "matplotlib",
    "prometheus_client",
    "cryptography",
    "zmq",
    "prompt_toolkit",
}
ROUTE = ("route", "sim", "--prompt", "Which of these nodes would be mine, I wonder?")


def loaded(*arguments: str) -> set[str]:
    """All modules that a command loads, in a process of its own, to its end."""
    command = [sys.executable, "-X", "importtime", "-m", "kvplane", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def heavy(modules: set[str]) -> set[str]:
    """Those of them that take long. What is HTTP shows itself by its client."""
    return {name for name in modules if name in HEAVY | {"aiohttp.client", "asyncio"}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("up")
    with up(folder, "--simulate", "2", "--http", "off") as (found, _):
        all_there(found, nodes=2)
        yield found


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []], ids=lambda value: " ".join(value) or "nothing")
def test_the_list_of_commands_loads_no_command(arguments: list[str]) -> None:
    modules = loaded(*arguments)
    assert "kvplane.services.cli" in modules
    assert {name for name in modules if name.startswith(("kvplane.services.cli.", "nats"))} == set()
    assert heavy(modules) == set()


@pytest.mark.parametrize(
    "command",
    [["node", "list"], ["node", "cordon", "sim-2"], ROUTE, [*ROUTE, "--record"], ["format", "show"], ["history", "status"],
     ["snapshot", "list"], ["events", "tail", "--no-follow"]],
    ids=" ".join,
)  # fmt: skip
def test_asking_loads_a_client_and_nothing_that_computes(url: str, command: list[str]) -> None:
    modules = loaded(*command, "--server", url)
    assert "nats.aio.client" in modules
    assert heavy(modules) == {"asyncio"}


def test_what_needs_numbers_does_load_them(tmp_path: Path) -> None:
    """Or else the lists above would stay empty whatever is loaded."""
    (tmp_path / "trace").write_text(
        '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2], "session": "a"}\n'
    )
    assert "numpy" in loaded("simulate", str(tmp_path / "trace"), "--policy", "ttft")


def test_the_list_says_of_each_command_what_its_own_help_says_first() -> None:
    for path, summary in COMMANDS.items():
        command = app[path.partition(":")[2]]
        assert " ".join(command.help.split("\n\n")[0].split()) == summary, path
