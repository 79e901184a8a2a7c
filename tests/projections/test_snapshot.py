"""Snapshots: a loaded state is the state that was dumped, and goes on as it does. `test_bad_snapshot` has what is refused."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, invariant, rule

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections import snapshot, snapshot_body
from kvplane.projections.contexts import Contexts
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadSnapshot
from kvplane.projections.fleet import FleetState
from kvplane.projections.groups import Groups, Membership, ModelGroups
from kvplane.projections.load import COLUMNS, Load, Prefills
from kvplane.projections.nodes import Caches, Node
from kvplane.projections.prefix import PrefixIndex
from kvplane.projections.recency import Recency
from kvplane.projections.segment import Segment, key_of_last
from kvplane.projections.sessions import Session, Sessions
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.query import Query
from tests.support.fleet_machine import CHAINS, FleetMachine
from tests.support.fold_given import START, Given, registered
from tests.support.index_machine import IndexMachine
from tests.support.snapshot_example import BODY_AT, DUMPED, STORY, story

if TYPE_CHECKING:
    from kvplane.events.codec import Message
    from kvplane.projections.skips import Applied

MADE_ANEW = {"changes", "slots_made", "_on_event", "_no_index", "set_back", "failure"}
"""What a loaded state need not have in common with the dumped one: counts of this process, and what every state has."""


def picture(thing: Any) -> Any:
    """Everything that an object holds, private or not, in the order in which it holds it."""
    match thing:
        case PrefixIndex():
            held = [sorted(thing.held(slot)) for slot in range(len(thing._held))]
            runs = sorted((s.packed, s.end, s.full, sorted(s.partial().items())) for s in thing.segments())
            counted = [sorted(segment.packed for segment in segments) for segments in thing._held]
            return runs, held, counted, thing._counts, len(thing), thing._bits
        case Sessions():
            on_node = sorted((node, sorted(keys)) for node, keys in thing._on_node.items())
            return picture(thing._entries), on_node, thing._limit
        case ModelGroups():
            slots = range(len(thing.owners))
            return thing.owners, {group: [sorted(i.held(slot)) for slot in slots] for group, i in thing.indexes.items()}
        case FleetState() | Load() | Caches() | Recency() | Groups() | Membership():
            return {name: picture(value) for name, value in vars(thing).items() if name not in MADE_ANEW}
        case Prefills():
            return {name: picture(getattr(thing, name)) for name in Prefills.__slots__}
        case Node() | Session():
            return [(name, picture(getattr(thing, name))) for name in thing.__struct_fields__]
        case Contexts():
            return list(thing.items()), picture(vars(thing))
        case dict():
            return [(key, picture(value)) for key, value in thing.items()]
        case list():
            return [picture(value) for value in thing]
        case array():
            return thing.typecode, thing.tobytes()
        case int() | str() | float() | None | bytes() | tuple() | msgspec.Struct():
            return thing
        case _:
            raise AssertionError(f"a {type(thing).__name__} is new in the state: is it in snapshots?")


class Watched(FleetState):
    """A state beside which the loaded ones go on."""

    def __init__(self) -> None:
        super().__init__("f")
        self._loaded: list[FleetState] = []

    def keep(self) -> None:
        loaded = snapshot.load("f", snapshot.dump(self), verify=True)
        there = picture(self)
        del there["_loaded"]
        assert picture(loaded) == there
        self._loaded = [*self._loaded[-1:], loaded]

    def apply(self, message: Message) -> Applied:
        applied = super().apply(message)
        for loaded in self._loaded:
            assert loaded.apply(message) == applied
        return applied


class SnapshotMachine(FleetMachine):
    """The machine that attacks the fold, with a snapshot now and then. The newest two loaded states go on beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = self.watched = Watched()

    @initialize()
    def keep_the_empty_one(self) -> None:
        self.watched.keep()

    @rule()
    def keep(self) -> None:
        self.watched.keep()

    @rule()
    def go_on_from_the_loaded(self) -> None:
        """A snapshot of what came from a snapshot, with nothing of the first state left."""
        twin, self.watched = self.watched._loaded[-1], Watched()
        loaded = snapshot.load("f", snapshot.dump(twin))
        vars(self.watched).update({name: value for name, value in vars(loaded).items() if name != "_on_event"})
        self.state = self.watched
        self.watched.keep()

    @invariant()
    def goes_on_alike(self) -> None:
        for loaded in self.watched._loaded:
            assert digest(loaded) == digest(self.state)
            assert [*loaded.caches.by_model] == [*self.state.caches.by_model]
            for model, index in loaded.caches.by_model.items():
                assert loaded.caches.owners(model) == self.state.caches.owners(model)
                for chain in CHAINS:
                    packed = pack_hashes(chain)
                    assert index.match(packed) == self.state.caches.index(model).match(packed)
            for name in COLUMNS:
                assert getattr(loaded.load, name).tobytes() == getattr(self.state.load, name).tobytes()
            assert (loaded.heads, loaded.load.ordinal) == (self.state.heads, self.state.load.ordinal)
            for name, recency in loaded.recency.items():
                assert recency.victims(3) == self.state.recency[name].victims(3)


SHORT = settings(
    max_examples=60,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSnapshots = SnapshotMachine.TestCase
TestSnapshots.settings = SHORT


class AdoptMachine(IndexMachine):
    """The machine that attacks the index, which is put together again from its segments now and then."""

    @rule()
    def adopt(self) -> None:
        index = PrefixIndex()
        index.add_slot(len(self.index._bits) - 1)
        copies = []
        for segment in self.index.segments():
            copy = Segment(segment.packed, segment.full, key_of_last(segment.packed))
            for slot, mask in segment.partial().items():
                copy.put(slot, mask)
            copies.append(copy)
        index.adopt(copies)
        assert [segment.packed for segment in copies] == [segment.packed for segment in self.index.segments()]
        self.index = index


TestAdopt = AdoptMachine.TestCase
TestAdopt.settings = settings(SHORT, max_examples=25)


def test_the_story_has_something_in_every_part() -> None:
    """Or else the examples below would show nothing."""
    state = STORY.state
    empty = [
        # Its log is in format 1, in which no node is held to an allowance, the fleet's pace has no bounded steps, no
        # contexts are kept and no request is held.
        *(name for name, value in vars(state).items() if name not in {*MADE_ANEW, "allowances", "queue"} and not value),
        *(name for name, value in vars(state.load).items() if not value and name not in {"bounded", "contexts"}),
        *(f"body {name}" for name, value in msgspec.structs.asdict(snapshot_body.take(state)).items() if not value),
    ]
    assert empty == []
    segments = [segment for index in state.caches.by_model.values() for segment in index.segments()]
    some = [what for segment in segments for what in (segment.some or {}).values()]
    assert min(some) < 0 < max(some)
    assert state.caches.index("n")._twins
    assert None in state.caches.owners("m")
    assert len(state.load.free) == 3
    assert max(state.recency["a"].protected.values()) == 2
    assert any(prefills.waiting and prefills.ends for prefills in state.load.prefills)
    assert {entry.was for _, entry in state.sessions.items()} == {"", "old", "gone"}


def test_a_loaded_state_is_the_state() -> None:
    loaded = snapshot.load("f", DUMPED, verify=True)
    assert picture(loaded) == picture(STORY.state)
    assert snapshot.dump(loaded) == DUMPED


def test_segments_stay_as_long_as_they_are() -> None:
    log = Given()
    log.node(registered("a", capacity=2000))
    log.stores("a", *range(1, 1300))
    before = log.state.caches.index("m").segments()
    after = snapshot.load("f", snapshot.dump(log.state)).caches.index("m").segments()
    assert [segment.packed for segment in after] == [segment.packed for segment in before]
    assert len(after) == 3


def test_nodes_that_come_take_the_same_slots_and_places() -> None:
    """The last place that became free is used first, the lowest slot that is free is used first."""
    log, loaded = story(), snapshot.load("f", DUMPED)
    for name in ("x", "y", "z", "gone"):
        log.node(registered(name, capacity=9))
        log.stores(name, 1, 2)
        log.stores(name, 1, tier="disk")
    for message in log.messages[len(STORY.messages) :]:
        assert loaded.apply(message).skipped is None
    assert picture(loaded) == picture(log.state)
    assert [loaded.load.ordinal[name] for name in ("x", "y", "z", "gone")] == [5, 1, 0, 6]
    assert loaded.caches.owners("m") == log.state.caches.owners("m")


def test_what_a_running_request_uses_stays_protected() -> None:
    log, loaded = story(), snapshot.load("f", DUMPED)
    assert loaded.recency["a"].victims(9) == log.state.recency["a"].victims(9) == [12, 11]
    assert log.places("a", 20, evicted=[1]) == "protected"
    assert log.completes("q", "a") is None
    assert log.places("a", 20, evicted=[1]) == "protected"
    assert log.completes("q again", "a") is None
    assert log.places("a", 20, evicted=[1]) is None
    skipped = [loaded.apply(message).skipped for message in log.messages[len(STORY.messages) :]]
    assert skipped == ["protected", None, "protected", None, None]
    assert digest(loaded) == digest(log.state)


def test_requests_end_by_the_clock_of_the_log() -> None:
    log, loaded = story(), snapshot.load("f", DUMPED)
    assert log.put("control", "", types.PolicyChanged("ttft"), after=1000) is None
    loaded.apply(log.messages[-1])
    assert not loaded.load.running
    assert picture(loaded) == picture(log.state)


def test_a_decision_made_on_the_old_state_is_not_taken_for_one_on_the_new() -> None:
    """Rosters are made anew when the count of changes differs: two states must not meet in it."""
    other = story()
    other.node(registered("x", capacity=9))
    states = [STORY.state, FleetState("f"), snapshot.load("f", DUMPED), snapshot.load("f", snapshot.dump(other.state))]
    counts = sorted(state.changes for state in states)
    assert min(np.diff(counts[1:])) > 10**6
    query = Query("new", "m", pack_hashes([1, 2, 3, 4]), 64, 4, 16)
    one, two = (Chooser(state, Overlay()).decide(query, START) for state in (states[0], states[2]))
    assert (one.node.name, one.match, one.candidates) == (two.node.name, two.match, two.candidates)


def test_the_header_is_read_alone() -> None:
    header = snapshot.peek(DUMPED[: snapshot.HEADER_BYTES])
    state = STORY.state
    assert header == snapshot.peek(DUMPED)
    assert (header.version, header.revision, header.fleet) == (snapshot.VERSION, snapshot.FOLD_REVISION, "f")
    assert (header.sequence, header.time, header.digest) == (state.sequence, state.time, digest(state))
    assert header.sequence == len(STORY.messages)
    assert header.length + BODY_AT == len(DUMPED)
    longest = snapshot.dump(FleetState("x" * 64))
    assert snapshot.peek(longest[: snapshot.HEADER_BYTES]).fleet == "x" * 64


def test_a_digest_that_is_known_is_not_made_again() -> None:
    assert snapshot.dump(STORY.state, known_digest=digest(STORY.state)) == DUMPED
    wrong = snapshot.dump(STORY.state, known_digest="0" * 32)
    assert digest(snapshot.load("f", wrong)) == digest(STORY.state)
    with pytest.raises(BadSnapshot, match="has the digest"):
        snapshot.load("f", wrong, verify=True)
