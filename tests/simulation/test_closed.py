"""The closed-loop part of the report: halves that are no one's but their own, runs, targets, and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.services.protocol.errors import BadTrace
from kvplane.services.simulation import closed, closed_pages, foresight
from kvplane.services.simulation.bound import Bound
from kvplane.services.simulation.closed import Loop, LoopPlan, LoopReport, chats, copies, given, halves, produce_loops
from kvplane.services.simulation.report import Cell, Plan, Report
from kvplane.services.simulation.results import Summary
from kvplane.services.simulation.targets import Target, earlier, targets
from kvplane.services.simulation.trace import TraceRequest, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

LOOP = Loop("second", 8, 1, "agents.jsonl")
BOUND = Bound(mean=0.4, p50=0.1, p90=0.2, p99=4.0, hit_rate=0.99, makespan=900.0, session=50.0)


def session(name: str, begin: float, blocks: int, *, parent: str = "") -> list[Work]:
    hashes = [pack_hashes(range(1, 1 + count)) for count in (blocks, blocks + 1)]
    return [
        Work(each, len(each) * 2, 5, name, begin + place, 1.0 if place or parent else None, "" if place else parent)
        for place, each in enumerate(hashes)
    ]


def test_families_stay_together_and_copies_share_nothing() -> None:
    work = [
        *session("10", 50, 3), *session("2", 100, 4), *session("2s1", 130, 5), *session("7", 9, 6),
        *session("helper", 120, 2, parent="2"),
    ]  # fmt: skip
    first, second = halves(work)
    assert [{request.session for request in family} for family in first] == [{"2", "2s1", "helper"}, {"10"}]
    assert [{request.session for request in family} for family in second] == [{"7"}]
    made = copies(first, 1)
    assert len(made) == closed.COPIES * 8
    blocks = [
        {block for one in made if one.session.startswith(f"{copy}.") for block in unpack_hashes(one.hashes)}
        for copy in range(closed.COPIES)
    ]
    assert not set.intersection(*blocks)
    assert {len(each) for each in blocks} == {6}
    begins = [one.arrival for one in made if one.session == "3.2"]
    assert 0 <= begins[0] <= closed.SPAN_SECONDS
    assert begins[1] == pytest.approx(begins[0] + 1)
    assert {one.parent for one in made if one.session == "3.helper"} == {"3.2", ""}
    assert made != copies(first, 2)


def test_pauses_of_chats_do_not_count_the_answer() -> None:
    lines = [
        TraceRequest(timestamp=time, input_length=200, output_length=100, hash_ids=[1, 2, 3], session=name)
        for time, name in ((0.0, "a"), (500.0, "b"), (4000.0, "a"), (1200.0, "b"))
    ]
    assert [one.delay for one in chats(lines)] == [None, None, 3.0, 0.0]


def test_a_trace_that_is_no_closed_loop_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 700, "output_length": 1, "hash_ids": [1, 2], "block_size": 512}\n'
    )
    with pytest.raises(BadTrace, match=r"open\.jsonl is no closed loop"):
        given(str(path))


def here(function: Callable[..., Any], arguments: Sequence[Any]) -> Iterator[Any]:
    return (function(argument) for argument in arguments)


def test_all_runs_are_made_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "CHAT_REQUESTS_A_NODE", 10)
    monkeypatch.setattr(closed, "FURTHER", ("ttft:session_seconds=1",))
    plan = LoopPlan(policies=("ttft", "session", "round_robin"), places={"multi-turn": ((8, 1), (8, 2))}, situations=())
    made = produce_loops(plan, {8: 2.0}, here)
    assert len(made.bounds) + len(made.runs) + len(made.routed) == plan.steps
    for loop, seed in ((loop, loop.seed) for loop in made.bounds):
        judged = {policy for at, policy in made.runs if at == loop}
        # With another seed, only those that could be the best.
        blind = {"round_robin"} if seed == 1 else set()
        assert judged == {"ttft", "session", "ttft:session_seconds=1", foresight.NAME} | blind
        assert all(run.mean >= made.bounds[loop].mean for (at, _), run in made.runs.items() if at == loop)
    assert {(job.delay, job.routers) for job in made.routed} == {closed.ALONE, closed.ROUTED}
    text = "\n".join(closed_pages.every(made))
    assert text.count("| *bound* |") == text.count("| *schedule* |") == 2
    assert "| ttft:session_seconds=1 |" in text


def run(policy: str, **figures: float) -> Summary:
    wanted = {
        "mean": 1.0, "p50": 0.1, "p90": 0.5, "p99": 10.0, "hit_rate": 0.9, "predicted_hit_rate": 0.9, "ideal_share": 0.97,
        "imbalance": 1.2, "makespan": 1000.0, **figures,
    }  # fmt: skip
    return Summary(
        policy=policy, requests=9, rejected=0, retried=0, decisions=9, policy_failures=0, failure="", **wanted  # type: ignore[arg-type]
    )  # fmt: skip


def report(loop: Loop, *runs: Summary) -> Report:
    made = LoopReport({loop: BOUND}, {(loop, each.policy): each for each in runs}, {}, {})
    return Report(Plan(traces=()), {}, {}, {}, {}, {}, {}, made)


def of(found: Sequence[Target], what: str) -> Target:
    (target,) = [each for each in found if what in each.what]
    return target


def test_targets_compare_with_the_best_other_policy_by_each_figure() -> None:
    made = report(
        LOOP, run("ttft", mean=0.85, p99=11.0), run("ttft:load_seconds=9", mean=0.1), run(foresight.NAME, mean=0.5, p99=6.0),
        run("session", mean=1.0, p99=10.0), run("e2", mean=2.0, p99=9.0), run("dynamo", mean=3.0, p99=90.0),
    )  # fmt: skip
    found = targets(made)
    mean = of(found, "mean of ttft over that of session")
    assert (mean.seen, mean.schedule, mean.bound, mean.held) == (0.85, 0.5, 0.4, True)
    assert not of(found, "p99 of ttft over that of e2").held
    assert of(found, "mean of ttft over that of dynamo").held
    page = "\n".join(closed_pages.aims(made, ""))
    assert (
        "| agents, second half, 8 nodes: p99 of ttft over that of e2 | <= 1 | 1.22 | **no** | 0.667 | 0.444 |" in page
    )


def test_who_holds_is_compared_with_all_who_do_not() -> None:
    made = report(
        replace(LOOP, nodes=4), run("ttft", makespan=1040.0), run(foresight.NAME), run("e2"),
        run("ttft:hold=1", mean=0.4, p99=5.0, makespan=700.0), run("ttft:hold=0", mean=0.9),
    )  # fmt: skip
    found = targets(made)
    assert not of(found, "makespan of ttft over that of e2").held
    mean = of(found, "mean of ttft:hold=1 over that of ttft:hold=0")
    assert (round(mean.seen, 3), mean.held) == (0.444, True)
    assert not of(found, "p99 of ttft:hold=1").held
    assert of(found, "makespan of ttft:hold=1 over").held
    assert of(found, "hits of ttft:hold=1").held


def test_an_earlier_page_counts_where_the_load_is_the_same() -> None:
    page = (
        "### t, 4 nodes, small cache (knee at speedup 1.500)\n| knee, ttft | 2.0 | 1 |\n| knee, e2 | 1.0 | 1 |\n"
        "### t, 8 nodes, small cache (knee at speedup 1.250)\n| knee, ttft | 0.1 | 1 |\n### else\n| knee, ttft | 0.1 |\n"
    )
    assert earlier(page) == {("t", 4, "small", "knee"): ("1.500", 2.0), ("t", 8, "small", "knee"): ("1.250", 0.1)}
    cells = [Cell("t", nodes, "small") for nodes in (4, 8)]
    plan = Plan(traces=("t",), built_in=("ttft",), loads={"knee": 1.0})
    runs = {(cell, "knee", "ttft"): run("ttft", mean=2.1) for cell in cells}
    found = of(targets(Report(plan, dict.fromkeys(cells, 1.5), runs, {}, {}, {}), page), "earlier page")
    assert (found.seen, found.held) == (1.05, False)
    assert "in 1 cells" in found.what
