"""Who is lost and who is back, with time as an argument."""

from __future__ import annotations

from itertools import pairwise

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.projections.fleet import FleetState
from kvplane.services.control.liveness import LEAST_SECONDS, MISSED_HEARTBEATS, Liveness
from kvplane.services.protocol.messages import Heartbeat

HEARTBEAT = 1.0
PATIENCE = max(LEAST_SECONDS, MISSED_HEARTBEATS * HEARTBEAT)


def fleet(*nodes: str, heartbeat: float = HEARTBEAT) -> FleetState:
    state = FleetState("f")
    for node in nodes:
        put(state, types.NodeRegistered(node, "x", ["m"], 16, {"gpu": 4}, pulse_seconds=heartbeat))
    return state


def put(state: FleetState, event: types.NodeEvent) -> None:
    body = codec.encode([event])
    assert state.apply(Message(state.sequence + 1, f"kv.f.node.{event.node}", 1, None, body)).skipped is None


def lost(liveness: Liveness, state: FleetState, now: float) -> list[str]:
    return [name for name, _ in liveness.silent(state, now)]


def test_a_node_that_falls_silent_is_lost_after_its_missed_heartbeats() -> None:
    state, liveness = fleet("a", "b"), Liveness()
    for now in range(3):
        for name, epoch in (("a", 1), ("b", 2)):
            liveness.observe(state, Heartbeat(node=name, epoch=epoch), now)
    for now in range(3, 7):
        liveness.observe(state, Heartbeat(node="b", epoch=2), now)
        assert lost(liveness, state, now) == []
    assert lost(liveness, state, 2 + PATIENCE + 0.1) == ["a"]


def test_a_node_that_promised_nothing_is_never_lost() -> None:
    assert lost(Liveness(), fleet("a", heartbeat=0), 1e6) == []


def test_a_node_never_heard_is_lost_only_once_it_could_have_been_heard() -> None:
    state, liveness = fleet("a"), Liveness()
    assert lost(liveness, state, 1000) == []
    assert lost(liveness, state, 1000 + PATIENCE) == []
    assert lost(liveness, state, 1000 + PATIENCE + 0.1) == ["a"]


def test_silence_while_the_coordinator_was_deaf_proves_nothing() -> None:
    state, liveness = fleet("a"), Liveness()
    liveness.observe(state, Heartbeat(node="a", epoch=1), 0)
    assert lost(liveness, state, 0) == []
    liveness.listen(100)
    assert lost(liveness, state, 100 + PATIENCE - 0.1) == []
    assert lost(liveness, state, 100 + PATIENCE + 0.1) == ["a"]


def test_heartbeats_of_an_earlier_life_do_not_count() -> None:
    state, liveness = fleet("a"), Liveness()
    put(state, types.NodeRegistered("a", "x", ["m"], 16, {"gpu": 4}, pulse_seconds=HEARTBEAT))
    found = []
    for now in range(int(PATIENCE) + 2):
        liveness.observe(state, Heartbeat(node="a", epoch=1), now)
        found.append(lost(liveness, state, now))
    # A zombie of the first life heartbeats on; it must not keep the second alive, nor get it killed at once.
    assert found == [[]] * (int(PATIENCE) + 1) + [["a"]]


def test_a_lost_node_that_heartbeats_again_is_back() -> None:
    state, liveness = fleet("a"), Liveness()
    liveness.observe(state, Heartbeat(node="a", epoch=1), 0)
    put(state, types.NodeLost("a"))
    assert liveness.back(state, 10) == []
    liveness.observe(state, Heartbeat(node="a", epoch=99), 10)
    assert liveness.back(state, 10) == []
    # A forged life does not silence the true one.
    liveness.observe(state, Heartbeat(node="a", epoch=1), 11)
    assert liveness.back(state, 11) == ["a"]


def test_heartbeats_that_waited_while_the_coordinator_was_stopped_are_of_the_past() -> None:
    state, liveness = fleet("a"), Liveness()
    liveness.observe(state, Heartbeat(node="a", epoch=1), 0)
    put(state, types.NodeLost("a"))
    # It wakes up, and reads at once what came in half a minute: the node has died since.
    liveness.observe(state, Heartbeat(node="a", epoch=1), 29.99)
    assert liveness.back(state, 29.99) == ["a"]
    liveness.listen(30)
    for number in range(30):
        liveness.observe(state, Heartbeat(node="a", epoch=1), 30 + number / 1000)
        assert liveness.back(state, 30 + number / 1000) == []
    assert liveness.back(state, 31) == []
    # A node that lives goes on to heartbeat.
    liveness.observe(state, Heartbeat(node="a", epoch=1), 31)
    assert liveness.back(state, 31) == ["a"]


def test_a_coordinator_that_hears_badly_does_not_contradict_for_ever() -> None:
    """One coordinator hears a node, one does not: what it concludes is put right, and it learns."""
    state, deaf, hearing = fleet("a"), Liveness(), Liveness()
    concluded = []
    now = 0.0
    deaf.observe(state, Heartbeat(node="a", epoch=1), now)
    while now < 600:
        now += 0.25
        if now % HEARTBEAT == 0:
            hearing.observe(state, Heartbeat(node="a", epoch=1), now)
        for liveness in (deaf, hearing):
            for name in lost(liveness, state, now):
                put(state, types.NodeLost(name))
                liveness.concluded(name)
                concluded.append((now, "lost"))
            for name in liveness.back(state, now):
                put(state, types.NodeRecovered(name))
                concluded.append((now, "back"))
    times = [when for when, what in concluded if what == "lost"]
    assert 3 <= len(times) <= 8
    apart = [later - earlier for earlier, later in pairwise(times)]
    assert apart == sorted(apart)
    assert apart[-1] > 100
    # A heartbeat that it hears makes it as patient as it was.
    deaf.observe(state, Heartbeat(node="a", epoch=1), now)
    assert lost(deaf, state, now + PATIENCE) == []
    assert lost(deaf, state, now + PATIENCE + 0.5) == ["a"]


def test_strangers_are_not_remembered() -> None:
    state, liveness = fleet("a"), Liveness()
    for number in range(100):
        liveness.observe(state, Heartbeat(node=f"stranger {number}", epoch=1), 0)
    assert liveness.heartbeats == {}


def test_a_node_that_left_is_forgotten() -> None:
    state, liveness = fleet("a"), Liveness()
    liveness.observe(state, Heartbeat(node="a", epoch=1), 0)
    put(state, types.NodeRemoved("a"))
    liveness.forget(state)
    assert liveness.heartbeats == {}


def test_a_node_that_says_that_it_sleeps_is_lost_at_once_and_back_when_it_is_heard_again() -> None:
    state, liveness = fleet("a"), Liveness()
    for now in (1.0, 2.0, 3.0):
        liveness.observe(state, Heartbeat(node="a", epoch=1), now)
    assert liveness.asleep(state) == []
    liveness.observe(state, Heartbeat(node="a", epoch=7, asleep=True), 3.1)
    assert liveness.asleep(state) == []
    liveness.observe(state, Heartbeat(node="a", epoch=1, asleep=True), 3.2)
    assert liveness.asleep(state) == ["a"]
    put(state, types.NodeLost("a"))
    liveness.concluded("a")
    assert liveness.asleep(state) == []
    # What was heard before it slept does not bring it back, nor does its word that it sleeps.
    liveness.observe(state, Heartbeat(node="a", epoch=1, asleep=True), 4.2)
    assert liveness.back(state, 4.3) == []
    for now in (5.2, 6.2):
        liveness.observe(state, Heartbeat(node="a", epoch=1), now)
    assert liveness.back(state, 6.3) == ["a"]
