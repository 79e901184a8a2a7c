"""Every command that README.md and docs/ print: taken by the command line, and run, in the pages' order, on one fleet.

What can't be run is in `NOT_RUN` with the reason; its options are parsed all the same. `OTHERS` are programs that are not ours.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from msgspec.structs import replace

from kvplane.events.log.connection import connected
from kvplane.services.demo.traffic import Traffic
from kvplane.services.demo.workload import conversations
from kvplane.services.history.client import table
from kvplane.services.protocol.errors import NoAnswer, Refused
from tests.support.commands import run, up
from tests.support.markdown import ROOT
from tests.support.printed import Printed, files, printed, refused
from tests.support.stand_in import Ground

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_RUN = {
    r"(up|router|gateway|coordinator|historian|simnode)\b": "runs until it is stopped; here it would be a second fleet",
    r"attach\b": "needs an engine",
    r"complete\b": "needs an engine",
    r"simulate$": "names the command; it wants a trace",
    r"demo\b": "takes most of a minute; `make demo` is run by itself",
    r"policy report\b": "takes hours",
    r"policy set \S+:": "needs services that were started with --policy-module",
    r"history rebuild\b": "needs a historian that stands still",
    r"--install-completion\b": "writes into the user's shell",
}
"""Commands of kvplane, by a pattern of what follows its name, with the reason."""
OTHERS = {
    "make": "its targets are looked up",
    "uv": "installs", "uvx": "installs", "pip": "installs", "pipx": "installs", "apt-get": "installs",
    "python": "its modules are looked up", ".venv/bin/python": "its modules are looked up",
    "nats": "another project's", "curl": "another project's", "duckdb": "another project's", "git": "another project's",
    "vllm": "an engine", "docker": "needs Docker", "podman": "needs Podman", "podman-compose": "needs Podman",
    "kubectl": "needs Kubernetes", "helm": "needs Kubernetes", "systemctl": "needs systemd", "journalctl": "needs systemd",
    "kill": "the server's signal", "cd": "of the shell", "export": "of the shell", "echo": "of the shell", "cp": "of the shell",
    "for": "of the shell", "until": "of the shell", "done": "of the shell",
}  # fmt: skip
"""Programs on the pages, and why they are not run."""
MODULES_ELSEWHERE = {"sglang"}
CODES = {r"copies 3": 1}
"""Commands that are refused on this fleet, which has one server."""
ADDED = {r"events tail\b": ("--no-follow",), r"simulate\b": ("--limit", "200")}
"""Options that bring a command to its end, or there sooner."""
RUN = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
ONLY_READ = [
    ROOT / "compose" / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]
"""Their commands need three servers, or are about the repository."""
SECONDS = 60


def all_of(pages: list[Path]) -> list[Printed]:
    return [command for page in pages if page.exists() for command in printed(page, OTHERS)]


def reason(command: Printed) -> str:
    """Why a command is not run, or nothing."""
    if command.words[0] != "kvplane":
        return OTHERS[command.words[0]]
    if command.form or not parses(command.words):
        return "shows a form"
    arguments = " ".join(command.words[1:])
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, arguments)), "")


def parses(words: tuple[str, ...]) -> bool:
    return refused(words, inline=False) == ""


NOWHERE = Ground(Path(), "1", 1, 1, 2, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC))


def faults(command: Printed) -> str:
    """What is wrong with a command as it is printed, or nothing."""
    program, *words = command.words
    if program == "make":
        targets = [word for word in words if "=" not in word]
        done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stderr.strip() if done.returncode else ""
    if program.endswith("python") and words[0] == "-m":
        known = words[1].partition(".")[0] in MODULES_ELSEWHERE or importlib.util.find_spec(words[1])
        return "" if known else f"there is no module {words[1]}"
    if program != "kvplane":
        return "" if program in OTHERS else f"{program} is neither kvplane nor one of OTHERS"
    try:
        fitted = NOWHERE.fit(command.words)
    except KeyError as error:
        return f"nothing stands for the placeholder {error}; add it to Ground.values"
    return refused(fitted, inline=command.inline)


def test_commands_are_taken_as_they_are_printed() -> None:
    found = [(f"{each.page}: {each.text}", faults(each)) for each in all_of(RUN + ONLY_READ)]
    assert [(text, fault) for text, fault in found if fault] == []
    assert len(found) > 60


MISSPELT = (
    "kvplane explain            # its request is missing",
    "KVPLANE_FLEET=a kvplane node lst",
    "kvplane route sim \n  --promt 'of two\nlines'",
    "hlem install",
    "kvplane explain $(kvplane sql --cvs 'SELECT 1' | tail)",
    "kvplane node list | kvplane nonsense && true",
    ".venv/bin/python -m kvplane.nothing",
)


def test_what_is_misspelt_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "\n".join(MISSPELT).replace("sim \n", "sim \\\n")
    page.write_text(
        "`kvplane up --simulate 4` and `kvplane explain` are right, as is `kvplane auth add ROLE [NAME]`; `make chaos`, too.\n"
        "`kvplane up --simulat 4` `kvplane snapshot tak` `kvplane explain --squence 3` `make tset` `kvplane sql WORD`\n\n"
        f"```\n{block}\n```\n```\nkvplane (this is a drawing) ---> node\n```\n```sql\nkvplane nonsense\n```\n"
    )
    assert [each.text for each in all_of([page]) if faults(each)] == [
        "kvplane up --simulat 4", "kvplane snapshot tak", "kvplane explain --squence 3", "make tset", "kvplane sql WORD",
        *MISSPELT, "kvplane (this is a drawing) ---> node",
    ]  # fmt: skip


async def _serve(url: str, folder: Path) -> Ground:
    """Conversations on the fleet, until the history holds them."""
    async with connected([url], "printed") as client:
        traffic = Traffic(client, "default", "sim")
        work = conversations(sessions=8, turns=3)
        await traffic.run(work, concurrency=8, progress=lambda: None)
        answer, _ = await traffic.send(work[-1])
        # Completed and stored: then all of its past can be asked for.
        span = f"""
            SELECT d.sequence AS decided, d.time AS began, c.time AS ended, (SELECT min(sequence) FROM decisions) AS first,
              c.sequence AS last
            FROM decisions d JOIN completions c USING (request) WHERE request = '{answer.request}'
        """
        with anyio.fail_after(SECONDS):
            while True:
                with suppress(NoAnswer, Refused):
                    if rows := (await table(client, "default", span)).to_pylist():
                        break
                await anyio.sleep(0.1)
    [row] = rows
    return Ground(folder, answer.request, **row)


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[tuple[str, Ground]]:
    """`kvplane up --simulate 4` with some traffic behind it, and room for folders to work in."""
    with up(tmp_path / "data", "--simulate", "4", "--http", "off") as (url, _):
        yield url, anyio.run(_serve, url, tmp_path)


def _done(url: str, ground: Ground, command: Printed) -> str:
    """Run a command where the fleet is; what was wrong, or nothing."""
    words = ground.fit(command.words)
    ground.prepare(words)
    arguments = " ".join(words[1:])
    added = [option for pattern, options in ADDED.items() if re.match(pattern, arguments) for option in options]
    expected = next((code for pattern, code in CODES.items() if re.match(pattern, arguments)), 0)
    done = run(*words[1:], *added, folder=str(ground.folder), KVPLANE_SERVER=url)
    bad = done.returncode != expected or "Traceback" in done.stderr
    return (
        f"exit code {done.returncode}: {arguments} {' '.join(added)}\n{done.stdout[-600:]}{done.stderr[-600:]}"
        if bad
        else ""
    )


def test_commands_run_on_a_fleet(ground: tuple[str, Ground]) -> None:
    url, here = ground
    seen: set[tuple[str, ...]] = set()
    wrong = {}
    for command in all_of(RUN):
        if command.words in seen or reason(command):
            continue
        seen.add(command.words)
        # A page is read by itself: it finds no files of another one.
        own = replace(here, folder=here.folder / command.page.replace("/", "-"))
        if not own.folder.exists():
            own.folder.mkdir()
            for name, text in files(ROOT / command.page).items():
                (own.folder / name).write_text(text)
        if fault := _done(url, own, command):
            wrong[f"{command.page}: {command.text}"] = fault
    assert wrong == {}, "\n\n".join(f"{text}\n{fault}" for text, fault in wrong.items())
    assert len(seen) > 15
    # One that parses and fails is found.
    assert "exit code 1" in _done(url, here, Printed("", "", ("kvplane", "node", "cordon", "nobody"), inline=False))
