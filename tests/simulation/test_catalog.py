"""Hardware by name or by measurement: as fast as what is published, and as what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvplane.services.protocol.errors import BadRequest
from kvplane.services.simulation.catalog import CATALOG, LENGTHS, hardware, table
from kvplane.services.simulation.engine import Engine, Job
from kvplane.services.simulation.hardware import PUBLISHED, Hardware

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hardware.md"
REQUESTS = 1024
PUBLISHED_ENTRIES = [(name, lengths) for name, entry in CATALOG.items() if entry.published for lengths in LENGTHS]


def seconds(made: Hardware, capacity: int, jobs: list[tuple[int, int]]) -> tuple[float, float]:
    """When the last first token came, and when all had ended, of jobs that come at once."""
    engine = Engine(made, capacity, 16)
    given_ = [Job(str(number), (), prompt, answer, 0.0) for number, (prompt, answer) in enumerate(jobs)]
    for job in given_:
        engine.arrive(job, 0.0)
    end = 0.0
    while engine.ends < math.inf:
        end = engine.ends
        engine.run()
    return max(job.first for job in given_), end


@pytest.mark.parametrize(("name", "lengths"), PUBLISHED_ENTRIES, ids=str)
def test_an_entry_gives_the_published_throughput(name: str, lengths: tuple[int, int]) -> None:
    entry, (prompt, answer) = CATALOG[name], lengths
    made = hardware(name)
    _, end = seconds(made, made.cache_tokens // 16, [(prompt, answer)] * REQUESTS)
    assert REQUESTS * answer / end == pytest.approx(entry.published[LENGTHS.index(lengths)], rel=0.18)


def test_the_default_is_in_the_table_with_what_its_gpu_holds() -> None:
    assert CATALOG["llama-3.3-70b@b200"].published == tuple(PUBLISHED.values())
    known, named = Hardware(), hardware("llama-3.3-70b@b200")
    for figure in (
        "parameters", "weight_bytes", "attention_operations", "kv_bytes", "operations", "bandwidth", "fixed", "per_request"
    ):  # fmt: skip
        assert getattr(known, figure) == pytest.approx(getattr(named, figure)), figure
    assert named.cache_tokens < known.cache_tokens


def test_the_page_has_the_table() -> None:
    # Made again with: python -c 'from kvplane.services.simulation.catalog import table; print(table())'
    assert table() in PAGE.read_text()


@given(st.floats(500, 200_000), st.floats(5, 400), st.integers(2, 512), st.floats(0.01, 0.99))
def test_measured_numbers_are_given_back(prefill: float, decode: float, batch: int, share: float) -> None:
    together = decode * (1 + (batch - 1) * share)
    assume(together < prefill)
    text = f"prefill={prefill!r},decode={decode!r},batch={batch},batch_decode={together!r}"
    try:
        made = hardware(text)
    except BadRequest as error:
        assert "so prefill is at most" in str(error)  # noqa: PT017 - not every combination can be
        assert prefill > 8192 * decode * (1 - 1 / (1 + (batch - 1) * share))
        return
    first, _ = seconds(made, 10**6, [(made.step_tokens * 5, 1)])
    assert made.step_tokens * 5 / first == pytest.approx(prefill)
    for count, speed in ((1, decode), (batch, together)):
        first, end = seconds(made, 10**6, [(1, 101)] * count)
        assert count * 100 / (end - first) == pytest.approx(speed, rel=1e-6)
    assert made.decode_speed(batch) == pytest.approx(together)
    assert made.prefill_speed == pytest.approx(prefill)


def test_settings_are_taken_for_both_forms() -> None:
    named = hardware("llama-3.1-8b@h100:cache=12345,step_tokens=2048")
    assert (named.cache_tokens, named.step_tokens, named.most_running) == (12345, 2048, 1024)
    four = "prefill=18000,decode=110,batch=64,batch_decode=3200"
    measured = hardware(f"{four},cache=12345,most_running=7")
    assert (measured.cache_tokens, measured.most_running) == (12345, 7)
    assert hardware(four).cache_tokens == Hardware().cache_tokens


FOUR = {"prefill": "18000", "decode": "110", "batch": "64", "batch_decode": "3200"}


def four(**changed: str) -> str:
    return ",".join(f"{name}={value}" for name, value in {**FOUR, **changed}.items())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100", "'h100' is not one of llama-3.1-8b@h100, "),
        ("", "'' is not one of llama-3.1-8b@h100, "),
        ("llama-3.1-8b@h100:speed=3", "has no setting 'speed'; there are cache, step_tokens, most_running"),
        ("llama-3.1-8b@h100:cache=0", "cache is 0; it must be at least 1"),
        ("llama-3.1-8b@h100:cache=x", "'cache=x' in 'llama-3.1-8b@h100:cache=x' is no parameter"),
        ("prefill=18000", "lacks decode, batch, batch_decode; name a model and GPU, or measure four numbers"),
        (four(speed="3"), "has no setting 'speed'"),
        (four(decode="nan"), "'decode=nan'"),
        (four(decode="0"), "speeds must be more than 0"),
        (four(batch="1"), "batch a whole number from 2 up"),
        (four(batch="2.5"), "batch a whole number from 2 up"),
        (four(batch_decode="100"), "it must be more than decode"),
        (four(batch_decode="8000"), "no more than 64 times that"),
        (four(prefill="3000"), "nor than prefill"),
        (four(decode="1", batch_decode="60", prefill="500000"), "so prefill is at most 8,2"),
    ],
)
def test_what_is_wrong_is_said_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(BadRequest) as error:
        hardware(text)
    assert says in str(error.value)
