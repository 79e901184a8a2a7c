"""Generated requests: as many as asked, in order, chained, and the same from the same seed."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events.hashing import unpack_hashes
from kvplane.services.cli import main
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.simulation.results import ideal_hit_rate
from kvplane.services.simulation.trace import TraceRequest, read_trace, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, KINDS, generate

if TYPE_CHECKING:
    from pathlib import Path

kinds = st.sampled_from(sorted(KINDS))


@settings(max_examples=50)
@given(kinds, st.integers(1, 300), st.integers(-5, 1000), st.sampled_from([None, 0.5, 300.0]))
def test_requests_are_as_many_as_asked_in_order_and_chained(
    kind: str, count: int, seed: int, rate: float | None
) -> None:
    made = generate(kind, count, seed=seed, rate=rate)
    assert len(made) == count
    times = [request.timestamp or 0.0 for request in made]
    assert times == sorted(times)
    before: dict[int, int] = {}
    for request in made:
        assert request.input_length >= 1
        assert request.output_length >= 1
        assert len(request.hash_ids) == request.input_length // GENERATED_BLOCK_SIZE
        assert len(set(request.hash_ids)) == len(request.hash_ids)
        for parent, block in zip([0, *request.hash_ids], request.hash_ids, strict=False):
            assert before.setdefault(block, parent) == parent


@settings(max_examples=40)
@given(kinds, st.integers(0, 50))
def test_a_session_only_grows_by_its_answers_and_questions(kind: str, seed: int) -> None:
    turns: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in generate(kind, 300, seed=seed, rate=1.0):
        if request.session:
            turns[request.session].append(request)
    assert bool(turns) == KINDS[kind].sessions
    for requests in turns.values():
        for earlier, later in pairwise(requests):
            assert later.hash_ids[: len(earlier.hash_ids)] == earlier.hash_ids
            assert later.input_length > earlier.input_length + earlier.output_length
            assert (later.timestamp or 0.0) > (earlier.timestamp or 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_requests_and_another_one_others(kind: str) -> None:
    assert generate(kind, 200, seed=3) == generate(kind, 200, seed=3)
    assert generate(kind, 200, seed=3) != generate(kind, 200, seed=4)
    assert generate(kind, 200, seed=3) == generate(kind, 400, seed=3)[:200]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_shares_what_its_summary_says(kind: str) -> None:
    """Conversations find most of their prompts again, prompts that share nothing find nearly nothing."""
    work = [work_of(request, GENERATED_BLOCK_SIZE) for request in generate(kind, 2000)]
    least, most = {"multi-turn": (0.5, 0.9), "shared-prefix": (0.4, 0.9), "tools": (0.8, 1), "single-turn": (0, 0.1)}[
        kind
    ]
    assert least < ideal_hit_rate(work, GENERATED_BLOCK_SIZE) < most


def reached(kind: str, rate: float | None) -> float:
    """Requests per second when sessions have long begun and ended."""
    made = generate(kind, 15_000, rate=rate)
    late = made[5000:]
    return len(late) / ((late[-1].timestamp or 0.0) - (late[0].timestamp or 0.0)) * 1000


# At a few requests per second sessions are short beside the whole, so that few requests show the long run.
@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("multi-turn", 5.0), ("shared-prefix", None), ("single-turn", None), ("single-turn", 7.0),
        ("tools", 5.0),
    ],
)  # fmt: skip
def test_the_rate_is_the_one_that_was_asked_in_the_long_run(kind: str, rate: float | None) -> None:
    assert reached(kind, rate) == pytest.approx(rate or KINDS[kind].rate, rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_written_requests_are_read_back(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    main(["workload", kind, "--requests", "150", "--seed", "5", "--rate", "20", "--out", str(path)])
    made = generate(kind, 150, seed=5, rate=20)
    trace = read_trace(path)
    assert (trace.block_size, trace.source) == (GENERATED_BLOCK_SIZE, "trace")
    read = trace.work
    assert read == [work_of(request, GENERATED_BLOCK_SIZE) for request in made]
    assert [list(unpack_hashes(work.hashes)) for work in read] == [request.hash_ids for request in made]


def test_without_a_file_requests_go_to_standard_output(
    capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    arguments = ["workload", "agent", "--requests", "20"]
    main([*arguments, "--out", str(tmp_path / "made.jsonl")])
    assert capfdbinary.readouterr().out == b""
    main(arguments)
    assert capfdbinary.readouterr().out == (tmp_path / "made.jsonl").read_bytes()


def test_an_unknown_kind_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BadRequest, match="'batch' is no kind of workload; there are multi-turn, shared-prefix, tools"):
        generate("batch", 5)
