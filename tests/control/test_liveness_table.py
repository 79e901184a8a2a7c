"""The table of liveness against the same said without one, on whatever may happen to two nodes."""

from __future__ import annotations

from collections import defaultdict
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.projections.fleet import FleetState
from kvplane.services.control.liveness import (
    LEAST_SECONDS,
    MISSED_HEARTBEATS,
    MOST_DOUBLED,
    TRANSITIONS,
    Event,
    Liveness,
    Patience,
    State,
)
from kvplane.services.protocol.messages import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMISE = 0.5
PATIENCE = max(LEAST_SECONDS, MISSED_HEARTBEATS * PROMISE)


class Flags(NamedTuple):
    """Of one node: whether anything was seen of it, of its present life, and whether it is taken for lost."""

    seen: bool = False
    known: bool = False
    lost: bool = False

    def may(self, event: Event) -> bool:
        return event is Event.LOST or (event in {Event.FIRST_HEARTBEAT, Event.FIRST_SEEN}) != self.known

    def after(self, event: Event) -> Flags:
        if event is Event.LOST:
            return self._replace(seen=True, lost=True)
        # Only the log says that a lost one is alive.
        return Flags(seen=True, known=True, lost=self.lost and event in {Event.FIRST_HEARTBEAT, Event.HEARTBEAT})

    @property
    def state(self) -> State:
        return State.LOST if self.lost else State.ALIVE if self.seen else State.UNKNOWN


def reached() -> Iterator[tuple[Flags, Event]]:
    """All that can happen, from the beginning on."""
    todo, done = [Flags()], set()
    while todo:
        flags = todo.pop()
        if flags in done:
            continue
        done.add(flags)
        # It may begin another life at any time.
        todo.append(flags._replace(known=False))
        for event in filter(flags.may, Event):
            yield flags, event
            todo.append(flags.after(event))


def test_the_table_has_all_that_can_happen_and_nothing_else() -> None:
    pairs = list(reached())
    assert {(flags.state, event) for flags, event in pairs} == {
        (state, event) for state, row in TRANSITIONS.items() for event in row
    }
    for flags, event in pairs:
        found = TRANSITIONS[flags.state][event]
        assert found.state is flags.after(event).state
        by_word = flags.lost and event in {Event.SEEN, Event.SEEN_SILENT}
        assert found.begins == (by_word or event in {Event.FIRST_HEARTBEAT, Event.FIRST_SEEN})
        pulsed = event in {Event.FIRST_HEARTBEAT, Event.HEARTBEAT}
        doubled = flags.lost and event is Event.SEEN_SILENT
        assert found.patience is (Patience.USUAL if pulsed else Patience.DOUBLED if doubled else Patience.KEPT)


class Naive:
    """Liveness of one node, from what was written down."""

    def __init__(self) -> None:
        self.heartbeats: dict[int, list[float]] = defaultdict(list)
        self.life, self.since = 0, 0.0
        self.lost = False
        self.doubled = 0

    def heartbeat(self, epoch: int, now: float) -> None:
        self.heartbeats[epoch].append(now)
        self.doubled = 0
        if self.life != epoch:
            self.life, self.since = epoch, now

    def quiet(self, epoch: int, now: float, listening: float) -> float:
        last = max([listening, *self.heartbeats[epoch][-1:]])
        if self.life != epoch or self.lost:
            if self.life == epoch and now - last >= LEAST_SECONDS:
                self.doubled = min(MOST_DOUBLED, self.doubled + 1)
            self.life, self.since, self.lost = epoch, now, False
        return now - max(last, self.since)

    def back(self, epoch: int, now: float, listening: float) -> bool:
        before, last = [-inf, -inf, *self.heartbeats[epoch]][-2:]
        return now - last < LEAST_SECONDS and before >= listening and last - before >= PROMISE / 2


class World:
    """Two nodes, a log, and a coordinator that hears them well or badly."""

    def __init__(self) -> None:
        self.state = FleetState("f")
        self.liveness = Liveness()
        self.naive = {"a": Naive(), "b": Naive()}
        self.listening = self.now = 0.0
        for name in self.naive:
            self.register(name)

    def put(self, event: types.NodeEvent) -> None:
        message = Message(self.state.sequence + 1, f"kv.f.node.{event.node}", 1, None, codec.encode([event]))
        self.state.apply(message)

    def register(self, name: str) -> None:
        self.put(types.NodeRegistered(name, "x", ["m"], 16, {"gpu": 4}, pulse_seconds=PROMISE))

    def heartbeat(self, name: str) -> None:
        epoch = self.state.nodes[name].epoch
        self.liveness.observe(self.state, Heartbeat(node=name, epoch=epoch), self.now)
        self.naive[name].heartbeat(epoch, self.now)

    def zombie(self, name: str) -> None:
        self.liveness.observe(self.state, Heartbeat(node=name, epoch=self.state.nodes[name].epoch - 1), self.now)

    def lost(self, name: str) -> None:
        self.put(types.NodeLost(name))

    def recovered(self, name: str) -> None:
        self.put(types.NodeRecovered(name))

    def contradicted(self, name: str) -> None:
        """It is concluded lost, is back by another's word, and nothing is heard of it."""
        for seconds in (300.0, 300.0, 2.0, 2.25):
            self.now += seconds
            self.conclude(name)
            self.recovered(name)

    def reborn(self, name: str) -> None:
        """It is lost at once in another life, and heard once."""
        self.heartbeat(name)
        self.register(name)
        self.lost(name)
        self.now += 0.5
        self.heartbeat(name)

    def listen(self, _: str) -> None:
        self.listening = self.now
        self.liveness.listen(self.now)

    def conclude(self, _: str) -> None:
        """Look, and put on the log what is found, as a coordinator does."""
        expected = []
        for name, node in self.state.nodes.items():
            naive = self.naive[name]
            if node.lost is not None:
                naive.lost = True
                continue
            quiet = naive.quiet(node.epoch, self.now, self.listening)
            if quiet > PATIENCE * (1 << naive.doubled):
                expected.append((name, quiet))
        assert self.liveness.silent(self.state, self.now) == expected
        for name, _quiet in expected[:1]:
            self.lost(name)
            self.liveness.concluded(name)
            self.naive[name].lost = True

    def check(self) -> None:
        assert self.liveness.back(self.state, self.now) == [
            name
            for name, node in self.state.nodes.items()
            if node.lost is not None and self.naive[name].back(node.epoch, self.now, self.listening)
        ]
        for name, naive in self.naive.items():
            assert (self.liveness.state(name) is State.LOST) == naive.lost


WHAT = ["heartbeat", "recovered", "conclude", "zombie", "register", "lost", "listen", "contradicted", "reborn"]
STEPS = st.tuples(st.sampled_from(WHAT), st.sampled_from("ab"), st.sampled_from([0.0, 0.25, 0.5, 1.5, 2.25, 9.0, 40.0]))


@given(st.lists(STEPS, max_size=60))
def test_liveness_concludes_what_it_would_without_a_table(steps: list[tuple[str, str, float]]) -> None:
    world = World()
    for what, name, seconds in steps:
        world.now += seconds
        getattr(world, what)(name)
        world.check()
