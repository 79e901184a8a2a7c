"""The commands of the history as a person meets them, on a fleet that `kvplane up` runs and that has served requests."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import anyio
import pyarrow as pa
import pyarrow.parquet
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.cli.history import aside
from kvplane.services.demo.traffic import Traffic
from kvplane.services.demo.workload import conversations
from kvplane.services.protocol import messages
from tests.support.commands import all_there, asked, run, up
from tests.support.historians import question
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUESTS = 120
OWN = """
def broken(view, request, parameters):
    raise ZeroDivisionError


def flaky(view, request, parameters):
    if request.tokens % 2:
        raise ValueError("odd")
    return view.active
"""


async def _serve(url: str) -> None:
    async with connected([url], "test") as client:
        traffic = Traffic(client, "default", "sim")
        await traffic.run(conversations()[:REQUESTS], concurrency=8, progress=lambda: None)

        async def stored() -> bool:
            answer = await question(client, "sql", messages.SqlRequest(sql="SELECT count(*) FROM completions"))
            return bool(answer["rows"] == [[REQUESTS]])

        await until(stored, 30, every=0.1)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with up(tmp_path_factory.mktemp("up"), "--simulate", "3") as (found, _):
        all_there(found, nodes=3)
        anyio.run(_serve, found)
        yield found


def rows(url: str, query: str) -> list[dict[str, Any]]:
    done = run("sql", query, "--json", KVPLANE_SERVER=url)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_same_result_in_every_form(url: str, tmp_path: Path) -> None:
    query = "SELECT request, node, match, hashes, time FROM decisions ORDER BY sequence, event"
    plain = rows(url, query)
    assert len(plain) == REQUESTS
    done = run("sql", query, "--csv", KVPLANE_SERVER=url)
    lines = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [line["request"] for line in lines] == [row["request"] for row in plain]
    assert [json.loads(line["hashes"]) for line in lines] == [row["hashes"] for row in plain]
    # More than a number in most readers of JSON holds.
    numbers = [[int(value) for value in row["hashes"]] for row in plain]
    assert all(isinstance(value, str) == (int(value) > 1 << 53) for row in plain for value in row["hashes"])
    for option, name in (("--parquet", "out.parquet"), ("--arrow", "out.arrow")):
        done = run("sql", query, option, str(tmp_path / name), KVPLANE_SERVER=url)
        assert done.returncode == 0, done.stderr
    for table in (
        pa.parquet.read_table(tmp_path / "out.parquet"),
        pa.ipc.open_file(tmp_path / "out.arrow").read_all(),
    ):
        assert table["hashes"].to_pylist() == numbers
        assert [moment.isoformat() for moment in table["time"].to_pylist()] == [row["time"] for row in plain]
    done = run("sql", "SELECT count(*) AS n FROM completions", KVPLANE_SERVER=url)
    assert str(REQUESTS) in done.stdout


def test_an_interval_is_text_where_the_form_has_none(url: str, tmp_path: Path) -> None:
    query = "SELECT INTERVAL '2 days 1.5 s' AS it UNION ALL SELECT NULL"
    assert rows(url, query) == [{"it": "2 days 00:00:01.5"}, {"it": None}]
    assert run("sql", query, "--csv", KVPLANE_SERVER=url).stdout == '"it"\n"2 days 00:00:01.5"\n\n'
    out = tmp_path / "out.parquet"
    assert run("sql", query, "--parquet", str(out), KVPLANE_SERVER=url).returncode == 0
    assert pa.parquet.read_table(out)["it"].to_pylist() == ["2 days 00:00:01.5", None]


def test_csv_is_safe_to_open(url: str) -> None:
    """What came from outside is no formula and no command; numbers and names are as they are."""
    query = """SELECT '=HYPERLINK("http://x")' AS "@a", 'a' || chr(27) || '[2J' || chr(10) || 'b' AS b, -1 AS c,
        ['=1', chr(8238)] AS d, '=1'::ENUM('=1') AS e, 'node-a' AS f"""
    done = run("sql", query, "--csv", KVPLANE_SERVER=url)
    assert done.returncode == 0, done.stderr
    assert list(csv.reader(io.StringIO(done.stdout))) == [
        ["'@a", "b", "c", "d", "e", "f"],
        ['\'=HYPERLINK("http://x")', r"a\x1b[2J\nb", "-1", r'["=1","\u202e"]', "'=1", "node-a"],
    ]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("DELETE FROM live.decisions", "bad_sql"),
        ("SELECT * FROM read_text('/etc/hostname')", "bad_sql"),
        ("SELEC 1", "bad_sql"),
        ("SELECT * FROM nothing", "bad_sql"),
        ("SELECT 1; SELECT 2", "bad_sql"),
        ("", "bad_request"),
    ],
)
def test_a_query_that_is_refused_is_told_why(url: str, query: str, code: str) -> None:
    done = run("sql", query, "--csv", KVPLANE_SERVER=url)
    assert done.returncode == 1
    assert f"[{code}]" in done.stderr
    assert len(done.stderr.splitlines()) < 8


def test_limits_are_named_and_nothing_half_is_left(url: str, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    done = run("sql", "SELECT * FROM range(100000000)", "--max-rows", "5000", "--parquet", str(out), KVPLANE_SERVER=url)
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "first 5000 rows" in done.stderr
    slow = "SELECT count(*) FROM range(100000000000) a WHERE a.range % 7 = 3"
    done = run("sql", slow, "--timeout", "1", KVPLANE_SERVER=url)
    assert done.returncode == 1
    assert "[time_limit]" in done.stderr
    assert rows(url, "SELECT count(*) AS n FROM decisions") == [{"n": REQUESTS}]


def test_a_file_that_can_not_be_written_is_told(url: str, tmp_path: Path) -> None:
    done = run("sql", "SELECT 1", "--parquet", str(tmp_path / "no" / "out.parquet"), KVPLANE_SERVER=url)
    assert done.returncode == 1
    assert "can't be written" in done.stderr


def test_a_decision_is_explained(url: str) -> None:
    request = rows(url, "SELECT request FROM decisions WHERE match > 0 ORDER BY sequence, event LIMIT 1 OFFSET 40")[0]
    answer = asked(url, "explain", request["request"])
    assert answer["verdict"] == "agrees"
    assert answer["outcome"]["status"] == "ok"
    done = run("explain", request["request"], KVPLANE_SERVER=url)
    assert done.returncode == 0
    assert "agrees" in done.stdout
    for node in ("sim-1", "sim-2", "sim-3"):
        assert node in done.stdout
    done = run("explain", "nobody", KVPLANE_SERVER=url)
    assert done.returncode == 1
    assert "[unknown_request]" in done.stderr


def test_the_past_is_shown_and_compared(url: str) -> None:
    now = asked(url, "state")
    then = asked(url, "state", "--at", str(now["sequence"] // 2))
    assert then["sequence"] == now["sequence"] // 2
    assert 0 < then["memberships"] < now["memberships"]
    assert asked(url, "state", "--at", str(now["sequence"]))["digest"] == now["digest"]
    times = rows(url, "SELECT min(time)::VARCHAR AS first, max(time)::VARCHAR AS last FROM commits")[0]
    assert asked(url, "state", "--at", times["last"].replace(" ", "T"))["digest"] == now["digest"]
    assert asked(url, "state", "--at", times["first"].replace(" ", "T"))["sequence"] == 1
    one = asked(url, "state", "--at", str(now["sequence"]), "--node", "sim-1")
    assert [row["node"] for row in one["rows"]] == ["sim-1"]
    changed = asked(url, "diff", "0", str(now["sequence"]))
    assert {row["what"] for row in changed["nodes"]} == {"joined"}
    assert sum(row["blocks"]["gpu"]["came"] for row in changed["nodes"]) == now["memberships"]
    for moment, code in (("2001-01-01", "before_history"), ("999999", "not_yet"), ("lately", "bad_request")):
        done = run("state", "--at", moment, KVPLANE_SERVER=url)
        assert (done.returncode, f"[{code}]" in done.stderr) == (1, True)


def test_a_moment_is_written_alike_everywhere(url: str) -> None:
    commits = rows(url, "SELECT sequence, time::VARCHAR AS time FROM commits ORDER BY sequence")
    middle = commits[len(commits) // 2]
    since = next(row["sequence"] for row in commits if row["time"] >= middle["time"])
    upto = max(row["sequence"] for row in commits if row["time"] <= middle["time"])
    moment = f"{middle['time']} UTC"
    assert asked(url, "state", "--at", moment)["sequence"] == upto
    assert asked(url, "diff", moment, "now")["numbers"]["sequence"] == [upto, commits[-1]["sequence"]]
    assert asked(url, "report", "--since", moment)["overview"]["first_sequence"] == since
    for text, first in ((moment, since), ("1d", 1)):
        tail = run("events", "tail", "--no-follow", "--json", "--since", text, KVPLANE_SERVER=url)
        assert json.loads(tail.stdout.splitlines()[0])["sequence"] == first
    assert asked(url, "report", "--since", "yesterday")["overview"]["commits"] == len(commits)
    assert asked(url, "report", "--since", "10", "--until", "19")["overview"]["commits"] == 10
    for command in (["report", "--since"], ["state", "--at"], ["diff", "1"], ["whatif", "--policy", "ttft", "--since"],
                    ["events", "tail", "--from"]):  # fmt: skip
        done = run(*command, "lately", KVPLANE_SERVER=url)
        assert (done.returncode, "'lately' is no moment; write a sequence" in done.stderr) == (1, True), command


def test_what_if(url: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    answer = asked(url, "whatif", "--policy", "round_robin", "ttft:session_seconds=1", "--plot", str(plot))
    by_policy = {row["policy"]: row for row in answer["policies"]}
    assert list(by_policy) == ["really", "as recorded", "round_robin", "ttft:session_seconds=1"]
    assert {row["requests"] for row in by_policy.values()} == {REQUESTS}
    # Whoever spreads conversations over nodes computes their beginnings again.
    assert by_policy["round_robin"]["hit_rate"] < by_policy["as recorded"]["hit_rate"] - 0.05
    assert abs(by_policy["really"]["hit_rate"] - by_policy["as recorded"]["hit_rate"]) < 0.1
    assert plot.stat().st_size > 10_000
    kept = rows(url, f"SELECT policy, requests, hit_rate FROM whatif_runs WHERE run = '{answer['run']}'")
    assert {row["policy"]: row["hit_rate"] for row in kept} == {
        name: row["hit_rate"] for name, row in by_policy.items()
    }
    per_request = rows(
        url,
        "SELECT policy, count(*) AS n, sum(cached_tokens) / sum(tokens) AS hit_rate FROM whatif_requests "
        f"WHERE run = '{answer['run']}' GROUP BY policy",
    )
    for row in per_request:
        assert row["n"] == REQUESTS
        assert row["hit_rate"] == pytest.approx(by_policy[row["policy"]]["hit_rate"], abs=1e-5)
    # The beginning of the first day lies before the history's.
    day = rows(url, "SELECT min(time)::DATE::VARCHAR AS day FROM commits")[0]["day"]
    for since in (day, "7d"):
        again = asked(url, "whatif", "--policy", "round_robin", "--since", since, "--no-keep")
        assert (again["since"], again["policies"][0]) == (answer["since"], answer["policies"][0])
    done = run("whatif", "--policy", "round_robin", "--until", "2001-01-01", KVPLANE_SERVER=url)
    assert (done.returncode, "[before_history]" in done.stderr) == (1, True)
    done = run("whatif", "--policy", "magic", KVPLANE_SERVER=url)
    assert done.returncode == 1
    assert "is not one of" in done.stderr
    done = run("whatif", "--policy", "cascade", "--since", "999999", KVPLANE_SERVER=url)
    assert (done.returncode, "[not_yet]" in done.stderr) == (1, True)


def test_what_if_shows_no_figures_of_a_policy_that_always_failed(url: str, tmp_path: Path) -> None:
    (tmp_path / "own_for_whatif.py").write_text(OWN)
    options = {"KVPLANE_SERVER": url, "PYTHONPATH": str(tmp_path), "COLUMNS": "160"}
    arguments = ["whatif", "--policy", "own_for_whatif:broken", "own_for_whatif:flaky", "cascade"]
    done = run(*arguments, "--json", **options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "policy own_for_whatif:broken failed in all of its" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    answer = json.loads(done.stdout)
    assert [row["policy"] for row in answer["policies"]] == ["really", "as recorded", "own_for_whatif:flaky", "cascade"]
    flaky = answer["policies"][2]
    assert 0 < flaky["policy_failures"] < flaky["decisions"]
    kept = rows(url, f"SELECT DISTINCT policy FROM whatif_requests WHERE run = '{answer['run']}'")
    assert {row["policy"] for row in kept} == {"really", "as recorded", "own_for_whatif:flaky", "cascade"}
    done = run(*arguments, "--no-keep", **options)
    assert done.returncode == 1
    assert f"own_for_whatif:flaky failed in {flaky['policy_failures']} of its" in " ".join(done.stderr.split())
    assert "broken" not in done.stdout


def test_what_was_there_is_kept_beside_what_is_made_again(tmp_path: Path) -> None:
    for number in range(3):
        file = tmp_path / "history.duckdb"
        file.write_text(str(number))
        file.with_name("history.duckdb.wal").write_text(f"log {number}")
        kept = aside(file)
        assert (kept.read_text(), kept.with_name(f"{kept.name}.wal").read_text()) == (str(number), f"log {number}")
    assert len(list(tmp_path.iterdir())) == 6


def test_without_a_historian_the_commands_say_what_to_start(url: str) -> None:
    for command in (["sql", "SELECT 1"], ["explain", "r"], ["state", "--at", "1"], ["history", "status"]):
        done = run(*command, "--fleet", "elsewhere", KVPLANE_SERVER=url)
        assert done.returncode == 1
        assert "kvplane historian" in done.stderr
