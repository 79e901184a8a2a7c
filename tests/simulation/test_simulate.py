"""`kvplane simulate` and `kvplane workload`: figures that repeat, pictures, and a sentence for whatever is wrong."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from kvplane.services.cli import main
from kvplane.services.routing import policies

if TYPE_CHECKING:
    from collections.abc import Callable

LINE = '{"timestamp": %d, "input_length": 1100, "output_length": 5, "hash_ids": [%d, %d, 99]}\n'
SMALL = ["single-turn", "--limit", "40", "--nodes", "3"]
POLICY_MODULE = """
def idle(view, request, parameters):
    return view.active * parameters.get("weight", 1.0)


def broken(view, request, parameters):
    raise ZeroDivisionError


def flaky(view, request, parameters):
    if request.tokens % 2:
        raise ValueError("odd")
    return view.active


def suicidal(view, request, parameters):
    import os
    os._exit(9)


number = 3
"""


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """All that was said, without line breaks."""
        return " ".join((self.out + self.err).split())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Done]:
    """The command in this process, in a folder with a trace and a module of policies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(policies, "_allowed", set())
    monkeypatch.delitem(sys.modules, "mine_for_test", raising=False)
    (tmp_path / "mine_for_test.py").write_text(POLICY_MODULE)
    (tmp_path / "trace.jsonl").write_text("".join(LINE % (at * 50, 1000 + at // 4, at) for at in range(40)))

    def command(*arguments: str, name: str = "simulate") -> Done:
        code = 0
        try:
            main([name, *arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        output = capsys.readouterr()
        return Done(code, output.out, output.err)

    return command


def figures(run: Callable[..., Done], *arguments: str) -> Any:
    done = run("--json", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_table_has_a_row_for_each_policy(run: Callable[..., Done]) -> None:
    done = run("trace.jsonl", "--policy", "blocks", "round_robin", "--nodes", "3")
    assert done.code == 0
    assert "40 requests, 1,100 tokens each, in 2 s; ideal hit rate 34.9%" in done.words
    assert "3 nodes" in done.words
    rows = [line.replace("│", " ").split() for line in done.out.splitlines()]
    named = [row for row in rows if row and row[0] in {"blocks", "round_robin"}]
    assert [(row[0], len(row), row[-1]) for row in named] == [("blocks", 9, "0"), ("round_robin", 9, "0")]
    assert "failed" not in done.words


def test_figures_are_the_same_again_and_with_any_number_of_processes(run: Callable[..., Done]) -> None:
    arguments = [*SMALL, "--policy", "ttft", "blocks:overlap_weight=2", "--fail", "node-2@0.5", "--join", "late@0.7"]
    first, second = (run(*arguments, "--json", "--processes", count).out for count in ("1", "2"))
    assert first == second
    found = json.loads(first)
    assert (found["trace"], found["requests"]) == ("single-turn", 40)
    assert found["settings"]["nodes"] == 3
    assert [change["node"] for change in found["settings"]["changes"]] == ["node-2", "late"]
    assert [row["policy"] for row in found["policies"]] == ["ttft", "blocks:overlap_weight=2"]
    for row in found["policies"]:
        assert row["requests"] + row["rejected"] == 40
        assert row["retried"] > 0
        assert 0 < row["p50"] <= row["p90"] <= row["p99"]
        assert 0 <= row["hit_rate"] <= found["ideal_hit_rate"] < 1


def test_options_reach_the_simulated_fleet(run: Callable[..., Done]) -> None:
    options = [
        "--capacity",
        "500",
        "--speedup",
        "2",
        "--seed",
        "7",
        "--delay",
        "0.1",
        "--routers",
        "2",
        "--max-active",
        "9",
    ]
    found = figures(run, *SMALL, "--rate", "20", "--policy", "ttft", *options)["settings"]
    expected = {
        "capacity": 500,
        "speedup": 2,
        "seed": 7,
        "delay": 0.1,
        "routers": 2,
        "most_active": 9,
        "block_size": 64,
    }
    assert {name: found[name] for name in expected} == expected


def test_times_of_the_day_are_times_from_the_first_request(run: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(LINE % (1_700_000_000_000, 1, 2) + LINE % (1_700_000_002_000, 1, 2))
    done = run("trace.jsonl", "--policy", "ttft", "--fail", "node-1@1", "--nodes", "1", "--join", "node-2@1")
    assert done.code == 0
    assert "2 requests, 1,100 tokens each, in 2 s" in done.words


def test_requests_that_no_node_can_hold_are_counted(run: Callable[..., Done]) -> None:
    (line,) = figures(
        run, "trace.jsonl", "--policy", "blocks", "--max-active", "1", "--nodes", "1", "--speedup", "1000"
    )["policies"]
    assert line["rejected"] > 0
    assert line["requests"] + line["rejected"] == 40


def test_another_seed_has_other_figures(run: Callable[..., Done]) -> None:
    rows = [figures(run, *SMALL, "--policy", "ttft", "--seed", seed)["policies"] for seed in ("1", "2")]
    assert rows[0] != rows[1]


@pytest.mark.parametrize("name", ["picture.png", "a $x^{2_ [b] name.svg"])
def test_a_picture_is_written(run: Callable[..., Done], tmp_path: Path, name: str) -> None:
    trace = f"{name}.jsonl"
    (tmp_path / trace).write_text((tmp_path / "trace.jsonl").read_text())
    done = run(trace, "--policy", "ttft", "round_robin", "--plot", name)
    assert done.code == 0, done.err
    written = (tmp_path / name).read_bytes()
    assert written.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert len(written) > 10_000


@pytest.mark.parametrize("name", ["no/where.png", "a.docx"])
def test_a_picture_that_can_not_be_written_is_one_sentence_and_figures_are_told(
    run: Callable[..., Done], name: str
) -> None:
    done = run("trace.jsonl", "--policy", "ttft", "--json", "--plot", name)
    assert (done.code, done.err.count("kvplane: "), "Traceback" in done.err) == (1, 1, False)
    assert "the picture can't be written" in done.err
    assert json.loads(done.out)["requests"] == 40


def test_a_policy_of_ones_own_is_taken_from_the_folder(run: Callable[..., Done]) -> None:
    found = figures(run, *SMALL, "--policy", "mine_for_test:idle", "mine_for_test:idle:weight=-1", "least_loaded")
    own, reverse, known = found["policies"]
    assert own.pop("policy") == "mine_for_test:idle"
    assert reverse.pop("policy") == "mine_for_test:idle:weight=-1"
    known.pop("policy")
    assert own == known
    assert reverse["mean"] > known["mean"]


ALWAYS = (
    "policy mine_for_test:broken failed in all of its 40 decisions, so there are no figures of it: ZeroDivisionError"
)


def test_a_policy_that_always_fails_has_no_figures_and_the_others_have(run: Callable[..., Done]) -> None:
    done = run(*SMALL, "--policy", "mine_for_test:broken", "least_loaded", "--plot", "picture.svg")
    assert (done.code, done.err.count("kvplane: "), "Traceback" in done.err) == (1, 1, False)
    assert ALWAYS in done.err
    assert [line.split()[0] for line in done.out.splitlines() if line.split()[-1:] == ["0"]] == ["least_loaded"]
    assert "broken" not in done.out
    picture = Path("picture.svg").read_text()
    assert "least_loaded" in picture
    assert "broken" not in picture
    done = run(*SMALL, "--policy", "mine_for_test:broken", "least_loaded", "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert [row["policy"] for row in found["policies"]] == ["least_loaded"]
    (failed,) = found["failed"]
    assert (failed["policy"], failed["decisions"]) == ("mine_for_test:broken", 40)
    assert failed["failure"].startswith("ZeroDivisionError")


def test_when_all_policies_always_fail_there_is_no_table_and_no_picture(run: Callable[..., Done]) -> None:
    done = run(*SMALL, "--policy", "mine_for_test:broken", "mine_for_test:broken:a=1", "--plot", "picture.svg")
    assert (done.code, done.err.count("kvplane: "), "Traceback" in done.err) == (1, 1, False)
    assert ALWAYS in done.err
    assert "mine_for_test:broken:a=1 failed in all of its 40 decisions" in done.err
    assert "policy" not in done.out
    assert not Path("picture.svg").exists()


def test_a_policy_that_fails_now_and_then_is_marked_with_how_often(run: Callable[..., Done]) -> None:
    arguments = [*SMALL, "--policy", "mine_for_test:flaky", "least_loaded"]
    done = run(*arguments)
    assert done.code == 0
    named = [line.split()[0] for line in done.out.splitlines() if line.split()[-1:] == ["0"]]
    assert named == ["mine_for_test:flaky*", "least_loaded"]
    own, known = figures(run, *arguments)["policies"]
    assert own["decisions"] == known["decisions"] == 40
    assert 0 < own["policy_failures"] < 40
    assert known["policy_failures"] == 0
    assert (
        f"* mine_for_test:flaky failed in {own['policy_failures']} of its 40 decisions, and the least loaded node was "
        "taken: ValueError: odd"
    ) in done.words


def test_a_policy_that_ends_its_process_is_one_sentence(run: Callable[..., Done]) -> None:
    done = run(*SMALL, "--policy", "mine_for_test:suicidal")
    assert (done.code, done.err.count("kvplane: "), "Traceback" in done.err) == (1, 1, False)
    assert "a process died before its run was done" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "ttft", "blocks", "trace.jsonl"],
        ["--policy", "ttft", "blocks", "trace.jsonl", "--nodes", "8"],
        ["--nodes", "8", "--policy", "ttft", "blocks", "--", "trace.jsonl"],
        ["--policy", "ttft", "--policy", "blocks", "trace.jsonl"],
        ["--policy", "ttft", "blocks", "--fail", "node-9@1", "trace.jsonl", "--join", "node-9@0.5"],
        ["--policy", "ttft", "blocks", "--fail", "node-9@1", "--join", "node-9@0.5", "trace.jsonl"],
    ],
    ids=" ".join,
)
def test_the_trace_may_stand_behind_what_takes_several_values(run: Callable[..., Done], arguments: list[str]) -> None:
    found = figures(run, *arguments)
    assert (found["trace"], found["requests"]) == ("trace.jsonl", 40)
    assert [row["policy"] for row in found["policies"]] == ["ttft", "blocks"]
    assert len(found["settings"]["changes"]) == (2 if "--fail" in arguments else 0)


def test_a_generated_workload_and_a_trace_with_a_colon_may_stand_there_too(run: Callable[..., Done]) -> None:
    assert figures(run, "--limit", "9", "--policy", "ttft", "agent")["trace"] == "agent"
    Path("a:trace").write_text(Path("trace.jsonl").read_text())
    assert figures(run, "--policy", "mine_for_test:idle", "a:trace")["trace"] == "a:trace"


def test_a_trace_may_be_compressed(run: Callable[..., Done]) -> None:
    Path("small.jsonl.gz").write_bytes(gzip.compress(Path("trace.jsonl").read_bytes()))
    plain, small = (figures(run, name, "--policy", "ttft") for name in ("trace.jsonl", "small.jsonl.gz"))
    assert (plain.pop("trace"), small.pop("trace")) == ("trace.jsonl", "small.jsonl.gz")
    assert plain == small


def test_hardware_by_name_and_by_four_numbers_reaches_the_simulated_fleet(run: Callable[..., Done]) -> None:
    arguments = [*SMALL, "--policy", "ttft"]
    plain = figures(run, *arguments)
    named = figures(run, *arguments, "--hardware", "llama-3.1-8b@h100")
    # What the GPU has room for, in blocks of 64 tokens.
    assert (plain["settings"]["capacity"], named["settings"]["capacity"]) == (3_000_000 // 64, 935_363 // 64)
    assert named["policies"][0]["mean"] < plain["policies"][0]["mean"] / 2
    four = "prefill=2000,decode=20,batch=8,batch_decode=100,cache=64000"
    slow = figures(run, *arguments, "--hardware", four)
    assert slow["settings"]["capacity"] == 1000
    assert slow["policies"][0]["mean"] > 2 * plain["policies"][0]["mean"]
    assert figures(run, *arguments, "--hardware", four, "--capacity", "77")["settings"]["capacity"] == 77
    assert "3 nodes (Llama 3.1 8B FP8, H100 SXM 80 GB), 14,615 blocks of 64 tokens each" in (
        run(*arguments, "--hardware", "llama-3.1-8b@h100").words
    )


BAD = [
    (["nowhere.jsonl"], "the trace can't be read"),
    (["nowhere.jsonl"], "without a trace, simulate one of multi-turn, shared-prefix, tools, single-turn, agent"),
    (["x" * 5000], "the trace can't be read"),
    (["."], ". holds no sessions: files that end in .json"),
    (["no/such/trace"], "the trace can't be read"),
    ([], "name a trace (a file), or one of multi-turn, shared-prefix, tools, single-turn, agent"),
    (["--policy", "ttft", "blocks"], "name a trace (a file), or one of"),
    (["--policy", "ttft", "blcks"], "'blcks' is neither a policy (round_robin, "),
    (["--policy", "ttft", "typo.jsonl"], "the trace can't be read: [Errno 2] No such file or directory: 'typo.jsonl'"),
    (["agent", "--policy"], "--policy has no value; name at least one policy, or leave it out"),
    (["--policy", "trace.jsonl"], "--policy has no value but the trace 'trace.jsonl'"),
    (["--fail", "node-1"], "--fail is 'node-1'; write a node and seconds, as in node-3@60"),
    (["cut.jsonl.gz"], "cut.jsonl.gz is compressed with gzip and damaged"),
    (["empty.jsonl"], "empty.jsonl holds no requests"),
    (["garbage.jsonl"], "garbage.jsonl, line 2: "),
    (["agent", "--hardware", "h200"], "--hardware 'h200' is not one of llama-3.1-8b@h100, "),
    (["agent", "--hardware", "prefill=1"], "lacks decode, batch, batch_decode; name a model and GPU, or measure"),
    (["trace.jsonl", "--rate", "5"], "--rate is for generated workloads"),
    (["trace.jsonl", "--block-size", "0"], "--block-size is 0; it must be from 1 to 65536"),
    (["trace.jsonl", "--block-size", "65537"], "--block-size is 65537"),
    (["tools", "--block-size", "512"], "a generated workload tools has blocks of 64 tokens"),
    (["agent", "--rate", "0"], "--rate is 0"),
    (["agent", "--rate", "nan"], "--rate is nan"),
    (["agent", "--rate", "1e-300"], "--rate is 1e-300"),
    (["agent", "--limit", "0"], "--limit is 0"),
    (["agent", "--nodes", "0"], "--nodes is 0; it must be from 1 to 10000"),
    (["agent", "--nodes", "1000000000"], "--nodes is 1e+09"),
    (["agent", "--routers", "0"], "--routers is 0"),
    (["agent", "--capacity", "0"], "--capacity is 0"),
    (["agent", "--capacity", "9" * 30], "--capacity is 1e+30"),
    (["agent", "--max-active", "-1"], "--max-active is -1"),
    (["agent", "--speedup", "0"], "--speedup is 0"),
    (["agent", "--speedup", "inf"], "--speedup is inf"),
    (["agent", "--delay", "-1"], "--delay is -1"),
    (["agent", "--delay", "nan"], "--delay is nan"),
    (["agent", "--processes", "-1"], "--processes is -1"),
    (["agent", "--processes", "0"], "--processes is 0"),
    (["late.jsonl"], "the last request is sent after 1e+12 s; the limit is 4e+09, see --speedup"),
    (
        ["agent", "--fail", "node-9@5"],
        "--fail names 'node-9', which is not there at 5 s; the nodes are node-1 to node-8",
    ),
    (["agent", "--fail", "new@5", "--join", "new@6"], "--fail names 'new', which is not there at 5 s"),
    (["agent", "--fail", "node-1@5", "node-1@6"], "--fail names 'node-1', which is not there at 6 s"),
    (["agent", "--fail", "node-1"], "--fail is 'node-1'; write a node and seconds, as in node-3@60"),
    (["agent", "--fail", "node-1@soon"], "--fail is 'node-1@soon'"),
    (["agent", "--fail", "node-1@-1"], "--fail is 'node-1@-1'"),
    (["agent", "--fail", "node-1@nan"], "--fail is 'node-1@nan'"),
    (["agent", "--join", "node-9@inf"], "--join is 'node-9@inf'"),
    (["agent", "--join", "@5"], "--join is '@5'"),
    (["agent", "--join", "node-1@5"], "--join names 'node-1', which is there at 5 s already"),
    (["agent", "--join", "a\nb@5"], "holds a character that can't be printed"),
    (["agent", "--join", "a" * 129 + "@5"], "a node's name has 129 characters"),
    (["agent", "--policy", "magic"], "policy 'magic' is not one of round_robin"),
    (["agent", "--policy", ""], "policy '' is not one of"),
    (["agent", "--policy", "ttft:speed=1"], "policy ttft has no parameter 'speed'; it has uncached_weight"),
    (["agent", "--policy", "round_robin:x=1"], "policy round_robin has no parameter 'x'; it has hold, hold_seconds"),
    (["agent", "--policy", "ttft:slow_share=2"], "slow_share is 2; it must be from 0 to 1"),
    (["agent", "--policy", "ttft:slow_share=nan"], "'slow_share=nan' in 'ttft:slow_share=nan' is no parameter"),
    (["agent", "--policy", "ttft:load_seconds=inf"], "is no parameter; write name=number"),
    (["agent", "--policy", "ttft:slow_share=1,x"], "'x' in 'ttft:slow_share=1,x' is no parameter; write name=number"),
    (["agent", "--policy", "no_such_module_here:score"], "can't be imported: No module named 'no_such_module_here'"),
    (["agent", "--policy", "mine_for_test:absent"], "can't be imported"),
    (["agent", "--policy", "mine_for_test:number"], "policy 'mine_for_test:number' is not a function"),
    (["trace.jsonl", "--policy", "ttft", "--capacity", "1"], "with ttft, none of 40 requests could be served"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_what_is_wrong_is_said_in_a_sentence(
    run: Callable[..., Done], tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "garbage.jsonl").write_text(LINE % (0, 1, 2) + '{"timestamp": -1}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((LINE % (0, 1, 2)).encode())[:40])
    (tmp_path / "late.jsonl").write_text(LINE % (0, 1, 2) + LINE % (10**15, 1, 2))
    if arguments[:1] == ["agent"] and "--limit" not in arguments:
        arguments = [*arguments, "--limit", "9"]
    done = run(*arguments)
    assert (done.code, done.out) == (1, "")
    assert says in done.words
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 1 + " ".join(arguments).count("\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["batch"], "'batch' is no kind of workload; there are multi-turn"),
        (["agent", "--requests", "0"], "--requests is 0"),
        (["agent", "--rate", "-1"], "--rate is -1"),
        (["agent", "--out", "no/where.jsonl"], "no/where.jsonl can't be written: No such file"),
        (["tools", "--like", "x"], "--like is for agent, not for tools"),
        (["tools", "--sessions", "3"], "--sessions is for agent, not for tools"),
        (["agent", "--sessions", "3", "--requests", "4"], "choose one of --sessions and --requests"),
        (["agent", "--sessions", "0"], "--sessions is 0"),
        (["agent", "--like", "nowhere.jsonl"], "--like: there is no file nowhere.jsonl"),
        (["agent", "--like", "trace.jsonl"], "trace.jsonl: the trace has 0 sessions with delays"),
        (["agent", "--against", "trace.jsonl"], "--against is beside --like"),
    ],
)
def test_a_workload_that_can_not_be_made_is_one_sentence(
    run: Callable[..., Done], arguments: list[str], says: str
) -> None:
    done = run(*arguments, name="workload")
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert says in done.err
