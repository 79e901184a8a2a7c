"""Fleets in virtual time: the same each time, the log agrees with the engines, and failures lose no request."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events.hashing import pack_hashes
from kvplane.services.routing.policies import POLICIES
from kvplane.services.simulation.desk import Router
from kvplane.services.simulation.trace import Work
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE
from kvplane.services.simulation.world import Change, Settings, World
from tests.support.generated_worlds import generated, outcome_bytes
from tests.support.recorded_fleets import finished, held

if TYPE_CHECKING:
    from kvplane.services.routing.decide import Decision
    from kvplane.services.routing.query import Query

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
DELAYS = [0.0, 0.05, 0.5]


def prompt(arrival: float, *blocks: int, own: int = 5, output: int = 20, session: str = "") -> Work:
    return Work(pack_hashes(blocks), len(blocks) * SIZE + own, output, session, arrival)


def agrees(world: World, *, lost: int = 0) -> None:
    """The fold knows what engines know when nothing runs: their blocks, and no load."""
    state = world.state
    assert state.skipped == {}
    assert state.ignored == {}
    for name, number in world._alive.items():
        assert held(world, name) == set(world._engines[number].cache.blocks)
        load = state.load.of(name)
        assert load is not None
        assert (load.active, load.blocks, load.tokens, load.pending) == (0, 0, 0, 0)
    assert state.load.running == {}
    assert len(state.nodes) == len(world._alive) + lost
    assert not any(desk._own.pending for desk in world._desks)  # type: ignore[attr-defined]
    assert not world._queries
    assert not world._predicted


def test_the_same_seed_gives_the_same_outcome_and_another_one_another() -> None:
    assert outcome_bytes() == outcome_bytes()
    assert outcome_bytes() != outcome_bytes(seed=1)


def test_another_process_with_other_hashes_of_strings_has_the_same_outcome() -> None:
    code = (
        "import sys; from tests.support.generated_worlds import outcome_bytes; sys.stdout.buffer.write(outcome_bytes())"
    )
    here = outcome_bytes()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT, env=environment)
        assert done.stdout == here, done.stderr.decode()


works = st.lists(
    st.builds(
        lambda wait, chain, shared, own, output, session: (wait, chain, shared, own, output, session),
        st.sampled_from([0.0, 0.001, 0.02, 0.3, 2.0]), st.integers(0, 2), st.integers(0, 6), st.integers(0, 40),
        st.sampled_from([0, 1, 1, 2, 30]), st.sampled_from(["", "", "a", "b"]),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


def work_from(drawn: list[Any]) -> list[Work]:
    made, now = [], 0.0
    for number, (wait, chain, shared, own, output, session) in enumerate(drawn):
        now += wait
        blocks = [1000 * (chain + 1) + at for at in range(shared)]
        blocks += [100_000 * (number + 1) + at for at in range(own // SIZE)]
        made.append(prompt(now, *blocks, own=own % SIZE, output=output, session=session))
    return made


@given(works, st.sampled_from(DELAYS), st.integers(1, 12), st.integers(1, 3), st.sampled_from(sorted(POLICIES)),
       st.integers(0, 2))  # fmt: skip
def test_in_the_end_the_log_says_what_the_engines_hold(
    drawn: list[Any], delay: float, capacity: int, routers: int, policy: str, most: int
) -> None:
    work = work_from(drawn)
    chosen = Settings(
        nodes=3, capacity=capacity, block_size=SIZE, delay=delay, routers=routers, policy=policy, most_active=most
    )
    world = World(chosen, work)
    outcome = finished(world)
    agrees(world)
    assert len(outcome.served) + outcome.rejected == len(work)
    assert outcome.policy_failures == 0
    for served in outcome.served:
        assert served.arrival < served.first <= served.end


@pytest.mark.parametrize("delay", DELAYS)
def test_the_log_says_what_full_caches_hold_under_load(delay: float) -> None:
    chosen = Settings(nodes=3, capacity=700, block_size=GENERATED_BLOCK_SIZE, delay=delay, routers=2, speedup=2)
    world = World(chosen, generated("multi-turn", 300, seed=3))
    outcome = finished(world)
    agrees(world)
    assert len(outcome.served) + outcome.rejected == 300
    assert all(len(engine.cache.blocks) > 350 for engine in world._engines)


failures = st.lists(
    st.builds(
        Change, st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.9, 4.0, 9.0]),
        st.sampled_from(["node-1", "node-2", "node-3", "ä.b"]), st.booleans(),
    ),
    max_size=8,
)  # fmt: skip


@settings(max_examples=200)
@given(works, failures, st.sampled_from([0.0, 0.5, 5.0]), st.integers(4, 30), st.sampled_from(["ttft", "session"]))
def test_whatever_fails_and_joins_no_request_is_lost(
    drawn: list[Any], changes: list[Change], delay: float, capacity: int, policy: str
) -> None:
    work = work_from(drawn)
    chosen = Settings(
        nodes=3, capacity=capacity, block_size=SIZE, delay=delay, policy=policy, routers=2, changes=tuple(changes)
    )
    world = World(chosen, work)
    outcome = finished(world)
    assert len(outcome.served) + outcome.rejected == len(work)
    agrees(world, lost=sum(node.lost is not None for node in world.state.nodes.values()))
    assert {name for name, node in world.state.nodes.items() if node.lost is None} == set(world._alive)


def test_what_ran_on_a_node_that_fails_is_served_elsewhere() -> None:
    work = generated("single-turn", 150, seed=1, rate=12)
    failed, joined = 6.0, 8.0
    changes = (Change(failed, "node-1", joins=False), Change(joined, "node-4", joins=True))
    chosen = Settings(nodes=3, capacity=5000, block_size=GENERATED_BLOCK_SIZE, changes=changes)
    without = World(msgspec.structs.replace(chosen, changes=()), work).run().served
    running = [served for served in without if served.node == 0 and served.arrival < failed < served.end]
    outcome = World(chosen, work).run()
    assert (len(outcome.served), outcome.rejected, outcome.names[3]) == (150, 0, "node-4")
    assert outcome.retried == len(running) > 5
    by_arrival = {served.arrival: served for served in outcome.served}
    assert all(by_arrival[served.arrival].node != 0 for served in running)
    assert all(failed < by_arrival[served.arrival].first for served in running)
    first, fourth = ([served for served in outcome.served if served.node == node] for node in (0, 3))
    assert max(served.end for served in first) <= failed
    assert min(served.arrival for served in fourth) >= joined


def test_a_node_that_fails_after_the_last_request_came_fails_all_the_same() -> None:
    work = [prompt(0.0, own=9, output=5000)]
    settled = World(Settings(nodes=2, capacity=1000, block_size=SIZE), work).run().served[0]
    change = Change(1.0, f"node-{settled.node + 1}", joins=False)
    outcome = World(Settings(nodes=2, capacity=1000, block_size=SIZE, changes=(change,)), work).run()
    assert outcome.retried == 1
    assert outcome.served[0].node == 1 - settled.node
    assert outcome.served[0].end == pytest.approx(settled.end + 1, abs=0.01)


def test_a_change_after_the_last_end_changes_nothing() -> None:
    work = [prompt(0.0), prompt(1.0)]
    late = Change(99.0, "node-3", joins=True)
    outcome = World(Settings(nodes=2, block_size=SIZE, changes=(late,)), work).run()
    assert outcome.names == ["node-1", "node-2"]


def test_blocks_of_a_node_that_joins_before_a_loss_is_concluded_are_known() -> None:
    """Which life of the node a report is of is the sequence of its registration, whatever came between."""
    changes = (Change(1.0, "node-1", joins=False), Change(2.0, "node-3", joins=True))
    chosen = Settings(nodes=2, block_size=SIZE, changes=changes, policy="round_robin")
    world = World(chosen, [prompt(2.5 + number / 10, number + 1) for number in range(30)])
    finished(world)
    assert held(world, "node-3")
    agrees(world, lost=1)


def test_a_node_that_is_back_before_it_is_given_up_begins_a_new_life() -> None:
    changes = (Change(1.0, "node-1", joins=False), Change(2.0, "node-1", joins=True))
    chosen = Settings(nodes=1, block_size=SIZE, changes=changes)
    world = World(chosen, [prompt(0.0, 1, 2), prompt(2.5, 1, 2), prompt(8.0, 1, 2)])
    outcome = finished(world)
    agrees(world)
    assert [(served.node, served.cached) for served in outcome.served] == [(0, 0), (1, 0), (1, 2 * SIZE)]


def test_a_request_larger_than_the_cache_is_rejected_and_counted() -> None:
    work = [prompt(0.0, *range(1, 8), own=0, output=16), prompt(1.0, *range(1, 8), own=0, output=17)]
    outcome = finished(world := World(Settings(nodes=2, capacity=8, block_size=SIZE), work))
    assert (len(outcome.served), outcome.rejected) == (1, 1)
    agrees(world)


def test_what_is_above_the_limit_of_every_node_is_rejected_and_counted() -> None:
    work = [prompt(0.0, number + 1, output=100) for number in range(7)]
    outcome = World(Settings(nodes=2, block_size=SIZE, most_active=2), work).run()
    assert (len(outcome.served), outcome.rejected) == (4, 3)


@given(works, st.integers(1, 20), st.sampled_from([1.0, 31.0]))
def test_one_after_another_a_request_finds_what_was_predicted(drawn: list[Any], capacity: int, pause: float) -> None:
    # After a second the blocks have come, or come and gone; after 30 all predictions are forgotten.
    work = work_from([(pause, *rest) for _, *rest in drawn])
    outcome = World(Settings(nodes=3, capacity=capacity, block_size=SIZE, delay=0.0), work).run()
    assert [served.predicted for served in outcome.served] == [served.cached for served in outcome.served]


def test_one_after_another_prefixes_are_found() -> None:
    work = [prompt(5.0 * number, 1, 2, 3, number + 10) for number in range(6)]
    outcome = World(Settings(nodes=3, block_size=SIZE), work).run()
    assert [served.cached // SIZE for served in outcome.served] == [0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("routers", "delay", "most"), [(1, 0.002, 6), (4, 0.05, 8)])
def test_a_burst_with_one_new_prefix_stays_on_few_nodes_and_floods_none(routers: int, delay: float, most: int) -> None:
    shared = range(1, 126)
    work = [
        Work(pack_hashes([*shared, 1000 + 3 * at, 1001 + 3 * at, 1002 + 3 * at]), 125 * 64 + 200, 100, "", at / 1000)
        for at in range(50)
    ]
    chosen = Settings(nodes=16, block_size=64, routers=routers, delay=delay)
    outcome = World(chosen, work).run()
    nodes = Counter(served.node for served in outcome.served)
    assert nodes.total() == 50
    assert len(nodes) <= most
    assert routers > 1 or max(nodes.values()) <= 50 / 3


def test_routers_share_the_requests() -> None:
    asked = Counter[str]()

    class Counting(Router):
        def decide(self, query: Query, now: int) -> Decision:
            asked[self._name] += 1
            return super().decide(query, now)

    World(Settings(nodes=2, block_size=SIZE, routers=4), [prompt(at / 10) for at in range(100)], Counting).run()
    assert sorted(asked) == ["router-0", "router-1", "router-2", "router-3"]
    assert min(asked.values()) > 10
    assert asked.total() == 100


def test_requests_come_as_much_faster_as_was_asked() -> None:
    work = [prompt(float(number), number + 1) for number in range(5)]
    arrivals = [
        served.arrival for served in World(Settings(block_size=SIZE, speedup=10.0, delay=0.0), work).run().served
    ]
    assert arrivals == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
