"""Recorded fleets run again: they begin with what was held, nodes come and go as they did, and requests find their blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.services.process.workers import workers
from kvplane.services.simulation.blockcache import Allocation, BlockCache
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE
from kvplane.services.simulation.world import World
from kvplane.services.whatif.recorded import (
    recorded_from,
    run_recorded,
)
from tests.support.fold_given import Given, registered
from tests.support.recorded_fleets import (
    CHAINS,
    GAP,
    ROOT,
    SIZE,
    SMALL,
    asks,
    cut,
    engine_holds,
    finished,
    held,
    recorded_bytes,
    spaced,
    went,
    world_of,
)


@pytest.mark.parametrize("with_used", [True, False])
def test_a_simulated_fleet_begins_with_what_the_recorded_one_held(*, with_used: bool) -> None:
    before, recorded = cut(spaced(100), 80, with_used=with_used)
    assert all(len(engine.cache.blocks) > 250 for engine in before._engines)
    world = world_of(recorded)
    assert world.state.skipped == {}
    assert list(world.state.nodes) == ["node-1", "node-2", "node-3"]
    for name in world.state.nodes:
        assert held(world, name) == engine_holds(world, name) == engine_holds(before, name)
        engine = world._engines[world._alive[name]]
        assert (engine.cache.capacity, engine.block_size) == (400, GENERATED_BLOCK_SIZE)
    finished(world)
    assert (world.state.skipped, world.state.ignored) == ({}, {})
    for name in world.state.nodes:
        assert held(world, name) == engine_holds(world, name)


def test_blocks_are_in_the_order_in_which_the_engine_used_them() -> None:
    before, recorded = cut(spaced(100), 80)
    assert sum(len(engine.cache._idle) for engine in before._engines) > 900
    for engine, node in zip(before._engines, recorded.nodes, strict=True):
        assert unpack_hashes(node.blocks) == tuple(engine.cache._idle)


def test_what_follows_goes_as_it_went_without_a_cut() -> None:
    work = spaced(160)
    whole = went(finished(World(SMALL, work)))
    _, recorded = cut(work, 90)
    rest = went(run_recorded(recorded, "blocks"))
    assert rest == {name: whole[name] for name in rest}
    assert len(rest) == 70
    assert sum(cached > 0 for _, cached in rest.values()) > 30
    assert len({node for node, _ in rest.values()}) == 3


def test_the_same_run_twice_and_in_other_processes_is_the_same() -> None:
    here = recorded_bytes()
    code = "import sys; from tests.support.recorded_fleets import recorded_bytes; sys.stdout.buffer.write(recorded_bytes())"
    environment = {**os.environ, "PYTHONHASHSEED": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT, env=environment)
    assert done.stdout == here, done.stderr.decode()
    assert recorded_bytes() == here


def test_a_recorded_fleet_can_be_run_in_a_worker() -> None:
    _, recorded = cut(spaced(60), 50)
    with workers(1) as submit:
        there = submit(run_recorded, recorded, "ttft", {"session_seconds": 1.0}).result()
    assert there == run_recorded(recorded, "ttft", {"session_seconds": 1.0})
    assert len(there.served) == 10


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(CHAINS), st.integers(1, 6)), max_size=12),
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(CHAINS), st.integers(1, 6)), max_size=4),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 33)), max_size=4),
)
def test_a_child_leaves_before_its_parent(stored: list[Any], used: list[Any], dropped: list[Any]) -> None:
    fleet = Given()
    for name in "ab":
        fleet.node(registered(name, capacity=99))
    for name, chain, length in stored:
        fleet.stores(name, *chain[:length])
    for name, block in dropped:
        fleet.drops(name, block)
    requests = [asks(0.0, str(number), *chain) for number, chain in enumerate(CHAINS)]
    uses = [(name, pack_hashes(chain[:length])) for name, chain, length in used]
    for node in recorded_from(fleet.state, requests, used=uses).nodes:
        order = unpack_hashes(node.blocks)
        assert set(order) == fleet.held(node.registered.node)
        place = {block: at for at, block in enumerate(order)}
        for chain in CHAINS:
            here = [place[block] for block in chain if block in place]
            assert here == sorted(here, reverse=True)


def test_what_came_behind_a_block_is_a_use_of_it() -> None:
    fleet = Given()
    fleet.node(registered("a", capacity=99))
    for blocks in ((1, 2), (11, 12), (3,)):
        fleet.stores("a", *blocks)
    (node,) = recorded_from(fleet.state, [asks(0.0, "x", 1, 2, 3)]).nodes
    assert unpack_hashes(node.blocks) == (12, 11, 3, 2, 1)


def test_what_runs_has_used_its_blocks_last() -> None:
    fleet = Given()
    fleet.node(registered("a", capacity=99))
    fleet.stores("a", 1, 2)
    fleet.stores("a", 11, 12)
    fleet.routes("r", "a", 1, 2, match=2)
    (node,) = recorded_from(fleet.state, [], used=[("a", pack_hashes([11, 12]))]).nodes
    assert unpack_hashes(node.blocks) == (12, 11, 2, 1)


def test_of_more_than_fits_the_most_recently_used_stay() -> None:
    fleet = Given()
    fleet.node(registered("a", capacity=8))
    fleet.stores("a", *range(1, 7))
    fleet.stores("a", *range(11, 17))
    recorded = recorded_from(fleet.state, [asks(0.0, "x", 1, 2, 3, 4, 5)], used=[("a", pack_hashes(range(1, 7)))])
    world = world_of(recorded)
    assert held(world, "a") == engine_holds(world, "a") == {1, 2, 3, 4, 5, 6, 11, 12}
    assert went(finished(world)) == {"x": ("a", 5 * SIZE)}
    # One block was needed for the end of the prompt and two for the answer.
    assert held(world, "a") == engine_holds(world, "a") == {1, 2, 3, 4, 5, 6}


def test_a_cache_that_was_filled_forgets_the_first_block_first() -> None:
    cache = BlockCache(3)
    cache.fill([9, 3, 2, 1])
    assert cache.blocks == {3: 0, 2: 0, 1: 0}
    assert cache.start((1, 7)) == Allocation(1, (7,), (3,))


def test_managed_nodes_begin_in_their_order_and_own_their_caches_from_then_on() -> None:
    fleet = Given()
    fleet.node(registered("a", mode="managed", capacity=7))
    fleet.places("a", 1, 2, 3)
    fleet.places("a", 11, 12, 13)
    fleet.routes("r", "a", 1, 2, 3)
    recorded = recorded_from(fleet.state, [asks(0.0, "x", 1, 2, 3, output_tokens=1), asks(GAP, "y", 11, 12, 14)])
    assert unpack_hashes(recorded.nodes[0].blocks) == (13, 12, 11, 3, 2, 1)
    world = world_of(recorded)
    assert held(world, "a") == engine_holds(world, "a") == {1, 2, 3, 11, 12, 13}
    assert went(finished(world)) == {"x": ("a", 3 * SIZE), "y": ("a", 2 * SIZE)}
    assert held(world, "a") == engine_holds(world, "a") == {1, 2, 11, 12, 14}
    assert world.state.skipped == {}


def test_each_request_goes_to_its_model_in_blocks_of_its_size() -> None:
    fleet = Given()
    fleet.node(registered("a", size=16, capacity=99))
    fleet.node(registered("b", models=["n", "alias"], size=32, capacity=99))
    fleet.stores("a", 1, 2, 3)
    fleet.stores("b", 1, 2)
    requests = [
        asks(0.0, "w", 1, 2, 3, 4), asks(1.0, "x", 1, 2, 3, size=32, model="n"),
        asks(2.0, "y", 1, 2, 9, size=32, model="alias", session="s"), asks(3.0, "z", 1, model="gone"),
    ]  # fmt: skip
    world = world_of(recorded_from(fleet.state, requests))
    outcome = finished(world)
    assert went(outcome) == {"w": ("a", 48), "x": ("b", 64), "y": ("b", 64)}
    assert outcome.rejected == 1
    assert [served.predicted for served in outcome.served] == [served.cached for served in outcome.served]
    assert (held(world, "a"), held(world, "b")) == ({1, 2, 3, 4}, {1, 2, 3, 9})
    session = world.state.sessions.get("alias", "s")
    assert session is not None
    assert session.node == "b"
    assert world.state.skipped == {}


def test_hashes_beyond_the_prompt_are_no_blocks() -> None:
    fleet = Given()
    fleet.node(registered("a", capacity=99))
    world = world_of(recorded_from(fleet.state, [replace(asks(0.0, "x", 1, 2, 3), tokens=40)]))
    assert len(finished(world).served) == 1
    assert held(world, "a") == {1, 2}
