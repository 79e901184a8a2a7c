"""Closed loops: a session waits for its answers, whatever becomes of nodes and requests; traces that contradict are refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events.hashing import pack_hashes
from kvplane.services.cli.simulating import goal_seconds
from kvplane.services.protocol.errors import BadRequest, BadTrace
from kvplane.services.simulation.results import summarize
from kvplane.services.simulation.trace import Work, read_trace
from kvplane.services.simulation.world import Change, Settings, World

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.services.simulation.world import Outcome, Served

SIZE = 16


def turn(session: str, blocks: int, *, delay: float | None, arrival: float = 0.0, first: int = 1) -> Work:
    """A request of a session whose context has so many blocks, numbered from `first`."""
    return Work(pack_hashes(range(first, first + blocks)), blocks * SIZE + 3, 20, session, arrival, delay)


def by_session(outcome: Outcome) -> dict[str, list[Served]]:
    found: dict[str, list[Served]] = {}
    for each in sorted(outcome.served, key=lambda each: each.arrival):
        found.setdefault(each.session, []).append(each)
    return found


sessions = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.lists(st.tuples(st.integers(1, 12), st.floats(0, 5)), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=6,
)
changes = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 3)), max_size=2, unique_by=lambda change: change[1])


@settings(max_examples=60)
@given(sessions, changes)
def test_every_turn_comes_its_delay_after_the_answer_before_it(
    drawn: list[tuple[float, list[tuple[int, float]]]], failures: list[tuple[float, int]]
) -> None:
    work = []
    for number, (begin, turns) in enumerate(drawn):
        for place, (blocks, delay) in enumerate(turns):
            work.append(turn(f"s{number}", blocks, delay=delay, arrival=begin + place * 1e-6, first=1 + 100 * number))
    failing = tuple(Change(time, f"node-{number}", joins=False) for time, number in failures)
    outcome = World(Settings(nodes=4, capacity=64, block_size=SIZE, changes=failing), work).run()
    assert (len(outcome.served), outcome.rejected) == (len(work), 0)
    found = by_session(outcome)
    for number, (begin, turns) in enumerate(drawn):
        served = found[f"s{number}"]
        assert math.isclose(served[0].arrival, begin + 0.002, abs_tol=1e-9)
        assert [each.tokens for each in served] == [blocks * SIZE + 3 for blocks, _ in turns]
        for before, after, (_, delay) in zip(served, served[1:], turns[1:], strict=False):
            assert math.isclose(after.arrival, before.end + delay, abs_tol=1e-9)


def test_a_session_whose_request_is_refused_goes_on() -> None:
    work = [turn("s", blocks, delay=1.0, arrival=place * 1e-6) for place, blocks in enumerate((2, 90, 3))]
    outcome = World(Settings(nodes=1, capacity=32, block_size=SIZE), work).run()
    assert (len(outcome.served), outcome.rejected) == (2, 1)
    first, second = by_session(outcome)["s"]
    # The one in between was refused at once.
    assert math.isclose(second.arrival, first.end + 2.0)


def test_sessions_begin_closer_and_think_as_long() -> None:
    work = [
        turn(name, 1 + place, delay=3.0, arrival=begin + place * 1e-6, first=first)
        for name, begin, first in (("a", 0.0, 1), ("b", 8.0, 50))
        for place in range(2)
    ]
    found = by_session(World(Settings(nodes=2, capacity=64, block_size=SIZE, speedup=4.0), work).run())
    assert math.isclose(found["b"][0].arrival - found["a"][0].arrival, 2.0)
    for served in found.values():
        assert math.isclose(served[1].arrival, served[0].end + 3.0)


def test_figures_of_sessions() -> None:
    """One node that holds one of two contexts: each turn pushes the other session's out."""
    work = [
        turn(name, 20, delay=1.0, arrival=place * 0.3 + at, first=first)
        for place in range(3)
        for name, at, first in (("a", 0.0, 1), ("b", 0.1, 100))
    ]
    outcome = World(Settings(nodes=1, capacity=24, block_size=SIZE), work).run()
    summary = summarize(outcome, "ttft", 1.0, goal=1000.0)
    assert summary.recomputed == sum(20 * SIZE - each.cached for each in outcome.served) - 2 * 20 * SIZE > 0
    assert (summary.moves, summary.held_twice, summary.within_goal) == (0, 0, 1.0)
    lasting = [served[-1].end - served[0].arrival for served in by_session(outcome).values()]
    assert summary.session is not None
    assert math.isclose(summary.session, sum(lasting) / 2, abs_tol=1e-5)
    assert summary.makespan >= max(lasting) - 1e-5


def test_figures_of_a_session_that_moves() -> None:
    """Each node computes the whole context once, and both hold it in the end."""
    work = [turn("a", 20, delay=1.0, arrival=place) for place in range(6)]
    outcome = World(Settings(nodes=2, capacity=64, block_size=SIZE, policy="round_robin"), work).run()
    nodes = [each.node for each in by_session(outcome)["a"]]
    moved = summarize(outcome, "round_robin", 1.0, goal=1e-9)
    assert set(nodes) == {0, 1}
    assert moved.moves == sum(before != after for before, after in pairwise(nodes))
    assert (moved.held_twice, moved.recomputed, moved.within_goal) == (20 * SIZE, 20 * SIZE, 0.0)


LINE = '{"timestamp": %s, "input_length": 20, "output_length": 1, "hash_ids": [1, 2]%s}\n'


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([(0, ', "session": "a", "delay": -1')], "line 1: Expected `float` >= 0.0"),
        ([(0, ', "delay": 5')], "line 1 has a delay but no session"),
        ([(0, ', "session": "a", "delay": 0'), (9, ', "session": "a"')], "line 2 of session 'a' has no delay, and line 1 has"),
        ([(0, ', "session": "a"'), (9, ', "session": "a", "delay": 4')], "line 1 of session 'a' has no delay, and line 2 has"),
        (
            [(50, ', "session": "a", "delay": 0'), (60, ""), (40, ', "session_id": "a", "delay": 4')],
            "line 3 of session 'a' is of 40 ms, before line 1 of 50 ms",
        ),
        ([(0, ', "session": "a", "session_id": "b"')], "line 1 names two sessions, 'a' and 'b'"),
    ],
)  # fmt: skip
def test_lines_that_contradict_each_other_are_named(
    tmp_path: Path, lines: list[tuple[int, str]], sentence: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(LINE % line for line in lines))
    with pytest.raises(BadTrace) as error:
        read_trace(path, block_size=16)
    assert sentence in str(error.value)


def test_both_names_of_a_session_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE % (0, ', "session": "a", "delay": 0') + LINE % (9, ', "session_id": "a", "delay": 1500'))
    work = read_trace(path, block_size=16).work
    assert [(request.session, request.delay) for request in work] == [("a", 0.0), ("a", 1.5)]


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2.0), ("500ms", 0.5), ("1.5 m", 90.0)])
def test_a_goal_has_a_unit(text: str, seconds: float) -> None:
    assert goal_seconds(text) == seconds


@pytest.mark.parametrize("text", ["2", "", "0s", "-1s", "infs", "2h30"])
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        goal_seconds(text)
