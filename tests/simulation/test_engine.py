"""The simulated engine: as fast as published figures, first come first served, and exact over runs of decoding steps."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.services.simulation.blockcache import BlockCache
from kvplane.services.simulation.engine import Engine, Job, Report
from kvplane.services.simulation.hardware import PUBLISHED, Hardware

SIZE = 4
KV_MEMORY = 115e9
"""Bytes that one B200 has left for keys and values beside this model's weights."""


class Request(NamedTuple):
    """What a test gives: seconds after the one before, its prefix and how much of it, and what is its own."""

    wait: float
    prefix: int
    shared: int
    own: int
    output: int


requests = st.lists(
    st.builds(
        Request, st.sampled_from([0.0, 0.0, 0.001, 0.004, 0.05, 0.3]), st.integers(0, 2), st.integers(0, 12),
        st.integers(0, 30), st.sampled_from([0, 1, 1, 2, 7, 60]),
    ),
    min_size=1, max_size=25,
)  # fmt: skip
small = st.builds(
    lambda step, running: Hardware(step_tokens=step, most_running=running),
    st.sampled_from([1, 3, 16, 8192]), st.sampled_from([1, 2, 1024]),
)  # fmt: skip


def jobs_of(given_: list[Request]) -> list[Job]:
    made, now = [], 0.0
    for number, request in enumerate(given_):
        now += request.wait
        tokens = request.shared + request.own
        blocks = [1000 * (request.prefix + 1) + at for at in range(request.shared // SIZE)]
        blocks += [100_000 * (number + 1) + at for at in range(tokens // SIZE - len(blocks))]
        made.append(Job(str(number), tuple(blocks), tokens, request.output, now))
    return made


class Driven:
    """An engine that was given jobs at their times, checked on the way."""

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        self.engine = engine
        self.held: set[int] = set()
        self.unreported: set[int] = set()
        self.ended: dict[str, float] = {}
        self.computed: list[str] = []
        self.now = 0.0
        for job in jobs:
            if not engine.fits(job):
                continue
            while engine.ends <= job.arrival:
                self._run()
            engine.arrive(job, job.arrival)
        while engine.ends < math.inf:
            self._run()

    def _run(self) -> None:
        assert self.engine.ends >= self.now
        self.now = self.engine.ends
        self._reported(self.engine.run())
        cache = self.engine.cache
        used = sum(users > 0 for users in cache.blocks.values())
        assert used + cache.private <= cache.capacity
        assert len(cache.blocks) + cache.private <= cache.capacity
        self.unreported = {block for job in self.engine.prefilling for block in job.stored}
        assert self.held | self.unreported == set(cache.blocks)

    def _reported(self, report: Report) -> None:
        for job in report.prefilled:
            assert not self.held & set(job.stored)
            self.held |= set(job.stored)
            self.computed.append(job.request)
        assert set(report.evicted) <= self.held
        self.held -= set(report.evicted)
        for job in report.finished:
            assert job.request not in self.ended
            self.ended[job.request] = self.now


@pytest.mark.parametrize("lengths", PUBLISHED, ids=str)
def test_the_step_time_gives_the_published_throughput(lengths: tuple[int, int]) -> None:
    prompt, answer = lengths
    hardware = Hardware()
    engine = Engine(hardware, int(KV_MEMORY / hardware.kv_bytes / 16), 16)
    count = 1024
    for number in range(count):
        engine.arrive(Job(str(number), (), prompt, answer, 0.0), 0.0)
    end = 0.0
    while engine.ends < math.inf:
        end = engine.ends
        engine.run()
    assert count * answer / end == pytest.approx(PUBLISHED[lengths], rel=0.15)


@given(requests, st.integers(1, 40), small)
def test_all_that_fits_is_served_once_in_order_within_the_cache(
    given_: list[Request], capacity: int, hardware: Hardware
) -> None:
    jobs = jobs_of(given_)
    engine = Engine(hardware, capacity, SIZE)
    fitting = [job for job in jobs if engine.fits(job)]
    driven = Driven(engine, jobs)
    assert set(driven.ended) == {job.request for job in fitting}
    assert driven.computed == [job.request for job in fitting]
    assert engine.active == engine.cache.private == 0
    assert not any(engine.cache.blocks.values())
    assert driven.held == set(engine.cache.blocks)
    for job in fitting:
        assert job.arrival < job.first <= driven.ended[job.request]
        assert job.first < driven.ended[job.request] or job.output <= 1
        assert job.cached == 0 or job.cached < job.tokens


@given(requests)
def test_what_fits_is_what_its_blocks_and_its_answer_need(given_: list[Request]) -> None:
    for job in jobs_of(given_):
        need = math.ceil((job.tokens + job.output) / SIZE)
        assert Engine(Hardware(), need, SIZE).fits(job)
        assert not Engine(Hardware(), need - 1, SIZE).fits(job)


def naive(jobs: list[Job], hardware: Hardware, capacity: int) -> dict[str, tuple[float, float, int]]:
    """First token, end and cached tokens of each job, computed step by step: no runs, no counters, no heap."""
    cache = BlockCache(capacity)
    coming, waiting = deque(jobs), deque[Job]()
    left: dict[str, int] = {}
    """Tokens of each prompt under way that are not computed."""
    made: dict[str, int] = {}
    """Tokens of each answer under way."""
    known = {job.request: job for job in jobs}
    found: dict[str, tuple[float, float, int]] = {}
    now = 0.0
    while coming or waiting or left or made:
        while coming and coming[0].arrival < now:
            waiting.append(coming.popleft())
        if not (waiting or left or made):
            # An idle node begins at once, without those who come at the very same time.
            now = coming[0].arrival
            waiting.append(coming.popleft())
        room = max(0, hardware.step_tokens - len(made))
        chunks: dict[str, int] = {}
        for request, tokens in left.items():
            chunks[request] = min(room, tokens)
            room -= chunks[request]
        while room > 0 and waiting and len(left) + len(made) < hardware.most_running:
            job = waiting[0]
            private = math.ceil((job.tokens + job.output) / SIZE) - len(job.hashes)
            allocation = cache.start(job.hashes, private)
            if allocation is None:
                break
            waiting.popleft()
            cached = allocation.cached
            while cached and cached * SIZE >= job.tokens:
                cached -= 1
            found[job.request] = (0.0, 0.0, cached * SIZE)
            left[job.request] = job.tokens - cached * SIZE
            chunks[job.request] = min(room, left[job.request])
            room -= chunks[job.request]
        pairs = context = 0
        for request, chunk in chunks.items():
            done = known[request].tokens - left[request]
            pairs += chunk * done + chunk * chunk // 2
            context += done if chunk else 0
        context += sum(known[request].tokens + tokens for request, tokens in made.items())
        now += hardware.step(sum(chunks.values()), pairs, len(made), context)
        for request in made:
            made[request] += 1
        for request, chunk in chunks.items():
            left[request] -= chunk
            if not left[request]:
                del left[request]
                made[request] = 1
                found[request] = (now, 0.0, found[request][2])
        for request in [request for request, tokens in made.items() if tokens >= known[request].output]:
            job = known[request]
            del made[request]
            private = math.ceil((job.tokens + job.output) / SIZE) - len(job.hashes)
            cache.finish(job.hashes, private)
            found[request] = (found[request][0], now, found[request][2])
    return found


@settings(max_examples=300)
@given(requests, st.integers(20, 60), st.sampled_from([16, 8192]))
def test_steps_made_in_one_go_end_when_single_steps_would(given_: list[Request], capacity: int, tokens: int) -> None:
    hardware = Hardware(step_tokens=tokens, most_running=8)
    jobs = jobs_of(given_)
    engine = Engine(hardware, capacity, SIZE)
    jobs = [job for job in jobs if engine.fits(job)]
    driven = Driven(engine, jobs)
    expected = naive(jobs, hardware, capacity)
    assert {job.request: job.cached for job in jobs} == {request: row[2] for request, row in expected.items()}
    for job in jobs:
        first, end, _ = expected[job.request]
        assert (job.first, driven.ended[job.request]) == pytest.approx((first, end), rel=1e-9)


def test_an_arrival_while_others_decode_waits_for_one_step_only() -> None:
    hardware = Hardware()
    engine = Engine(hardware, 10_000, 16)
    engine.arrive(Job("long", (), 100, 5000, 0.0), 0.0)
    engine.run()
    engine.run()
    step = hardware.step(0, 0, 1, 100)
    assert engine.ends > 100 * step
    engine.arrive(Job("late", (), 100, 1, 0.1), 0.1)
    assert 0.1 <= engine.ends <= 0.1 + 1.01 * step


def test_a_step_that_is_full_of_answers_leaves_prompts_as_they_are() -> None:
    engine = Engine(Hardware(step_tokens=2), 100, 16)
    for number in range(3):
        engine.arrive(Job(f"empty {number}", (), 0, 50, 0.0), 0.0)
    engine.arrive(job := Job("prompt", (), 10, 1, 0.0), 0.0)
    done = []
    while engine.ends < math.inf:
        engine.run()
        done.append(job.done)
    assert done == sorted(done)
    assert done[-1] == 10


def test_a_node_that_is_half_as_fast_takes_twice_as_long() -> None:
    ends = []
    for pace in (1.0, 2.0):
        engine = Engine(Hardware(), 10_000, 16, pace=pace)
        engine.arrive(Job("a", (), 5000, 300, 0.0), 0.0)
        end = 0.0
        while engine.ends < math.inf:
            end = engine.ends
            engine.run()
        ends.append((end, engine.busy))
    assert ends[1] == pytest.approx((2 * ends[0][0], 2 * ends[0][1]))


def test_a_chunk_of_a_prompt_is_no_longer_than_a_step() -> None:
    """A prompt of four steps' tokens takes four steps, and another one comes into the last of them."""
    hardware = Hardware(step_tokens=100)
    engine = Engine(hardware, 10_000, 16)
    for name, tokens in (("a", 350), ("b", 50)):
        engine.arrive(Job(name, (), tokens, 1, 0.0), 0.0)
    seen = Counter[int]()
    for step in range(6):
        if engine.ends == math.inf:
            break
        for _ in engine.run().prefilled:
            seen[step] += 1
    assert seen == {4: 2}
