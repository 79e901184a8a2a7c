"""The report on policies: the same however many processes make it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvplane.services.cli import main
from kvplane.services.protocol.errors import BadRequest, PolicyFailed
from kvplane.services.routing import policies
from kvplane.services.simulation import pages
from kvplane.services.simulation.report import KNEE_SECONDS, Cell, Job, Plan, knee, make, produce

SMALL = Plan(
    traces=("single-turn",), built_in=("ttft", "blocks"), nodes=(4,), loads={"knee": 1.0}, delays=(), knee=2.0, places={},
    situations=(),
)  # fmt: skip


def test_a_report_does_not_depend_on_its_processes() -> None:
    steps: list[int] = []

    def tick() -> None:
        steps.append(1)

    made = [produce(SMALL, processes=processes, progress=tick) for processes in (1, 2)]
    assert len(steps) == 2 * SMALL.steps
    assert made[0] == made[1]
    assert len(made[0].runs) == 4
    for cell, name in made[0].bounds:
        assert 0 < made[0].bounds[cell, name].mean < made[0].runs[cell, name, "ttft"].mean


def test_further_policies_are_judged_beside_the_built_in_ones() -> None:
    own = "ttft:crowd_weight=0,active_seconds=1"
    plan = replace(SMALL, caches={"large": 3_000_000}, policies=(own, "ttft"))
    steps: list[int] = []
    made = produce(plan, processes=1, progress=lambda: steps.append(1))
    assert len(steps) == plan.steps
    assert [policy for _, _, policy in made.runs] == ["ttft", "blocks", own]
    means = {policy: run.mean for (_, _, policy), run in made.runs.items()}
    assert means[own] != means["ttft"]
    text = pages._short(made)
    assert any(line.startswith(f"| {own} |") for line in text)


def test_a_report_with_a_policy_that_is_none_or_never_decides_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="'magic' is not one of"):
        produce(replace(SMALL, policies=("magic",)), processes=1)
    (tmp_path / "own_for_report.py").write_text("def broken(view, request, parameters):\n    raise ZeroDivisionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(policies, "_allowed", set())
    with pytest.raises(
        PolicyFailed, match="policy own_for_report:broken failed in all of its decisions: ZeroDivisionError"
    ):
        make(SMALL, Job(Cell("single-turn", 4, "large"), "own_for_report:broken", 1.0))


def test_a_report_with_a_peer_that_is_not_there_ends_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamo.llm", None)
    steps: list[int] = []
    with pytest.raises(BadRequest, match="needs the peer's package"):
        produce(replace(SMALL, peer=True), processes=1, progress=lambda: steps.append(1))
    assert not steps


def test_the_knee_is_the_edge_of_what_ttft_can_do() -> None:
    cell = Cell("single-turn", 4, "large")
    plan = Plan(traces=("single-turn",))
    speedup = knee(plan, cell)
    assert make(plan, Job(cell, "ttft", speedup)).p99 < KNEE_SECONDS
    assert make(plan, Job(cell, "ttft", speedup * 2 ** (1 / 16))).p99 >= KNEE_SECONDS


def test_the_page_in_the_documentation_is_of_this_form() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    for name in ("round_robin", "least_loaded", "session", "cascade", "threshold", "blocks", "e2", "ttft"):
        assert text.count(f"| knee, {name} |") == 30


def test_a_report_that_can_not_be_written_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--out", "no/such/folder/x.md"], ["--out", "x.md", "--trace", "no-such-trace.jsonl"],
        ["--out", "x.md", "--before", "no-such-page.md"], ["--out", "x.md", "--agents", "no-such-agents.jsonl"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["policy", "report", *arguments])
        assert ended.value.code == 1
        assert capsys.readouterr().err.startswith("kvplane: ")
