"""KV cache groups of hybrid models: a match is what vLLM's own search would find, for any layouts and whatever they hold."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.versions import FORMAT
from kvplane.projections import snapshot, snapshot_body, snapshot_groups
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.groups import Layout
from tests.support.fold_given import Given, registered, replayed
from tests.support.naive_hybrid import NaiveGroup, longest_hit

SIZE = 16
CHAINS = [
    [*range(1, 25)],
    [*range(1, 9), *range(101, 117)],
    [*range(1, 17), *range(201, 209)],
]
NAMES = ["a", "b", "c"]
nodes = st.sampled_from(NAMES)
spans = st.sampled_from([1, 1, 2, 3, 4])
sliding = st.builds(Layout, st.just("sliding"), st.sampled_from([1, 16, 17, 18, 40, 65, 128, 1024]), spans)
layouts = st.lists(
    sliding | st.builds(Layout, st.sampled_from(["full", "state"]), st.just(0), spans), min_size=1, max_size=3
) | st.lists(
    st.builds(Layout, st.just("chunked"), st.sampled_from([16, 32, 64, 160]), st.just(1))
    | st.builds(Layout, st.just("sliding"), st.sampled_from([17, 40, 65]), st.just(1)),
    min_size=1, max_size=2,
)  # fmt: skip


class GroupsMachine(RuleBasedStateMachine):
    @initialize(drawn=st.tuples(layouts, layouts, st.just([]) | layouts), same=st.booleans())
    def begin(self, drawn: tuple[list[Layout], ...], same: bool) -> None:
        self.given = Given()
        assert self.given.put("control", "", types.FormatRaised(FORMAT)) is None
        self.drawn = dict(zip(NAMES, [drawn[0]] * 3 if same else drawn, strict=True))
        self.held: dict[str, list[set[int]]] = {}
        for name in NAMES:
            self.register(name)

    def register(self, name: str) -> None:
        self.given.node(registered(name, capacity=1000))
        self.held[name] = [set() for _ in range(len(self.drawn[name]) + 1)]
        for group in range(len(self.drawn[name])):
            self.stored(name, group, [])

    def stored(self, name: str, group: int, blocks: list[int]) -> None:
        layout = self.drawn[name][group]
        # As the engine numbers them: the one that is followed is in the middle.
        number, epoch = group + (group >= 1), self.given.state.nodes[name].epoch
        event = types.GroupStored(name, epoch, 1, number, layout.kind, pack_hashes(blocks), layout.window, layout.span)
        assert self.given.put("cache", name, event) is None
        self.held[name][group + 1] |= {*blocks}

    @rule(name=nodes, chain=st.sampled_from(CHAINS), start=st.integers(0, 23), length=st.integers(1, 24),
          which=st.integers(0, 5))  # fmt: skip
    def store(self, name: str, chain: list[int], start: int, length: int, which: int) -> None:
        group = which % (len(self.drawn[name]) + 1) - 1
        if group < 0:
            assert self.given.stores(name, *chain[start : start + length]) is None
            self.held[name][0] |= {*chain[start : start + length]}
            return
        span = self.drawn[name][group].span
        self.stored(name, group, chain[span - 1 :: span][start // span :][:length])

    @rule(name=nodes, chain=st.sampled_from(CHAINS))
    def store_all(self, name: str, chain: list[int]) -> None:
        self.store(name, chain, 0, 24, 0)
        for group in range(len(self.drawn[name])):
            self.store(name, chain, 0, 24, group + 1)

    @rule(name=nodes, chain=st.sampled_from(CHAINS), gone=st.lists(st.integers(0, 23), min_size=1, max_size=6),
          which=st.integers(0, 5))  # fmt: skip
    def remove(self, name: str, chain: list[int], gone: list[int], which: int) -> None:
        group = which % (len(self.drawn[name]) + 1) - 1
        blocks = [chain[at] for at in gone]
        self.held[name][group + 1] -= {*blocks}
        if group < 0:
            assert self.given.drops(name, *blocks) is None
            return
        number, epoch = group + (group >= 1), self.given.state.nodes[name].epoch
        assert self.given.put("cache", name, types.GroupRemoved(name, epoch, 1, number, pack_hashes(blocks))) is None

    @rule(name=nodes)
    def clear(self, name: str) -> None:
        assert self.given.put("cache", name, types.CacheCleared(name, self.given.state.nodes[name].epoch)) is None
        self.held[name] = [set() for _ in self.held[name]]

    @rule(name=nodes, drawn=st.just([]) | layouts)
    def begin_anew(self, name: str, drawn: list[Layout]) -> None:
        self.drawn[name] = drawn
        self.register(name)

    @rule(name=nodes)
    def lose(self, name: str) -> None:
        assert self.given.change(types.NodeLost, name) is None
        assert self.given.change(types.NodeRecovered, name) is None
        self.held[name] = [set() for _ in self.held[name]]

    @rule()
    def go_on_from_a_snapshot(self) -> None:
        self.given.state = snapshot.load("f", snapshot.dump(self.given.state), verify=True)

    @precondition(lambda self: len(self.given.messages) > 12)
    @rule()
    def compare_replicas(self) -> None:
        assert digest(replayed(self.given.messages)) == digest(self.given.state)

    @invariant()
    def hits_are_those_of_the_engine(self) -> None:
        known = [self.given.state.nodes[name] for name in NAMES]
        index = self.given.state.caches.index("m")
        for chain in CHAINS:
            for limit in (24, 23, 10):
                hashes = pack_hashes(chain)
                lengths = index.match(hashes, limit)
                found = self.given.state.caches.groups.limit(known, [lengths[n.slots["gpu"]] for n in known], hashes)
                for name, hit in zip(NAMES, found, strict=True):
                    held = self.held[name]
                    groups = [NaiveGroup("full", 0, SIZE, held[0])]
                    groups += [
                        NaiveGroup(layout.kind, layout.window, SIZE * layout.span, own)
                        for layout, own in zip(self.drawn[name], held[1:], strict=True)
                    ]
                    assert hit * SIZE == longest_hit(groups, chain, SIZE, limit * SIZE), (name, chain, limit, groups)


TestHitsAreThoseOfTheEngine = cast("Any", GroupsMachine).TestCase
TestHitsAreThoseOfTheEngine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def of(*layouts: Layout) -> Given:
    """A node with a chain of 24 blocks in each of these groups, and in the one that is followed."""
    given = Given()
    given.put("control", "", types.FormatRaised(FORMAT))
    epoch = given.node(registered("a", capacity=1000))
    given.stores("a", *CHAINS[0])
    for number, layout in enumerate(layouts, 1):
        blocks = pack_hashes(CHAINS[0][layout.span - 1 :: layout.span])
        given.put(
            "cache", "a", types.GroupStored("a", epoch, 1, number, layout.kind, blocks, layout.window, layout.span)
        )
    return given


def hit(given: Given, limit: int = 24) -> int:
    node, hashes = given.state.nodes["a"], pack_hashes(CHAINS[0])
    return given.state.caches.groups.limit([node], [min(limit, given.matches("a", *CHAINS[0]))], hashes)[0]


def drops(given: Given, group: int, *blocks: int) -> None:
    epoch = given.state.nodes["a"].epoch
    assert given.put("cache", "a", types.GroupRemoved("a", epoch, 1, group, pack_hashes(blocks))) is None


@pytest.mark.parametrize(
    ("layout", "gone", "expected"),
    [
        # A window of 65 tokens needs 4 blocks of 16 before its end, however many are missing before those.
        (Layout("sliding", 65, 1), (20,), 24),
        (Layout("sliding", 65, 1), (21,), 20),
        (Layout("sliding", 65, 1), (21, 18), 17),
        (Layout("sliding", 65, 1), (21, 18, 15, 12, 9, 6, 4, 2, 1), 0),
        # A window of one token is in no block before the one that is computed, but the last must be there.
        (Layout("sliding", 1, 1), (24,), 23),
        # Chunks of 10 blocks: within one all that is before is needed, at its end nothing.
        (Layout("chunked", 160, 1), (20,), 24),
        (Layout("chunked", 160, 1), (24, 23), 22),
        (Layout("chunked", 160, 1), (22, 21), 20),
        (Layout("chunked", 160, 1), tuple(range(1, 25)), 20),
        (Layout("chunked", 128, 1), (), 24),
        # Of a state the block at the end alone.
        (Layout("state", 0, 1), tuple(range(1, 24)), 24),
        (Layout("state", 0, 1), (24, 23, 22, 20), 21),
        # A further group of full attention is needed from the beginning.
        (Layout("full", 0, 1), (3,), 2),
        # Blocks that are four times as large end where every fourth of the fleet's does.
        (Layout("sliding", 65, 4), (24,), 20),
        (Layout("state", 0, 4), (24, 20), 16),
    ],
)
def test_what_each_kind_needs(layout: Layout, gone: tuple[int, ...], expected: int) -> None:
    given = of(layout)
    assert hit(given) == 24
    drops(given, 1, *gone)
    assert hit(given) == expected


def test_every_group_must_serve_it() -> None:
    given = of(Layout("sliding", 40, 1), Layout("sliding", 40, 1), Layout("state", 0, 2))
    drops(given, 1, 24)
    assert hit(given) == 22
    drops(given, 2, 21)
    drops(given, 3, 20)
    assert hit(given) == 18
    assert hit(given, limit=17) == 16


def test_a_node_that_tells_of_no_group_is_not_limited() -> None:
    given = of()
    assert given.state.nodes["a"].groups is None
    assert (hit(given), given.state.caches.groups.by_model) == (24, {})


def test_a_group_without_blocks_serves_nothing_until_it_has_some() -> None:
    given = of()
    epoch = given.state.nodes["a"].epoch
    given.put("cache", "a", types.GroupStored("a", epoch, 1, 7, "sliding", b"", 40))
    assert hit(given) == 0
    given.put("cache", "a", types.GroupStored("a", epoch, 2, 7, "sliding", pack_hashes([9, 10, 11]), 40))
    assert hit(given) == 11
    # What it is told to be anew holds nothing yet.
    given.put("cache", "a", types.GroupStored("a", epoch, 3, 7, "state", b""))
    assert hit(given) == 0


def test_what_clears_the_cache_clears_its_groups() -> None:
    given = of(Layout("sliding", 65, 1))
    given.put("cache", "a", types.CacheCleared("a", given.state.nodes["a"].epoch))
    given.stores("a", *CHAINS[0])
    assert hit(given) == 0
    assert given.state.nodes["a"].groups is not None


def test_before_its_format_nobody_takes_it() -> None:
    given = Given()
    epoch = given.node(registered("a"))
    event = types.GroupStored("a", epoch, 1, 1, "state")
    assert given.put("cache", "a", event) == "unknown_type"
    given.put("control", "", types.FormatRaised(FORMAT))
    assert given.put("cache", "a", event) is None
    assert given.put("cache", "a", types.GroupStored("a", epoch + 1, 1, 1, "state")) == "stale_epoch"


def test_a_group_can_hold_no_more_than_the_node() -> None:
    given = Given()
    given.put("control", "", types.FormatRaised(FORMAT))
    epoch = given.node(registered("a", capacity=5))
    for start in (0, 6):
        blocks = pack_hashes(range(start, start + 6))
        assert given.put("cache", "a", types.GroupStored("a", epoch, 1, 1, "state", blocks)) is None
    assert given.put("cache", "a", types.GroupStored("a", epoch, 1, 1, "state", pack_hashes([99]))) == "capacity"
    assert given.put("cache", "a", types.GroupStored("a", epoch, 1, 2, "state", pack_hashes([99]))) is None
    given.node(registered("b", mode="managed"))
    managed = types.GroupStored("b", given.state.nodes["b"].epoch, 1, 1, "state")
    assert given.put("cache", "b", managed) == "wrong_mode"


def test_what_a_group_holds_is_in_the_digest() -> None:
    one, two = of(Layout("sliding", 40, 1)), of(Layout("sliding", 40, 1))
    assert digest(one.state) == digest(two.state)
    drops(one, 1, 3)
    drops(two, 1, 4)
    assert digest(one.state) != digest(two.state)
    other = of(Layout("sliding", 41, 1))
    drops(other, 1, 3)
    assert digest(one.state) != digest(other.state)


def test_a_snapshot_without_groups_is_what_it_was() -> None:
    given = of(Layout("state", 0, 1))
    held = len(snapshot.dump(given.state))
    given.change(types.NodeRemoved, "a")
    assert given.state.caches.groups.by_model == {}
    assert len(snapshot.dump(given.state)) < held


@pytest.mark.parametrize(
    "broken",
    [
        {"owners": ["a", "a"]},
        {"owners": [None]},
        {"owners": ["nobody"]},
        {"layouts": {"a": {1: ("state", 0, 0)}}},
        {"layouts": {"a": {2: ("state", 0, 1)}}},
        {"segments": {1: [(b"12345678", b"\x02", None)]}},
    ],
)
def test_groups_that_do_not_fit_together_are_refused(broken: dict[str, Any]) -> None:

    state = of(Layout("state", 0, 1)).state
    body = snapshot_body.take(state)
    assert isinstance(body, snapshot_body.BodyWithGroups)
    part = msgspec.structs.asdict(body.groups[0]) | broken
    body.groups = [
        msgspec.convert(
            [part[name] for name in snapshot_groups.GroupsPart.__struct_fields__], snapshot_groups.GroupsPart
        )
    ]
    with pytest.raises((ValueError, LookupError)):
        snapshot_body.put(FleetState("f"), body)
