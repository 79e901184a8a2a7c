"""The oracle: a bound that nobody is better than, and a schedule that is better than those who don't know the future."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events.hashing import pack_hashes
from kvplane.services.simulation.bound import bound, needs, shortest_rest_first
from kvplane.services.simulation.foresight import Foreseeing, Schedule, best
from kvplane.services.simulation.results import summarize
from kvplane.services.simulation.trace import Work
from kvplane.services.simulation.world import Settings, World

SIZE = 16
ROUNDED = 1e-5
"""Figures of a run are rounded."""


def turns(
    session: int, begin: float, contexts: list[int], delays: list[float], *, common: int = 0, size: int = SIZE
) -> list[Work]:
    """A session whose contexts have so many blocks, the first of which others have as well."""
    own = range(1_000_000 * (session + 1), 1_000_000 * (session + 1) + max(contexts))
    return [
        Work(
            pack_hashes([*range(1, common + 1), *own][:blocks]), blocks * size + 3, 20, f"s{session}",
            begin + place * 1e-6, delay if place else None,
        )
        for place, (blocks, delay) in enumerate(zip(contexts, delays, strict=True))
    ]  # fmt: skip


lives = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.lists(st.tuples(st.integers(2, 600), st.floats(0, 60)), min_size=1, max_size=6),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25)
@given(lives, st.integers(1, 3), st.sampled_from(["ttft", "session", "round_robin"]))
def test_nobody_is_better_than_the_bound(
    drawn: list[tuple[float, list[tuple[int, float]], int]], nodes: int, policy: str
) -> None:
    work = [
        request
        for number, (begin, life, common) in enumerate(drawn)
        for request in turns(number, begin, [size for size, _ in life], [delay for _, delay in life], common=common)
    ]
    fleet = Settings(nodes=nodes, capacity=700, block_size=SIZE, policy=policy)
    least = bound(fleet, work)
    for outcome in (World(fleet, work).run(), Schedule(fleet, work).run(), Schedule(fleet, work, 1.0).run()):
        assert (len(outcome.served), outcome.rejected) == (len(work), 0)
        found = summarize(outcome, policy, 1.0)
        for figure in ("mean", "p50", "p90", "p99", "makespan", "session"):
            assert getattr(least, figure) <= getattr(found, figure) + ROUNDED, figure
        assert least.hit_rate >= found.hit_rate - ROUNDED


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(2, 600)), min_size=1, max_size=20), st.integers(1, 3))
def test_nor_in_an_open_loop(drawn: list[tuple[float, int]], nodes: int) -> None:
    work = [
        Work(pack_hashes(range(1000 * number + 1, 1000 * number + 1 + blocks)), blocks * SIZE + 3, 20, "", begin)
        for number, (begin, blocks) in enumerate(drawn)
    ]
    fleet = Settings(nodes=nodes, capacity=4000, block_size=SIZE)
    found = summarize(World(fleet, work).run(), "ttft", 1.0)
    least = bound(fleet, work)
    assert least.mean <= found.mean + ROUNDED
    assert least.makespan <= found.makespan + ROUNDED
    assert least.session is None


def test_who_is_alone_reaches_the_bound() -> None:
    fleet = Settings(nodes=1, capacity=4000, block_size=SIZE)
    work = turns(1, 0.0, [700, 900, 3000, 3100], [0.0, 3.0, 5.0, 1.0])
    found, least = summarize(World(fleet, work).run(), "ttft", 1.0), bound(fleet, work)
    for figure in ("mean", "p50", "p99", "hit_rate"):
        assert getattr(found, figure) == pytest.approx(getattr(least, figure), rel=1e-3), figure
    assert found.makespan == pytest.approx(least.makespan, rel=1e-3)


def test_caches_that_are_too_small_for_all_cost_time_that_nobody_can_save() -> None:
    # Each keeps the cache for itself for twenty seconds, or computes for half of one: twenty times.
    lonely = turns(0, 0.0, [900] * 20, [20.0] * 20)
    work = [request for number in range(40) for request in turns(number, 0.0, [900] * 20, [20.0] * 20)]
    fleet = Settings(nodes=1, capacity=1000, block_size=SIZE)
    assert bound(fleet, work).makespan > 1.2 * bound(fleet, lonely).makespan


def test_many_short_ones_before_a_long_one() -> None:
    assert shortest_rest_first([0.0, 1.0, 1.0], [10.0, 1.0, 2.0]) == [2.0, 4.0, 13.0]
    assert shortest_rest_first([5.0, 0.0], [1.0, 1.0]) == [1.0, 6.0]


def test_what_others_can_have_computed_is_not_charged() -> None:
    fleet = Settings(nodes=1, capacity=4000, block_size=SIZE)
    work = [*turns(0, 0.0, [10, 30], [0.0, 1.0], common=4), *turns(1, 0.5, [10], [0.0], common=4)]
    need = needs(fleet, work)
    assert need.cached == [4 * SIZE, 10 * SIZE, 4 * SIZE]
    assert need.shared == [4 * SIZE] * 3
    # Four common blocks, computed once, then found twice; six of its own found once.
    assert need.hits == (2 * 4 + 6) * SIZE


def test_what_is_used_last_is_evicted_first_and_its_end_before_its_beginning() -> None:
    cache = Foreseeing(12)
    contexts = {session: tuple(range(10 * session, 10 * session + 4)) for session in (1, 2, 3)}
    for context in contexts.values():
        assert cache.start(context) is not None
        cache.finish(context)
    cache.expect(1, 50.0, contexts[1])
    cache.expect(2, 90.0, contexts[2])
    cache.expect(3, 70.0, contexts[3])
    found = cache.start((100, 101))
    assert found is not None
    assert found.evicted == (23, 22)
    cache.never(1)
    found = cache.start((102, 103, 104))
    assert found is not None
    assert found.evicted == (13, 12, 11)
    # What is left of the first, then of the second; who comes back is not forgotten for good.
    found = cache.start((105, 106))
    assert found is not None
    assert found.evicted == (10, 21)


def overloaded() -> tuple[Settings, list[Work]]:
    """Ten sessions on a node that keeps three."""
    work = [
        request
        for number in range(10)
        for request in turns(number, 1.0 * number, [100 + turn for turn in range(12)], [4.0] * 12, size=512)
    ]
    return Settings(nodes=1, capacity=350, block_size=512), work


def test_who_holds_sessions_computes_once_and_ends_sooner() -> None:
    fleet, work = overloaded()
    held, crowded = (summarize(Schedule(fleet, work, share).run(), "", 1.0) for share in (1.0, None))
    assert held.recomputed == 0 < crowded.recomputed
    assert held.mean < crowded.mean
    chosen = best(fleet, work, (None, 1.0))
    assert math.isclose(summarize(chosen, "", 1.0).mean, held.mean)


def test_who_knows_the_future_is_better_than_who_does_not() -> None:
    fleet, work = overloaded()
    blind = summarize(World(fleet, work).run(), "ttft", 1.0)
    assert summarize(best(fleet, work), "", 1.0).mean < 0.7 * blind.mean


def test_a_sub_agent_is_not_held_while_its_parent_waits_for_it() -> None:
    fleet = Settings(nodes=1, capacity=1000, block_size=SIZE)
    parent, other = turns(0, 0.0, [800, 820], [0.0, 1.0]), turns(1, 0.0, [100, 100], [0.0, 300.0])
    agent = Work(pack_hashes(range(1, 600)), 599 * SIZE + 3, 20, "agent", 5e-7, 1.0, "s0")
    outcome = Schedule(fleet, [parent[0], agent, parent[1], *other], 1.0).run()
    found = {one.session: one for one in sorted(outcome.served, key=lambda one: one.arrival)}
    assert found["agent"].first - found["agent"].arrival < 2
    assert found["s0"].arrival == pytest.approx(found["agent"].end + 1.0)
