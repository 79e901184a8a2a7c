"""The block size of a trace: said, inferred from lengths, or asked for; and never one that the lines contradict."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvplane.events.hashing import unpack_hashes
from kvplane.services.cli import main
from kvplane.services.protocol.errors import BadTrace
from kvplane.services.simulation.blocksize import MOST_BLOCK_SIZE, BlockSize, allowed
from kvplane.services.simulation.trace import read_trace
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE
from tests.support.shared_data import SHARED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

TRACES = SHARED / "traces"
lengths = st.integers(0, 20_000)


def ids_of(tokens: int, size: int, partial: bool) -> int:
    return math.ceil(tokens / size) if partial else tokens // size


def written(path: Path, lines: Iterable[tuple[int, int]], **more: object) -> Path:
    path.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": 0,
                    "input_length": tokens,
                    "output_length": 1,
                    "hash_ids": list(range(1, ids + 1)),
                    **more,
                }
            )
            + "\n"
            for tokens, ids in lines
        )
    )
    return path


@given(st.integers(0, 3000), st.integers(0, 60), st.integers(1, 4000))
def test_a_size_is_allowed_exactly_when_it_gives_the_count_of_ids(tokens: int, ids: int, size: int) -> None:
    least, most = allowed(tokens, ids)
    assert (least <= size <= most) == (ids in {ids_of(tokens, size, partial=False), ids_of(tokens, size, partial=True)})


@given(st.lists(st.tuples(lengths, st.booleans()), min_size=1, max_size=30), st.integers(1, MOST_BLOCK_SIZE))
def test_the_size_that_made_a_trace_is_never_contradicted(given_: list[tuple[int, bool]], size: int) -> None:
    for known in (BlockSize(), BlockSize(size)):
        for number, (tokens, partial) in enumerate(given_, 1):
            known.line(number, tokens, ids_of(tokens, size, partial))
    assert known.size() == size


@given(
    st.lists(st.tuples(st.integers(600, 20_000), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([16, 32, 64, 128, 256]),
)
def test_a_usual_size_is_found_in_any_line_of_a_few_blocks(given_: list[tuple[int, bool]], size: int) -> None:
    assume(any(tokens >= 4 * size for tokens, _ in given_))
    known = BlockSize()
    for number, (tokens, partial) in enumerate(given_, 1):
        known.line(number, tokens, ids_of(tokens, size, partial))
    assert known.inferred
    assert known.size() == size


@pytest.mark.shared
@pytest.mark.parametrize("name", ["conversation_trace.jsonl", "agents.jsonl"])
def test_published_traces_have_the_size_that_they_were_made_with(name: str) -> None:
    if not (TRACES / name).exists():
        pytest.skip("the published traces are not on this machine")
    trace = read_trace(TRACES / name)
    assert (trace.block_size, trace.source) == (512, "inferred")
    assert read_trace(TRACES / name, limit=1).block_size == 512
    # A partial last block has no hash.
    assert all(len(unpack_hashes(work.hashes)) == work.tokens // 512 for work in trace.work)


def test_of_several_sizes_the_usual_one_is_taken(tmp_path: Path) -> None:
    # 276 to 549 tokens, of which engines use 512.
    assert read_trace(written(tmp_path / "a", [(1100, 3)])).block_size == 512
    # 777 to 791: no power of two, one multiple of 16.
    assert read_trace(written(tmp_path / "b", [(78_400, 100)])).block_size == 784
    # One size alone, though nobody uses it.
    assert read_trace(written(tmp_path / "c", [(1100, 44)])).block_size == 25


WRONG = [
    ([(700, 1)], None, "its lines allow 351 to 65,536 tokens; name the size with --block-size"),
    ([(100, 0)], None, "its lines allow 101 to 65,536 tokens; name the size with --block-size"),
    ([(1100, 3), (5, 10)], None, "line 2 has 10 hash_ids for 5 tokens, which no block size"),
    ([(0, 1)], None, "line 1 has 1 hash_ids for 0 tokens, which no block size"),
    ([(100_000, 0)], None, "line 1 has 0 hash_ids for 100,000 tokens, which no block size"),
    (
        [(1100, 3), (1100, 69)],
        None,
        (
            "line 2 has 69 hash_ids for 1,100 tokens, which takes blocks of 16 tokens, but line 1 has 3 hash_ids for 1,100 "
            "tokens, which takes 276 to 549; is it one trace?"
        ),
    ),
    (
        [(1100, 69), (1100, 3)],
        None,
        (
            "line 2 has 3 hash_ids for 1,100 tokens, which takes blocks of 276 to 549 tokens, but line 1 has 69 hash_ids for "
            "1,100 tokens, which takes 16; is it one trace?"
        ),
    ),
    (
        [(1100, 3), (1100, 3)],
        64,
        "line 1 has 3 hash_ids for 1,100 tokens, which takes blocks of 276 to 549 tokens, but --block-size is 64",
    ),
]


@pytest.mark.parametrize(("lines", "size", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_a_contradiction_names_the_line_and_both_figures(
    tmp_path: Path, lines: list[tuple[int, int]], size: int | None, says: str
) -> None:
    path = written(tmp_path / "t.jsonl", lines)
    with pytest.raises(BadTrace) as error:
        read_trace(path, block_size=size)
    assert str(error.value).startswith("t.jsonl: ")
    assert says in str(error.value)


def test_a_trace_that_says_its_size_is_held_to_it(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [(700, 1), (100, 0)], block_size=400)
    assert (trace := read_trace(path)).block_size == 400
    assert trace.source == "trace"
    assert read_trace(path, block_size=400).source == "trace"
    with pytest.raises(BadTrace, match="line 1 says block_size 400, but --block-size is 512"):
        read_trace(path, block_size=512)
    other = written(tmp_path / "other", [(700, 1)], block_size=500)
    path.write_text(path.read_text() + other.read_text())
    with pytest.raises(BadTrace, match="line 3 says block_size 500, but line 1 says block_size 400"):
        read_trace(path)
    written(path, [(700, 1)], block_size=400)
    path.write_text(path.read_text() + written(other, [(700, 4)]).read_text())
    with pytest.raises(
        BadTrace,
        match="line 2 has 4 hash_ids for 700 tokens, which takes blocks of 141 to 233 tokens, but line 1 says block_size 400",
    ):
        read_trace(path)


def test_a_line_that_says_it_late_is_compared_with_the_lines_before_it(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [(1100, 3)])
    late = written(tmp_path / "late", [(700, 11)], block_size=64)
    path.write_text(path.read_text() + late.read_text())
    with pytest.raises(
        BadTrace, match="line 2 says block_size 64, but line 1 has 3 hash_ids for 1,100 tokens, which takes"
    ):
        read_trace(path)


def test_simulate_takes_the_size_of_a_workload_and_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "made.jsonl"
    main(["workload", "tools", "--requests", "30", "--out", str(path)])
    main(["simulate", str(path), "--policy", "ttft"])
    assert f"blocks of {GENERATED_BLOCK_SIZE} tokens each (as the trace says)" in capsys.readouterr().err
    lines = [{**json.loads(line), "block_size": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["simulate", str(path), "--policy", "ttft"])
    assert (
        f"blocks of {GENERATED_BLOCK_SIZE} tokens each (inferred from the trace's lengths)" in capsys.readouterr().err
    )
    main(["simulate", str(path), "--policy", "ttft", "--block-size", "64"])
    assert f"blocks of {GENERATED_BLOCK_SIZE} tokens each (as --block-size says)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["simulate", str(path), "--policy", "ttft", "--block-size", "512"])
    assert "but --block-size is 512 [bad_trace]" in capsys.readouterr().err
