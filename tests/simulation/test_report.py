"""The report on policies: the same however many processes make it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplane.services.cli import main
from kvplane.services.protocol.errors import BadRequest, PolicyFailed
from kvplane.services.routing import policies
from kvplane.services.simulation import pages, report
from kvplane.services.simulation.report import KNEE_SECONDS, Cell, Job, knee, make, produce, total


def test_a_report_does_not_depend_on_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Workers are started anew and have the real constants, so only what this process decides is made smaller.
    monkeypatch.setattr(report, "NODES", (4,))
    monkeypatch.setattr(report, "LOADS", {"knee": 1.0})
    monkeypatch.setattr(report, "POLICIES", {"ttft": None, "blocks": None})
    monkeypatch.setattr(report, "DELAYS", ())
    monkeypatch.setattr(report, "knee", fixed)
    steps: list[int] = []

    def tick() -> None:
        steps.append(1)

    made = [produce(["single-turn"], processes=processes, peer=False, progress=tick) for processes in (1, 2)]
    assert len(steps) == 2 * total(["single-turn"], peer=False)
    assert made[0] == made[1]
    assert len(made[0].runs) == 4


def test_further_policies_are_judged_beside_the_built_in_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NODES", (4,))
    monkeypatch.setattr(report, "CACHES", {"large": 3_000_000})
    monkeypatch.setattr(report, "LOADS", {"knee": 1.0})
    monkeypatch.setattr(report, "POLICIES", {"ttft": None, "blocks": None})
    monkeypatch.setattr(report, "DELAYS", ())
    monkeypatch.setattr(report, "knee", fixed)
    own = "ttft:crowd_weight=0,active_seconds=1"
    steps: list[int] = []
    made = produce(
        ["single-turn"], processes=1, peer=False, policies=[own, "ttft"], progress=lambda: steps.append(1)
    )  # fmt: skip
    assert len(steps) == total(["single-turn"], peer=False, policies=[own, "ttft"])
    assert [policy for _, _, policy in made.runs] == ["ttft", "blocks", own]
    means = {policy: run.mean for (_, _, policy), run in made.runs.items()}
    assert means[own] != means["ttft"]
    monkeypatch.setattr(pages, "LOADS", {"knee": 1.0})
    text = pages._short(made)
    assert any(line.startswith(f"| {own} |") for line in text)


def test_a_report_with_a_policy_that_is_none_or_never_decides_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="'magic' is not one of"):
        produce(["single-turn"], processes=1, peer=False, policies=["magic"])
    (tmp_path / "own_for_report.py").write_text("def broken(view, request, parameters):\n    raise ZeroDivisionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(policies, "_allowed", set())
    with pytest.raises(
        PolicyFailed, match="policy own_for_report:broken failed in all of its decisions: ZeroDivisionError"
    ):
        make(Job(Cell("single-turn", 4, "large"), "own_for_report:broken", 1.0))


def fixed(_: Cell) -> float:
    return 2.0


def test_the_knee_is_the_edge_of_what_ttft_can_do() -> None:
    cell = Cell("single-turn", 4, "large")
    speedup = knee(cell)
    assert make(Job(cell, "ttft", speedup)).p99 < KNEE_SECONDS <= make(Job(cell, "ttft", speedup * 2 ** (1 / 16))).p99


def test_the_page_in_the_documentation_is_of_this_form() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    for name in ("round_robin", "least_loaded", "session", "cascade", "threshold", "blocks", "e2", "ttft"):
        assert text.count(f"| knee, {name} |") == 30


def test_a_report_that_can_not_be_written_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--out", "no/such/folder/x.md"], ["--out", "x.md", "--trace", "no-such-trace.jsonl"]):
        with pytest.raises(SystemExit) as ended:
            main(["policy", "report", *arguments])
        assert ended.value.code == 1
        assert capsys.readouterr().err.startswith("kvplane: ")
