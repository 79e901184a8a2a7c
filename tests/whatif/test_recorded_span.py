"""A recorded fleet through the time that was recorded: sessions, nodes that come and go, limits, policies."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvplane.events import types
from kvplane.projections.load import PREFILL_LABEL
from kvplane.services.process.workers import workers
from kvplane.services.protocol.errors import BadRequest, PolicyFailed
from kvplane.services.routing import policies
from kvplane.services.simulation.hardware import Hardware
from kvplane.services.simulation.world import Settings
from kvplane.services.whatif.recorded import (
    Recorded,
    RecordedChange,
    RecordedRequest,
    RecordedSession,
    RecordedWorld,
    recorded_from,
    run_recorded,
)
from kvplane.services.whatif.replay import AS_RECORDED, decided
from tests.support.fold_given import Given, registered
from tests.support.recorded_fleets import (
    CHAINS,
    GAP,
    SIZE,
    asks,
    engine_holds,
    finished,
    held,
    nodes_of,
    went,
    world_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def two(
    *requests: RecordedRequest, heartbeat: float = 0.0, changes: Sequence[RecordedChange] = (), most: int = 0
) -> Recorded:
    """Nodes `a`, which holds 1 to 4 and has the session `s`, and `b`."""
    fleet = Given()
    for name in "ab":
        fleet.node(replace(registered(name, capacity=999, most=most), pulse_seconds=heartbeat))
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
LOST = RecordedChange(10.0, types.NodeLost("a", "no heartbeat for 2.1 s"))


def test_a_node_lost_for_its_silence_failed_before_and_its_requests_are_served_elsewhere() -> None:
    settled = run_recorded(two(LONG, BETWEEN), "session")
    assert set(nodes_of(settled).values()) == {"a"}
    assert settled.served[-1].end > 20
    world = world_of(two(LONG, BETWEEN, asks(20.0, "x", 1), heartbeat=0.5, changes=[LOST]), "session")
    outcome = finished(world)
    assert set(nodes_of(outcome).values()) == {"b"}
    assert (outcome.retried, outcome.rejected) == (1, 0)
    by_name = {served.request: served for served in outcome.served}
    # Four heartbeats of half a second were missed.
    assert 8.0 < by_name["long"].first < 9.0
    assert by_name["long"].arrival == 0.0
    assert world.state.nodes["a"].lost == "no heartbeat for 2.1 s"
    assert held(world, "a") == set()


def test_a_node_without_a_heartbeat_fails_when_the_log_says_so() -> None:
    outcome = run_recorded(two(LONG, BETWEEN, changes=[LOST]), "session")
    assert set(nodes_of(outcome).values()) == {"b"}
    assert outcome.retried == 2
    assert all(served.first > 10.0 for served in outcome.served)


def test_a_node_does_not_fail_before_it_registered() -> None:
    again = RecordedChange(9.5, types.NodeRegistered("a", "x", ["m"], SIZE, {"gpu": 999}, pulse_seconds=0.5))
    soon = replace(BETWEEN, arrival=9.6)
    outcome = run_recorded(two(soon, heartbeat=0.5, changes=[again, LOST]), "session")
    assert (nodes_of(outcome), outcome.retried) == ({"between": "b"}, 0)
    early = replace(BETWEEN, arrival=9.4)
    outcome = run_recorded(two(early, heartbeat=0.5, changes=[again, LOST]), "session")
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
    recorded = two(*requests, heartbeat=0.5, changes=changes)
    world = RecordedWorld(recorded, Settings(policy=policy, delay=delay, routers=2), {}, follow=False)
    outcome = finished(world)
    assert len(outcome.served) + outcome.rejected == len(requests)
    assert (world._queries, world._predicted) == ({}, {})
    # The loss of what has failed is not reported when nothing runs any more.
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


def test_a_recorded_policy_that_never_decides_is_no_yardstick(
    own_policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its decisions would be those of least_loaded, under its name."""
    monkeypatch.syspath_prepend(tmp_path)
    recorded = replace(two(asks(0.0, "x", 1)), policy=types.PolicyChanged(own_policy))
    with pytest.raises(
        PolicyFailed, match=r"the recorded policy failed in all of its 1 decisions: .*--policy-module names"
    ):
        decided([AS_RECORDED], [run_recorded(recorded)])
    own = run_recorded(recorded, modules=["own_for_recorded"])
    assert decided([AS_RECORDED], [own]) == ([AS_RECORDED], [own], [])


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
