"""Recorded fleets run again: they begin with what was held, nodes come and go as they did, and requests find their blocks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from events import types
from events.hashing import pack_hashes, unpack_hashes
from projections.load import PREFILL_LABEL
from services.blockcache import Allocation, BlockCache
from services.errors import BadRequest
from services.routing import policies
from services.simulator.hardware import Hardware
from services.simulator.recorded import (
    Recorded,
    RecordedChange,
    RecordedRequest,
    RecordedSession,
    RecordedWorld,
    recorded_from,
    run_recorded,
)
from services.workers import workers
from services.simulator.workloads import GENERATED_BLOCK_SIZE, generate
from services.simulator.world import START, Outcome, Settings, World
from services.trace import Work, work_of
from tests.given import Given, registered

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
SIZE = 16
GAP = 31.0
"""Seconds after which nothing runs any more and all predictions are forgotten."""


def asks(arrival: float, name: str, *blocks: int, size: int = SIZE, **options: Any) -> RecordedRequest:
    options = {"model": "m", "output_tokens": 20, **options}
    return RecordedRequest(
        hashes=pack_hashes(blocks), tokens=len(blocks) * size + 5, arrival=arrival, request=name, **options
    )


def world_of(recorded: Recorded, policy: str = "blocks", *, follow: bool = False, **paces: float) -> RecordedWorld:
    return RecordedWorld(recorded, Settings(policy=policy, delay=0.002), paces, follow=follow)


def finished(world: World) -> Outcome:
    outcome = world.run()
    world._see(math.inf)
    return outcome


def held(world: World, node: str) -> set[int]:
    known = world.state.nodes[node]
    return set(world.state.caches.index(known.model).held(known.slots["gpu"]))


def engine_holds(world: World, node: str) -> set[int]:
    return set(world._engines[world._alive[node]].cache.blocks)


def went(outcome: Outcome) -> dict[str, tuple[str, int]]:
    """Node and cached tokens of every request that was served."""
    return {served.request: (outcome.names[served.node], served.cached) for served in outcome.served}


def nodes_of(outcome: Outcome) -> dict[str, str]:
    return {request: node for request, (node, _) in went(outcome).items()}


def spaced(count: int) -> list[Work]:
    """Requests that come one after another."""
    made = [work_of(line, GENERATED_BLOCK_SIZE) for line in generate("multi-turn", count, seed=5)]
    return [replace(work, arrival=at * GAP) for at, work in enumerate(made)]


SMALL = Settings(nodes=3, capacity=400, block_size=GENERATED_BLOCK_SIZE, policy="blocks")


def cut(work: Sequence[Work], at: int, settings: Settings = SMALL, *, told: bool = True) -> tuple[World, Recorded]:
    """A simulated fleet that has served requests up to one, and what is recorded of it and of those that follow."""
    world = World(settings, work[:at])
    outcome = finished(world)
    begin = at * GAP
    names = {served.request: outcome.names[served.node] for served in outcome.served}
    used = [(names[f"0.{number}"], request.hashes) for number, request in enumerate(work[:at])]
    follow = [
        RecordedRequest(
            request.hashes, request.tokens, request.output_tokens, request.session, request.arrival - begin,
            request=f"0.{number}", model="sim",
        )
        for number, request in enumerate(work[at:], at)
    ]  # fmt: skip
    start = int((START + begin) * 10**9)
    return world, recorded_from(world.state, follow, used=used if told else (), start=start)


def recorded_bytes() -> bytes:
    """A run whose caches are of the index alone, with failures and two routers."""
    _, recorded = cut(spaced(120), 80, replace(SMALL, policy="ttft"), told=False)
    changes = (RecordedChange(100.0, types.NodeLost("node-2", "")), RecordedChange(400.0, recorded.nodes[1].registered))
    quick = tuple(replace(request, arrival=request.arrival / 60) for request in recorded.requests)
    recorded = replace(recorded, changes=changes, requests=quick)
    return msgspec.json.encode([msgspec.to_builtins(recorded), run_recorded(recorded, routers=2, delay=0.05)])


@pytest.mark.parametrize("told", [True, False])
def test_a_simulated_fleet_begins_with_what_the_recorded_one_held(*, told: bool) -> None:
    before, recorded = cut(spaced(100), 80, told=told)
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
    code = "import sys; from tests.test_recorded import recorded_bytes; sys.stdout.buffer.write(recorded_bytes())"
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


CHAINS = [(1, 2, 3, 4, 5, 6), (1, 2, 13, 14), (1, 2, 3, 24), (31, 32, 33)]


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


def two(
    *requests: RecordedRequest, pulse: float = 0.0, changes: Sequence[RecordedChange] = (), most: int = 0
) -> Recorded:
    """Nodes `a`, which holds 1 to 4 and has the session `s`, and `b`."""
    fleet = Given()
    for name in "ab":
        fleet.node(replace(registered(name, capacity=999, most=most), pulse_seconds=pulse))
    fleet.stores("a", 1, 2, 3, 4)
    fleet.assigns("s", "a")
    return recorded_from(fleet.state, requests, changes)


def test_a_session_is_kept_where_it_was_recorded() -> None:
    recorded = two(*(asks(float(at), f"r{at}", 90 + at, session="s") for at in range(8)))
    assert recorded.sessions == (RecordedSession("m", "s", "a"),)
    assert set(nodes_of(run_recorded(recorded, "session")).values()) == {"a"}
    other = replace(recorded, sessions=(RecordedSession("m", "s", "b"),))
    assert set(nodes_of(run_recorded(other, "session")).values()) == {"b"}


def test_sessions_that_nobody_asks_for_are_left_out() -> None:
    assert two(asks(0.0, "x", 1)).sessions == ()


def test_requests_arrive_when_they_did_under_their_names() -> None:
    outcome = run_recorded(two(asks(7.25, "late", 1), asks(0.5, "early", 1)), "blocks", delay=0.3)
    assert [(served.request, served.arrival) for served in outcome.served] == [("early", 0.5), ("late", 7.25)]


def test_of_several_requests_with_one_name_the_first_is_sent() -> None:
    outcome = run_recorded(two(asks(1.0, "x", 8), asks(0.0, "x", 1, 2, output_tokens=500)), "blocks")
    assert went(outcome) == {"x": ("a", 2 * SIZE)}
    assert outcome.rejected == 0


def test_a_node_that_a_request_would_not_have_is_not_taken() -> None:
    assert nodes_of(run_recorded(two(asks(0.0, "x", 1, 2, 3, 4, exclude=("a",))), "blocks")) == {"x": "b"}


LONG = asks(0.0, "long", 70, session="s", output_tokens=5000)
BETWEEN = asks(9.0, "between", 71, session="s", output_tokens=500)
LOST = RecordedChange(10.0, types.NodeLost("a", "no pulse for 2.1 s"))


def test_a_node_lost_for_its_silence_failed_before_and_its_requests_are_served_elsewhere() -> None:
    settled = run_recorded(two(LONG, BETWEEN), "session")
    assert set(nodes_of(settled).values()) == {"a"}
    assert settled.served[-1].end > 20
    world = world_of(two(LONG, BETWEEN, asks(20.0, "x", 1), pulse=0.5, changes=[LOST]), "session")
    outcome = finished(world)
    assert set(nodes_of(outcome).values()) == {"b"}
    assert (outcome.retried, outcome.rejected) == (1, 0)
    by_name = {served.request: served for served in outcome.served}
    # Four pulses of half a second were missed.
    assert 8.0 < by_name["long"].first < 9.0
    assert by_name["long"].arrival == 0.0
    assert world.state.nodes["a"].lost == "no pulse for 2.1 s"
    assert held(world, "a") == set()


def test_a_node_without_a_pulse_fails_when_the_log_says_so() -> None:
    outcome = run_recorded(two(LONG, BETWEEN, changes=[LOST]), "session")
    assert set(nodes_of(outcome).values()) == {"b"}
    assert outcome.retried == 2
    assert all(served.first > 10.0 for served in outcome.served)


def test_a_node_does_not_fail_before_it_registered() -> None:
    again = RecordedChange(9.5, types.NodeRegistered("a", "x", ["m"], SIZE, {"gpu": 999}, pulse_seconds=0.5))
    soon = replace(BETWEEN, arrival=9.6)
    outcome = run_recorded(two(soon, pulse=0.5, changes=[again, LOST]), "session")
    assert (nodes_of(outcome), outcome.retried) == ({"between": "b"}, 0)
    early = replace(BETWEEN, arrival=9.4)
    outcome = run_recorded(two(early, pulse=0.5, changes=[again, LOST]), "session")
    # It was cut off by the registration first, then by the failure.
    assert (nodes_of(outcome), outcome.retried) == ({"between": "b"}, 1 + 1)


def test_a_node_that_registers_again_begins_empty_and_takes_what_it_dropped() -> None:
    fleet = Given()
    fleet.node(registered("a", capacity=999))
    fleet.stores("a", 1, 2)
    again = RecordedChange(5.0, replace(registered("a", capacity=777), max_active=3))
    requests = [asks(0.0, "x", 1, 2), LONG, asks(80.0, "y", 1, 2), asks(120.0, "z", 1, 2)]
    world = world_of(recorded_from(fleet.state, requests, [again]))
    outcome = finished(world)
    assert outcome.names == ["a", "a"]
    found = [(served.request, served.node, served.cached) for served in outcome.served]
    assert sorted(found) == [("long", 1, 0), ("x", 0, 32), ("y", 1, 0), ("z", 1, 32)]
    assert (outcome.retried, outcome.rejected) == (1, 0)
    assert world._engines[1].cache.capacity == world.state.nodes["a"].registered.capacity_blocks["gpu"] == 777
    assert world.state.nodes["a"].registered.max_active == 3
    assert held(world, "a") == engine_holds(world, "a") == {1, 2, 70}
    assert world.state.skipped == {}


def test_a_node_that_joins_is_used_and_has_its_own_speed() -> None:
    joined = replace(registered("c", capacity=99, speed=4321), max_active=0)
    recorded = two(asks(1.0, "x", 5), asks(6.0, "y", 5, exclude=("a", "b")), changes=[RecordedChange(5.0, joined)])
    world = world_of(recorded)
    assert went(finished(world)) == {"x": (nodes_of(run_recorded(recorded, "blocks"))["x"], 0), "y": ("c", 0)}
    assert world._engines[2].pace == pytest.approx(Hardware().prefill_speed / 4321)


def test_a_node_that_is_removed_finishes_what_it_runs_and_gets_no_more() -> None:
    changes = [RecordedChange(5.0, types.NodeRemoved("a")), RecordedChange(5.5, types.NodeRecovered("a"))]
    # Its prompt takes eight seconds.
    computed = replace(asks(4.0, "computed", 72, session="s"), tokens=8000)
    world = world_of(two(LONG, computed, asks(6.0, "x", 1, 2, session="s"), changes=changes), "session")
    outcome = finished(world)
    assert nodes_of(outcome) == {"long": "a", "computed": "a", "x": "b"}
    assert (outcome.retried, outcome.rejected) == (0, 0)
    assert {served.request: served.first for served in outcome.served}["computed"] > 10
    assert (world.state.skipped, world.state.ignored) == ({"unknown_node": 1}, {"unknown_request": 2})
    assert list(world.state.nodes) == outcome.names[1:] == ["b"]


happenings = st.lists(
    st.builds(
        lambda time, kind, node: RecordedChange(
            time, replace(registered(node, capacity=40), pulse_seconds=0.5) if kind is None else kind(node)
        ),
        st.sampled_from([0.0, 0.1, 1.0, 2.0, 2.5, 3.0, 4.0, 6.0]),
        st.sampled_from(
            [None, None, types.NodeLost, types.NodeRemoved, types.NodeRecovered, types.NodeCordoned, types.NodeUncordoned]
        ),
        st.sampled_from("abc"),
    ),
    max_size=8,
)  # fmt: skip
sent = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 1.0, 2.2, 3.0, 5.0]), st.sampled_from(CHAINS), st.integers(0, 6),
        st.sampled_from([1, 20, 400]), st.sampled_from(["", "s", "t"]),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=200)
@given(happenings, sent, st.sampled_from([0.0, 0.002, 0.5]), st.sampled_from(["ttft", "session", "blocks"]))
def test_whatever_happens_to_nodes_no_request_is_lost_and_the_fold_knows_what_engines_hold(
    changes: list[RecordedChange], drawn: list[Any], delay: float, policy: str
) -> None:
    requests = [
        asks(time, f"r{number}", *chain[:length], output_tokens=output, session=session)
        for number, (time, chain, length, output, session) in enumerate(drawn)
    ]
    recorded = two(*requests, pulse=0.5, changes=changes)
    world = RecordedWorld(recorded, Settings(policy=policy, delay=delay, routers=2), {}, follow=False)
    outcome = finished(world)
    assert len(outcome.served) + outcome.rejected == len(requests)
    assert (world._queries, world._predicted) == ({}, {})
    # The loss of what has failed is not told when nothing runs any more.
    assert not {active.node for active in world.state.load.running.values()} & world._alive.keys()
    assert world.state.skipped.keys() <= {"no_change", "unknown_node"}
    assert world.state.ignored.keys() <= {"unknown_request"}
    for name, node in world.state.nodes.items():
        if node.lost is None and name in world._alive:
            assert held(world, name) == engine_holds(world, name)


def test_lost_and_cordoned_nodes_begin_so_and_come_back_when_they_did() -> None:
    fleet = Given()
    fleet.node(registered("a", capacity=99))
    fleet.stores("a", 1, 2)
    fleet.change(types.NodeCordoned, "a")
    fleet.node(registered("b", models=["n"], capacity=99))
    fleet.stores("b", 1, 2)
    fleet.change(types.NodeLost, "b")
    changes = [
        RecordedChange(5.0, types.NodeUncordoned("a")), RecordedChange(10.0, types.NodeCordoned("a")),
        RecordedChange(5.0, types.NodeRecovered("b")),
    ]  # fmt: skip
    requests = [
        asks(at, f"{model}{at}", 1, 2, model=model, output_tokens=900) for at in (1.0, 6.0, 11.0) for model in "mn"
    ]
    world = world_of(recorded_from(fleet.state, requests, changes))
    outcome = finished(world)
    assert went(outcome) == {"m6.0": ("a", 32), "n6.0": ("b", 0), "n11.0": ("b", 32)}
    assert outcome.rejected == 3
    assert {served.request: served.end for served in outcome.served}["m6.0"] > 10.0
    assert (world.state.nodes["a"].cordoned, world.state.nodes["b"].lost) == (True, None)
    assert world.state.skipped == {}


def test_nodes_keep_their_limits_and_what_is_above_them_is_rejected() -> None:
    requests = [asks(at / 10, f"r{at}", 1, 2, 3, output_tokens=900) for at in range(6)]
    outcome = run_recorded(two(*requests, most=2), "blocks")
    assert (sorted(nodes_of(outcome).values()), outcome.rejected) == (["a", "a", "b", "b"], 2)
    assert run_recorded(two(*requests), "blocks").rejected == 0


def test_the_recorded_policy_changes_when_it_did_unless_another_is_asked_for() -> None:
    fleet = Given()
    fleet.put("control", "", types.PolicyChanged("session"))
    for name in "ab":
        fleet.node(registered(name, capacity=999))
    fleet.stores("b", 1, 2, 3, 4)
    fleet.assigns("s", "a")
    change = RecordedChange(5.0, types.PolicyChanged("blocks", {"overlap_weight": 2.0}))
    requests = [asks(at, name, 1, 2, 3, 4, session="s") for at, name in ((0.0, "x"), (40.0, "y"))]
    requests[0] = asks(0.0, "x", 9, session="s")
    recorded = recorded_from(fleet.state, requests, [change])
    assert nodes_of(run_recorded(recorded)) == {"x": "a", "y": "b"}
    assert nodes_of(run_recorded(recorded, "session")) == {"x": "a", "y": "a"}
    world = world_of(recorded, "session", follow=True)
    finished(world)
    assert (world.state.policy, world.state.parameters) == ("blocks", {"overlap_weight": 2.0})


def test_speeds_are_those_that_the_log_measured() -> None:
    fleet = Given()
    for name in "ab":
        fleet.node(registered(name, capacity=9999, speed=1000))
    for at in range(20):
        fleet.routes(f"r{at}", "a", 1000 + at, tokens=4000)
        fleet.now += 19 * 10**9
        fleet.completes(f"r{at}", "a")
    load = fleet.state.load
    measured = {name: known.pace * load.ratio for name in "ab" if (known := load.of(name))}
    assert measured["a"] < measured["b"] < 300
    recorded = recorded_from(fleet.state, [asks(0.0, "x", *range(20), exclude=("b",))])
    assert recorded.speeds == measured
    world = world_of(recorded)
    for name, number in world._alive.items():
        assert world._engines[number].pace == pytest.approx(Hardware().prefill_speed / measured[name])
        known = world.state.load.of(name)
        assert known is not None
        assert known.pace == measured[name]
        assert world.state.nodes[name].registered.labels == {PREFILL_LABEL: str(measured[name])}
    (plain,) = finished(world).served
    (slow,) = run_recorded(recorded, "blocks", paces={"a": 2.5, "b": 9.0}).served
    assert slow.first == pytest.approx(2.5 * plain.first)
    assert slow.end == pytest.approx(2.5 * plain.end)


def test_time_goes_on_from_the_recorded_moment() -> None:
    recorded = two(asks(2.0, "x", 1))
    world = world_of(recorded)
    begin = world.state.time
    assert begin == pytest.approx(recorded.start, abs=0.01 * 10**9)
    finished(world)
    assert world.state.time == pytest.approx(recorded.start + (2 + world._served[0].end - 2) * 10**9, abs=10**6)


MODULE = """
def to_b(view, request, parameters):
    return [float(name != "b") * parameters.get("weight", 1.0) for name in view.names]
"""


@pytest.fixture
def own_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "own_for_recorded.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(policies, "_allowed", set())
    monkeypatch.delitem(sys.modules, "own_for_recorded", raising=False)
    return "own_for_recorded:to_b"


def test_a_policy_of_ones_own_decides_here_and_in_a_worker(own_policy: str) -> None:
    recorded = two(*(asks(at * GAP, f"r{at}", 1, 2, 3, 4) for at in range(4)))
    outcome = run_recorded(recorded, own_policy)
    assert (set(nodes_of(outcome).values()), outcome.policy_failures) == ({"b"}, 0)
    assert set(nodes_of(run_recorded(recorded, own_policy, {"weight": -1.0})).values()) == {"a"}
    with workers(1) as submit:
        assert submit(run_recorded, recorded, own_policy).result() == outcome


def test_the_log_can_not_have_a_policy_imported(
    own_policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    recorded = replace(two(asks(0.0, "x", 1)), policy=types.PolicyChanged(own_policy))
    outcome = run_recorded(recorded)
    assert (outcome.policy_failures, "own_for_recorded" in sys.modules) == (1, False)
    assert "may not be used" in outcome.failure
    outcome = run_recorded(recorded, modules=["own_for_recorded"])
    assert (outcome.policy_failures, nodes_of(outcome)) == (0, {"x": "b"})


@pytest.mark.parametrize("policy", ["magic", "dynamo", "no_such_module_here:score"])
def test_a_policy_that_is_none_is_refused(policy: str) -> None:
    with pytest.raises(BadRequest):
        run_recorded(two(asks(0.0, "x", 1)), policy)
    with pytest.raises(BadRequest, match="has no parameter"):
        run_recorded(two(asks(0.0, "x", 1)), "ttft", {policy: 1.0})
