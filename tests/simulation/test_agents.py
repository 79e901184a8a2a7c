"""Generated sessions of agents: what they keep to, and how near they are to the traffic that they are fitted to."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.services.cli import main
from kvplane.services.protocol.errors import BadTrace
from kvplane.services.simulation.agents import DEFAULT, QUANTILES, Spread, generate_agents
from kvplane.services.simulation.fitting import Turns, common_beginnings, count, fit, sessions_of
from kvplane.services.simulation.likeness import compare, figures, furthest, halves
from kvplane.services.simulation.trace import Trace, TraceRequest, Work, read_trace, work_of
from kvplane.services.simulation.world import Settings, World
from tests.support.shared_data import AGENTS

if TYPE_CHECKING:
    from pathlib import Path

BUSY = msgspec.structs.replace(
    DEFAULT,
    spawning=0.05,
    session=msgspec.structs.replace(
        DEFAULT.session, turns=Spread((2, 4, 7, 12, 20, 30, 45, 50, 60)),
        longest=Spread((9000, 16000, 22000, 30000, 40000, 50000, 60000, 65000, 70000)), anew=0.03,
        beginning=Spread((3000, 3500, 4000, 4500, 5000, 5500, 6000, 6500, 7000)),
    ),
)  # fmt: skip
"""Short sessions with many sub-agents."""


def roots(trace: Trace) -> list[Turns]:
    """The sessions that are no sub-agents."""
    return [each for each in sessions_of(trace.work).values() if not each.parent]


def traced(lines: list[TraceRequest]) -> Trace:
    return Trace([work_of(line, DEFAULT.block_size) for line in lines], DEFAULT.block_size, "trace")


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([None, 0.5, 50.0]))
def test_sessions_are_in_order_and_what_a_prompt_keeps_is_the_same_blocks(
    seed: int, sessions: int, rate: float | None
) -> None:
    made = generate_agents(BUSY, sessions=sessions, seed=seed, rate=rate)
    assert [line.timestamp for line in made] == sorted(line.timestamp or 0 for line in made)
    turns: dict[str, list[TraceRequest]] = defaultdict(list)
    before: dict[int, int] = {}
    begun: dict[str, set[str]] = defaultdict(set)
    ended: set[str] = set()
    for line in made:
        size = line.block_size or 0
        assert (size, len(line.hash_ids)) == (512, line.input_length // 512)
        assert min(line.input_length, line.output_length) >= 1
        for parent, block in zip([0, *line.hash_ids], line.hash_ids, strict=False):
            assert before.setdefault(block, parent) == parent
        if line.session not in turns:
            # A sub-agent begins when its parent has.
            assert (line.delay is None) == (not line.parent)
            assert not line.parent or line.parent in turns
        else:
            assert (line.delay is not None, line.parent) == (True, "")
        turns[line.session].append(line)
        begun[line.parent] |= {line.session} if line.parent else set()
        # A parent goes on when its sub-agents have ended.
        assert line.session not in ended
        ended |= begun.pop(line.session, set())
    assert sum(not lines[0].parent for lines in turns.values()) == sessions


def test_the_same_seed_makes_the_same_sessions_and_more_of_them_are_more() -> None:
    few, more = generate_agents(BUSY, sessions=4, seed=3), generate_agents(BUSY, sessions=7, seed=3)
    names = {line.session for line in few}
    assert [line for line in more if line.session in names] == few
    assert len(more) > len(few)
    assert generate_agents(BUSY, sessions=4, seed=4) != few


def test_requests_are_as_many_as_asked_and_only_the_last_session_is_cut() -> None:
    made = generate_agents(BUSY, requests=500, seed=2)
    assert len(made) == 500
    last = max(int(line.session.partition("-")[2].partition("/")[0]) for line in made)
    whole = generate_agents(BUSY, sessions=last - 1, seed=2)
    names = {line.session for line in whole}
    assert [line for line in made if line.session in names] == whole


def test_the_rate_is_that_of_requests_in_the_long_run() -> None:
    made = generate_agents(BUSY, sessions=400, seed=1, rate=20.0)
    begins = [line.timestamp or 0 for line in made if line.delay is None]
    assert len(made) / (max(begins) / 1000) == pytest.approx(20, rel=0.2)


def test_a_parent_waits_for_its_sub_agents_when_it_is_simulated() -> None:
    lines = generate_agents(BUSY, sessions=3, seed=5)
    parents = {line.session: line.parent for line in lines if line.parent}
    assert parents
    trace = traced(lines)
    served = World(Settings(nodes=2, capacity=50_000, block_size=512), trace.work).run().served
    assert len(served) == len(lines)
    by: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in sorted(served, key=lambda each: each.arrival):
        by[each.session].append((each.arrival, each.end))
    for agent, parent in parents.items():
        first, last = by[agent][0][0], by[agent][-1][1]
        answers = [end for _, end in by[parent] if end <= first]
        # The parent's next request comes when all of its sub-agents have ended.
        later = [arrival for arrival, end in by[parent] if end > first]
        assert answers
        assert all(arrival >= last for arrival in later)


def test_a_spread_gives_its_quantiles_back() -> None:
    spread = Spread((0, 1, 2, 4, 8, 100, 300, 301, 5000))
    assert [spread.at(share) for share in QUANTILES] == pytest.approx(spread.values)
    assert 8 < spread.at(0.8) < 100


def test_a_fit_finds_again_what_sessions_were_made_with() -> None:
    """Also what the published trace does not have: sub-agents, and beginnings that many sessions share."""
    trace = traced(generate_agents(BUSY, sessions=250, seed=6))
    profile = fit(trace)
    assert count(trace) == 250
    assert profile.agent is not None
    assert profile.spawning == pytest.approx(BUSY.spawning, rel=0.1)
    assert profile.beside.mean == pytest.approx(BUSY.beside.mean, rel=0.1)
    assert (profile.session.beginnings, profile.agent.beginnings) == (6, 4)
    begun = Counter(each.first for each in common_beginnings(roots(trace), roots(trace)) if each.blocks)
    assert begun.most_common(1)[0][1] / begun.total() == pytest.approx(
        1 / sum(1 / rank for rank in range(1, 7)), rel=0.25
    )
    assert profile.session.common == pytest.approx(0.9, abs=0.05)
    assert profile.session.anew == pytest.approx(0.03, rel=0.3)
    assert profile.rate == pytest.approx(BUSY.rate, rel=0.25)
    made = figures(traced(generate_agents(profile, sessions=250, seed=7)))
    for name, wanted in figures(trace).items():
        near = 0.5 if "p99" in name else 0.25
        assert made[name] == pytest.approx(wanted, rel=near), name


@pytest.mark.shared
def test_what_is_fitted_to_one_half_of_real_sessions_is_like_the_other_half() -> None:
    if not AGENTS.exists():
        pytest.skip("the published trace is not on this machine")
    fitted, other = halves(read_trace(AGENTS))
    assert not {each.session for each in fitted.work} & {each.session for each in other.work}
    made = traced(generate_agents(fit(fitted), sessions=count(other), seed=0))
    found = {figure.name: figure for figure in compare(other, made)}
    near = {
        "prompt, mean": 1.25, "prompt, p50": 1.25, "prompt, p90": 1.5, "turns a session, mean": 1.15,
        "turns a session, p50": 1.25,
        "growth a turn, p50": 1.25, "delay, s, mean": 1.25, "delay, s, p50": 1.25, "output, mean": 1.5, "output, p50": 1.25,
        "session, min, mean": 1.25, "reusable share": 1.02,
    }  # fmt: skip
    for name, most in near.items():
        ratio = found[name].ratio or 0
        assert 1 / most <= ratio <= most, (name, ratio)


def test_figures_are_those_of_the_sessions() -> None:
    """Two sessions that begin alike, one of which makes its context anew, and a sub-agent."""

    def turn(session: str, blocks: list[int], delay: float | None, output: int, parent: str = "") -> TraceRequest:
        return TraceRequest(
            timestamp=0, input_length=512 * len(blocks) + 8, output_length=output, hash_ids=blocks, session=session,
            delay=delay, parent=parent,
        )  # fmt: skip

    lines = [
        turn("a", [1, 2, 3], None, 100), turn("b", [1, 2, 9], None, 100), turn("a", [1, 2, 3, 4], 4000, 300),
        turn("c", [7], 0, 50, "a"), turn("a", [1, 8], 8000, 100), turn("b", [1, 2, 9, 10, 11], 60000, 100),
    ]  # fmt: skip
    found = figures(traced(lines))
    assert found["turns a session, mean"] == 2.5
    assert found["growth a turn, mean"] == 1.5 * 512
    assert (found["delay, s, mean"], found["delay, s, p50"]) == (24, 8)
    assert found["contexts made anew, of turns"] == 1 / 3
    assert (found["sub-agents a session"], found["turns a sub-agent, mean"]) == (0.5, 1)
    assert (found["sessions that begin as others"], found["common beginning, mean"]) == (1, 1024)
    assert found["session, min, mean"] == pytest.approx((12 + 5 + 60 + 2) / 2 / 60)
    # Of 18 blocks, 2 of b's first, 3 and 1 of a's, 3 of b's second were there before.
    assert found["reusable share"] == 9 * 512 / sum(line.input_length for line in lines)


def test_only_what_is_further_than_the_halves_is_named() -> None:
    trace = traced(generate_agents(BUSY, sessions=40, seed=1))
    assert furthest(compare(trace, trace)) == []
    twice = Trace(
        [msgspec.structs.replace(work, output_tokens=work.output_tokens * 9) for work in trace.work], 512, "trace"
    )
    named = [figure.name for figure in furthest(compare(trace, twice))]
    assert named[0].startswith("output")
    assert not any(name.startswith(("prompt", "turns", "delay")) for name in named)


def test_sessions_without_delays_are_nothing_to_be_like() -> None:
    open_loop = Trace([Work(bytes(8), 600, 1, f"s{number % 9}", number) for number in range(90)], 512, "trace")
    with pytest.raises(BadTrace, match="the trace has 0 sessions with delays .* at least 4"):
        fit(open_loop)


def test_the_command_writes_the_sessions_and_says_how_near_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    like, out = tmp_path / "like.jsonl", tmp_path / "made.jsonl"
    main(["workload", "agent", "--sessions", "12", "--seed", "8", "--out", str(like)])
    assert capfd.readouterr() == ("", "")
    assert count(read_trace(like)) == 12
    arguments = ["workload", "agent", "--like", str(like), "--seed", "2"]
    main([*arguments, "--out", str(out)])
    table, said = capfd.readouterr()
    assert table.splitlines()[0] == "figure\tgiven\tgenerated\tratio\thalves"
    assert "figures are further from like.jsonl than its own halves" in said
    assert (read_trace(out).block_size, count(read_trace(out))) == (512, 12)
    # Beside the trace, the table is on standard error.
    main(arguments)
    lines, said = capfd.readouterr()
    assert lines == out.read_text()
    assert said.startswith(table)
    main([*arguments, "--against", str(out), "--sessions", "5"])
    lines, said = capfd.readouterr()
    assert "further from made.jsonl" in said
    assert len({json.loads(line)["session"].partition("/")[0] for line in lines.splitlines()}) == 5
