"""Closed loops: a session waits for its answers, whatever becomes of nodes and requests; traces that contradict are refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events.hashing import pack_hashes
from kvplane.services.cli.simulating import goal_seconds
from kvplane.services.protocol.errors import BadRequest, BadTrace
from kvplane.services.simulation.results import summarize
from kvplane.services.simulation.session_files import read_sessions
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


A = ', "session": "a"'
LINE = '{"timestamp": %s, "input_length": 20, "output_length": 1, "hash_ids": [1, 2]%s}\n'


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([(0, ', "session": "a", "delay": -1')], "line 1: Expected `float` >= 0.0"),
        ([(0, A), (1, A + ', "delay": 1e300')], "line 2: Expected `float` <= 1000000000000.0"),
        ([(0, ', "session": "a", "delay": null'), (1, A + ', "delay": -0.5')], "line 2: Expected `float` >= 0.0"),
        ([(0, ', "delay": 5')], "line 1 has a delay but no session"),
        (
            [(0, ', "block_size": 16'), (1, ', "session": "a", "block_size": 32')],
            "line 2 says block_size 32, but",
        ),
        (
            [(0, ', "session": "b", "parent": "a", "delay": 1'), (1, A)],
            "line 1: session 'b' is a sub-agent of 'a', which has no line before it",
        ),
        ([(0, A), (1, A + ', "delay": 0'), (9, A)], "line 3 of session 'a' has no delay, and line 2 has"),
        ([(0, A), (1, A), (9, A + ', "delay": 4')], "line 2 of session 'a' has no delay, and line 3 has"),
        ([(0, ', "session": "b", "parent": "a", "delay": 1')], "is a sub-agent of 'a', which has no line before it"),
        ([(0, A), (1, ', "session": "b", "parent": "a"')], "line 2: session 'b' is a sub-agent, and has no delay"),
        ([(0, A), (1, A + ', "parent": "a", "delay": 1')], "line 2 names a parent, but session 'a' began at line 1"),
        ([(0, ', "parent": "a"')], "line 1 has a parent but no session"),
        ([("null", A)], "line 1 has no timestamp"),
        ([(0, A), ("null", A)], "line 2 of session 'a' has neither a timestamp nor a delay"),
        (
            [(50, ', "session": "a", "delay": 0'), (60, ""), (40, ', "session_id": "a", "delay": 4')],
            "line 3 of session 'a' is of 40 ms, before line 1 of 50 ms",
        ),
        ([(0, ', "session": "a", "session_id": "b"')], "line 1 names two sessions, 'a' and 'b'"),
    ],
)  # fmt: skip
def test_lines_that_contradict_each_other_are_named(
    tmp_path: Path, lines: list[tuple[int | str, str]], sentence: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(LINE % line for line in lines))
    with pytest.raises(BadTrace) as error:
        read_trace(path, block_size=16)
    assert sentence in str(error.value)


def test_a_trace_of_aiperf_needs_timestamps_where_sessions_begin_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"session_id": "a", "timestamp": 500, "input_length": 40, "output_length": 1, "hash_ids": [1, 2]}\n'
        '{"session_id": "a", "delay": 250, "input_length": 60, "output_length": 1, "hash_ids": [1, 2, 3]}\n'
    )
    work = read_trace(path, block_size=16).work
    assert [(request.arrival, request.delay) for request in work] == [(0.5, None), (0.5, 0.25)]
    first, second = by_session(World(Settings(nodes=1, capacity=64, block_size=16), work).run())["a"]
    assert math.isclose(second.arrival, first.end + 0.25)


FAMILY = {
    "id": "p",
    "block_size": 16,
    "requests": [
        {"t": 0, "in": 40, "out": 3, "hash_ids": [1, 2], "think_time": 0.0},
        {
            "t": 5,
            "requests": [
                {"t": 5, "in": 20, "out": 2, "hash_ids": [9]},
                {"t": 6, "in": 36, "out": 2, "hash_ids": [9, 10]},
            ],
        },
        {"t": 5, "requests": [{"t": 5, "in": 20, "out": 90, "hash_ids": [9], "think_time": 0.5}]},
        {"t": 20, "in": 60, "out": 3, "hash_ids": [1, 2, 3], "think_time": 1.5},
    ],
}


def test_a_session_waits_for_its_sub_agents(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(FAMILY))
    trace = read_sessions(tmp_path)
    assert (trace.block_size, [request.session for request in trace.work]) == (16, ["p", "p/1", "p/1", "p/2", "p"])
    found = by_session(World(Settings(nodes=2, capacity=64, block_size=16), trace.work).run())
    parent, first, second = found["p"], found["p/1"], found["p/2"]
    assert math.isclose(first[0].arrival, parent[0].end)
    # Where no time of thinking is said, it is what lay between the requests.
    assert math.isclose(first[1].arrival, first[0].end + 1.0)
    assert math.isclose(second[0].arrival, parent[0].end + 0.5)
    assert math.isclose(parent[1].arrival, max(first[1].end, second[0].end) + 1.5)
    # The same block of a file, but not of another file.
    assert trace.work[1].hashes == trace.work[3].hashes
    (tmp_path / "q.json").write_bytes(msgspec.json.encode({**FAMILY, "id": "q"}))
    assert len({request.hashes for request in read_sessions(tmp_path).work if request.tokens == 60}) == 2
    for name in ("p", "q"):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode({**FAMILY, "id": name, "hash_id_scope": "global"}))
    assert len({request.hashes for request in read_sessions(tmp_path).work if request.tokens == 60}) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"requests": [{"t": 5}, {"t": 4}]}, "session 'q' has a request of 4 s after one of 5 s"),
        ({"block_size": 64}, "q.json has blocks of 64 tokens, but p.json has blocks of 16 tokens"),
        (
            {"requests": [{"t": 3, "in": 40, "hash_ids": [1, 2, 3, 4]}]},
            "q.json: the request of 3 s has 4 hash_ids for 40 tokens, more than blocks of 16 tokens",
        ),
        (
            {"requests": [{"t": 0, "in": 160, "hash_ids": [1, 2]}, {"t": 1, "in": 160, "hash_ids": [1, 2, 3]}]},
            "q.json: its requests have 5 hash_ids in all, and would have 20 if blocks had 16 tokens",
        ),
        ({"id": "p"}, "q.json and p.json are both of session 'p'"),
        ({"requests": [{"t": -1}]}, "q.json: Expected `float` >= 0.0"),
        ({"requests": [{"t": 0, "think_time": -1}]}, "q.json: Expected `float` >= 0.0"),
        ({"requests": None}, "q.json: Expected `array`, got `null`"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(FAMILY))
    (tmp_path / "q.json").write_bytes(msgspec.json.encode({**FAMILY, "id": "q", **change}))
    with pytest.raises(BadTrace) as error:
        read_sessions(tmp_path)
    assert sentence in str(error.value)


def test_a_folder_of_another_block_size_than_was_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(FAMILY))
    assert read_sessions(tmp_path, block_size=16).block_size == 16
    with pytest.raises(BadTrace, match="p.json has blocks of 16 tokens, but --block-size is 32"):
        read_sessions(tmp_path, block_size=32)


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
