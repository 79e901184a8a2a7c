"""Every command's tables, of a real fleet, at every width: each value in full, or its column named as left out."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.cli import demo as demo_command
from kvplane.services.cli import main, show
from kvplane.services.cli.sql import command
from kvplane.services.demo.run import Result, StepResult
from kvplane.services.demo.traffic import Traffic
from kvplane.services.demo.workload import conversations
from kvplane.services.process.terminal import printable
from kvplane.services.protocol.messages import RouteAnswer, RouteRequest
from kvplane.services.rpc.client import ask
from tests.support.commands import all_there, asked, run, up
from tests.support.keys import make_key
from tests.support.shown import left_out, on_terminal, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REQUESTS = 60
AGAIN = "a-request-that-was-tried-again"
CLI = Path(__file__).resolve().parents[2] / "services" / "cli"
WIDTHS = (60, 80, 160)
EVIL = "http://engine\x1b[2J:8000"


class Call(NamedTuple):
    """What a command gave to be shown: `what` is table or pairs, `where` the function that did."""

    where: tuple[str, str]
    what: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    command: str

    def again(self) -> None:
        getattr(show, self.what)(*self.arguments, **{**self.options, "error": False})

    @property
    def rows(self) -> list[list[str]]:
        found = self.arguments[1] if self.what == "table" else self.arguments[0]
        return [[printable(cell.text if isinstance(cell, show.Styled) else cell) for cell in row] for row in found]


async def _serve(url: str) -> None:
    async with connected([url], "test") as client:
        await Traffic(client, "default", "sim").run(conversations()[:REQUESTS], concurrency=8, progress=lambda: None)
        for leg, origin in enumerate(("", AGAIN)):
            await ask(
                client, "kv.default.route",
                RouteRequest(model="sim", tokens=[1] * 40, request=f"{AGAIN}.{leg}" if leg else AGAIN, origin=origin, leg=leg),
                RouteAnswer,
            )  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with up(tmp_path_factory.mktemp("up"), "--simulate", "3", "--http", "off") as (found, _):
        all_there(found, nodes=3)
        anyio.run(_serve, found)
        yield found


@pytest.fixture(scope="module")
def request_id(url: str) -> str:
    found = run(
        "sql", "SELECT request FROM decisions WHERE match > 0 ORDER BY sequence, event LIMIT 1", KVPLANE_SERVER=url
    )
    return found.stdout.splitlines()[1]


@pytest.fixture(scope="module")
def auth(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("auth") / "kvplane-auth")
    assert run("auth", "init", folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    make_key(
        path, "a-tenant/with-a-long-name-of-its-own", ("sim", "a-model/with-a-long-name"), tokens_per_minute=123456789
    )
    make_key(path, "b", requests_per_minute=60, concurrent=4)
    return str(path)


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("agents") / "agents.jsonl")
    main(["workload", "agent", "--sessions", "5", "--out", path])
    return path


@pytest.fixture(scope="module")
def calls(url: str, request_id: str, auth: str, keys: str, agents: str) -> list[Call]:
    """What every command gives to be shown."""
    found: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        for what in ("table", "pairs"):
            patch.setattr(show, what, _recorder(found, what))
        patch.setenv("KVPLANE_SERVER", url)
        for line in (
            ["node", "register", "far.away", "--address", EVIL, "--model", "a-model/with-a-long-name-of-its-own",
             "--block-size", "16", "--capacity-blocks", "12345678"],
            ["node", "cordon", "far.away", "--reason", EVIL], ["node", "list"], ["policy", "list"],
            ["route", "sim", "--prompt", "Which node is mine?", "--session", "a session"],
            ["state"], ["state", "--at", "now", "--node", "sim-1"], ["diff", "1", "now"], ["explain", request_id],
            ["explain", AGAIN], ["whatif", "--policy", "cascade", "ttft:session_seconds=0.123456"],
            ["simulate", "agent", "--limit", "50", "--nodes", "2", "--processes", "1"],
            ["workload", "agent", "--like", agents, "--out", f"{agents}.like"],
            ["sql", "SELECT * FROM decisions"], ["sql", "SELECT * FROM decisions LIMIT 2"],
            ["sql", "SELECT * FROM node_changes"], ["report"], ["history", "status"], ["snapshot", "take"],
            ["snapshot", "list"], ["compact"], ["format", "show"], ["doctor"], ["auth", "list", "--auth", auth],
            ["key", "list", "--keys", keys],
        ):  # fmt: skip
            began = len(found)
            # Rows of SQL are shown on a terminal only; a pipe gets them as they come.
            on_terminal(80, lambda line=line: _main(line))  # type: ignore[misc]
            assert len(found) > began, line
            found[began:] = [call._replace(command=" ".join(line)) for call in found[began:]]
        command(".tables")
        command(".columns decisions")
        patch.setattr(
            demo_command, "run_async", lambda _: Result(steps=[StepResult("a", held=True, message="b")], held=True)
        )
        _main(["demo"])
    return found


def _main(line: list[str]) -> None:
    try:
        main(line)
    except SystemExit as ended:
        # That there is something to warn of is no failure.
        if ended.code and line != ["doctor"]:
            pytest.fail(f"{line} ended with {ended.code}")


def _recorder(found: list[Call], what: str) -> Callable[..., None]:
    def record(*arguments: Any, **options: Any) -> None:
        frame = sys._getframe(1)
        where = Path(frame.f_code.co_filename).name, frame.f_code.co_name
        found.append(Call(where, what, arguments, options, ""))

    return record


def test_every_place_that_shows_a_table_is_looked_at(calls: list[Call]) -> None:
    places = set()
    for path in sorted(CLI.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                    f"{module}.{what}" for module in ("show", "shown") for what in ("table", "pairs")
                }:
                    places.add((path.name, function.name))
    assert len(places) > 15
    assert places == {call.where for call in calls}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_value_is_whole_or_its_column_is_named(calls: list[Call], width: int) -> None:
    for call in calls:
        text = on_terminal(width, call.again)
        if call.what == "pairs":
            _check_pairs(call, text)
        else:
            _check_table(call, text, width)
        assert "\x1b" not in text


def _check_pairs(call: Call, text: str) -> None:
    shown = " ".join(text.split())
    at = 0
    for name, value in call.rows:
        whole = " ".join(f"{name} {value}".split())
        at = shown.index(whole, at) + len(whole)


def _check_table(call: Call, text: str, width: int) -> None:
    columns, rows = call.arguments[0], call.rows
    gone = left_out(text)
    assert gone <= {column.name for column in columns}
    kept = [place for place, column in enumerate(columns) if column.name not in gone]
    assert kept, call.command
    shown = text.splitlines()
    vertical = not gone and bool(rows) and not any(
        line.split() == " ".join(column.name for column in columns).split() for line in shown
    )  # fmt: skip
    if vertical:
        for row in rows:
            for column, value in zip(columns, row, strict=True):
                cell = " ".join(f"{column.name} {value}".split())
                assert cell in (
                    " ".join(text.split()) if column.prose else "\n".join(" ".join(line.split()) for line in shown)
                )
        return
    assert " ".join(columns[place].name for place in kept).split() in [line.split() for line in shown]
    for row in rows:
        # One line holds them all, in their order; a sentence may go on below.
        values = [r".*" if columns[place].prose else re.escape(row[place]) for place in kept]
        pattern = re.compile(r"\s*" + r"\s+".join(values).replace(r"\s+\s+", r"\s+") + r"\s*")
        assert any(pattern.fullmatch(line + " ") for line in shown), (call.command, row)
        for place in kept:
            if columns[place].prose:
                assert all(word in text.split() for word in row[place].split())
    assert max(map(show.cells, shown)) <= max(width, *(show.cells(value) for row in rows for value in row))


def test_a_pipe_has_a_header_and_every_cell(calls: list[Call]) -> None:
    for call in calls:
        got = [line.split("\t") for line in plain(call.again).splitlines()]
        head = [[column.name for column in call.arguments[0]]] if call.what == "table" else []
        assert got == head + call.rows


def test_numbers_are_what_the_answer_has(url: str, request_id: str, auth: str) -> None:
    """Beside what commands hand over: what a pipe gets is what --json says."""
    nodes = asked(url, "node", "list")["nodes"]
    found = [line.split("\t") for line in run("node", "list", KVPLANE_SERVER=url).stdout.splitlines()]
    assert [row[0] for row in found] == ["node", *(row["node"] for row in nodes)]
    assert [row[-2 if "reason" in found[0] else -1] for row in found[1:]] == [f"{row['sessions']:,}" for row in nodes]
    explained = asked(url, "explain", request_id)
    text = run("explain", request_id, KVPLANE_SERVER=url).stdout
    for candidate in explained["recomputed"]["candidates"]:
        (line,) = [line.split("\t") for line in text.splitlines() if line.startswith(f"{candidate['node']}\t")]
        assert float(line[1]) == pytest.approx(candidate["cost"], rel=1e-3)
        assert str(candidate["match"]) in line
    assert asked(url, "state")["digest"] in run("state", KVPLANE_SERVER=url).stdout
    users = json.loads(run("auth", "list", "--auth", auth, "--json").stdout)["users"]
    listed = run("auth", "list", "--auth", auth).stdout
    assert all(re.search(rf"\t{user['key']}\t", listed) for user in users)


def test_sql_in_a_pipe_has_all_rows_and_values_whole(url: str) -> None:
    query = (
        f"SELECT range AS i, range / 3.0::DOUBLE AS third, '{'x' * 500}' || range AS long, [range, -range] AS list, "
        "18446744073709551615::UBIGINT AS prefix, NULL AS nothing, chr(27) || '[2J' || chr(9) AS evil FROM range(1000)"
    )
    lines = run("sql", query, KVPLANE_SERVER=url).stdout.splitlines()
    assert lines[0].split("\t") == ["i", "third", "long", "list", "prefix", "nothing", "evil"]
    assert len(lines) == 1001
    for number, line in enumerate(lines[1:]):
        i, third, long, items, prefix, nothing, evil = line.split("\t")
        assert (i, float(third), long) == (str(number), number / 3.0, f"{'x' * 500}{number}")
        assert items == f"{number}, {-number}"
        assert (prefix, nothing, evil) == ("f" * 16, "", r"\x1b[2J\t")


def test_hashes_have_one_form(url: str) -> None:
    made = asked(url, "route", "sim", "--prompt", "A prompt that is long enough for several blocks. " * 3, "--record")
    query = f"SELECT hashes, prefix FROM decisions WHERE request = '{made['request']}'"
    deadline = time.monotonic() + 20
    while not (packed := run("sql", query, "--json", KVPLANE_SERVER=url).stdout):
        assert time.monotonic() < deadline
    numbers = json.loads(packed)
    hashes, prefix = run("sql", query, KVPLANE_SERVER=url).stdout.splitlines()[1].split("\t")
    assert hashes.split(", ") == [f"{int(value):016x}" for value in numbers["hashes"]]
    assert prefix == f"{int(numbers['prefix']):016x}"
    tail = run("events", "tail", "--no-follow", "--since", "1m", KVPLANE_SERVER=url).stdout
    assert f"hashes={made['blocks']}:{hashes[:16]}..{hashes[-16:]} " in tail
    assert not re.search(r"[({]'|None|\bTrue\b", tail)


def in_terminal(width: int, *arguments: str, typed: bytes = b"", **environment: str) -> tuple[int, str]:
    """Run a command in a process whose terminal is so wide; its exit code and what it printed."""
    child, terminal = pty.fork()
    if not child:
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.environ.update({"NO_COLOR": "1", "TERM": "xterm", **environment})
        os.execv(sys.executable, [sys.executable, "-m", "kvplane", *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    if typed:
        os.write(terminal, typed)
    output = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", [60, 80])
def test_a_real_terminal_is_as_wide_as_it_is(url: str, request_id: str, width: int) -> None:
    for arguments in (["node", "list", "--model", "sim"], ["explain", request_id], ["sql", "SELECT * FROM decisions"]):
        code, text = in_terminal(width, *arguments, KVPLANE_SERVER=url)
        assert code == 0, text
        assert ("Left out, for want of room" in " ".join(text.split())) == (arguments[0] != "node" or width == 60)
        assert 0.6 * width < max(map(len, text.splitlines())) <= width, text


@pytest.mark.parametrize("word", ["quit", "EXIT;", ".quit", ".exit"])
def test_words_that_leave_the_prompt(url: str, word: str, tmp_path: Path) -> None:
    code, text = in_terminal(80, "sql", typed=f"{word}\n".encode(), KVPLANE_SERVER=url, XDG_STATE_HOME=str(tmp_path))
    assert code == 0, text
    assert "bad_sql" not in text
