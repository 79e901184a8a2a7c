"""Dynamo's own selector behind the desk of a `World`: it decides as it says, and alike each time."""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvplane.events import types
from kvplane.events.codec import Commit
from kvplane.events.hashing import pack_hashes
from kvplane.events.subjects import place_of, subject
from kvplane.services.protocol.errors import BadRequest, NoNode, Overloaded, UnknownModel
from kvplane.services.routing.query import Query
from kvplane.services.simulation.peer import PARAMETERS, PeerDesk, Selector
from kvplane.services.simulation.trace import Work
from kvplane.services.simulation.world import Change, Outcome, Settings, World
from tests.support.fold_given import Given, registered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvplane.projections.fleet import FleetState
    from kvplane.services.routing.decide import Decision

SIZE = 16
OTHER = {"prefill_load_scale": 2.0, "kv_overlap_score_credit": 0.5, "decode_active_request_weight": 3.0}

installed = pytest.mark.skipif(
    find_spec("dynamo") is None or find_spec("zmq") is None, reason="ai-dynamo-runtime and pyzmq are not installed"
)


class Desk:
    """A fleet's log, and the peer that reads it."""

    def __init__(self) -> None:
        self.given = Given()
        self.peer = PeerDesk(self.given.state, "r")
        self.count = 0

    def put(self, topic: str, name: str, event: types.Event) -> None:
        assert self.given.put(topic, name, event) is None  # type: ignore[arg-type]
        message = self.given.messages[-1]
        place = place_of("f", subject("f", topic, name))  # type: ignore[arg-type]
        assert place is not None
        self.peer.observe(Commit(place, [event], "", 0, None), message.time, message.time)

    def node(self, *names: str, most: int = 0) -> None:
        for name in names:
            self.put("node", name, registered(name, size=SIZE, capacity=1000, most=most))

    def stores(self, node: str, *blocks: int, parent: int | None = None) -> None:
        epoch = self.given.state.nodes[node].epoch
        self.put("cache", node, types.BlocksStored(node, epoch, 1, pack_hashes(blocks), parent))

    def drops(self, node: str, *blocks: int) -> None:
        epoch = self.given.state.nodes[node].epoch
        self.put("cache", node, types.BlocksRemoved(node, epoch, 1, pack_hashes(blocks)))

    def query(self, *blocks: int, model: str = "m", exclude: Sequence[str] = (), name: str = "") -> Query:
        self.count += 1
        tokens = len(blocks) * SIZE + 5
        name = name or f"q{self.count}"
        return Query(name, model, pack_hashes(blocks), tokens, len(blocks), SIZE, "", frozenset(exclude))

    def decide(self, *blocks: int, exclude: Sequence[str] = ()) -> Decision:
        return self.peer.decide(self.query(*blocks, exclude=exclude), self.given.now)

    def routes(self, query: Query) -> str:
        decision = self.peer.decide(query, self.given.now)
        routed, assigned = self.peer.count_in(query, decision, self.given.now, self.given.state.sequence)
        assert (routed.node, routed.policy, assigned) == (decision.node.name, "dynamo", None)
        return routed.node


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.peer.close()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(BadRequest, match=r"pip install 'kvplane\[peers\]'"):
        Selector()
    assert dict(os.environ) == before


@installed
def test_a_prefix_attracts(desk: Desk) -> None:
    desk.node("a", "b", "c")
    desk.stores("b", *range(10))
    found = desk.decide(*range(10), 77)
    assert (found.node.name, found.match, found.kind) == ("b", 10, "prefix")
    desk.stores("c", *range(12))
    assert desk.decide(*range(12)).node.name == "c"
    desk.drops("c", *range(5, 12))
    desk.stores("b", 10, 11, parent=9)
    found = desk.decide(*range(12))
    assert (found.node.name, found.match, found.kind) == ("b", 12, "exact")
    desk.put("cache", "b", types.CacheCleared("b", desk.given.state.nodes["b"].epoch))
    found = desk.decide(*range(12))
    assert (found.node.name, found.match) == ("c", 5)


@installed
def test_a_match_is_no_longer_than_what_a_request_can_use(desk: Desk) -> None:
    desk.node("a")
    desk.stores("a", *range(4))
    query = desk.query(*range(4))._replace(tokens=4 * SIZE, blocks=3)
    assert desk.peer.decide(query, 0).match == 3


@installed
def test_hashes_use_all_64_bits(desk: Desk) -> None:
    desk.node("a", "b")
    chain = [(1 << 64) - 1, 1 << 63, (1 << 63) - 1, 1 << 32]
    desk.stores("b", *chain)
    found = desk.decide(*chain, 0)
    assert (found.node.name, found.match) == ("b", 4)


@installed
def test_load_repels_until_prompts_are_computed_and_answers_end(desk: Desk) -> None:
    desk.node("a", "b")
    desk.stores("b", *range(10))
    first, second = desk.query(*range(10), 20, 21, name="x"), desk.query(*range(10), 30, 31, 32, 33, name="y")
    assert [desk.routes(first), desk.routes(second)] == ["b", "b"]
    # b: 2 + 4 blocks to compute and 16 in use; a would have to compute all of it.
    longer = range(100, 130)
    assert {desk.decide(*longer).node.name for _ in range(4)} == {"a"}
    assert desk.routes(desk.query(*range(200, 240), name="z")) == "a"
    assert desk.decide(*longer).node.name == "b"
    for request in ("x", "y", "z"):
        desk.peer.computed(request, 0)
    assert desk.decide(*longer).node.name == "b"
    desk.put("access", "a", types.RequestCompleted("z", "a"))
    assert desk.decide(*longer).node.name == "a"
    desk.peer.computed("nobody's", 0)
    desk.put("access", "a", types.RequestCompleted("nobody's", "a"))


@installed
def test_ties_are_broken_by_request_and_evenly(desk: Desk) -> None:
    desk.node("a", "b", "c", "d")
    queries = [desk.query(1, 2, 3) for _ in range(200)]
    first, second = ([desk.peer.decide(query, 0).node.name for query in queries] for _ in range(2))
    assert first == second
    assert min(Counter(first).values()) > 30


@installed
def test_who_is_excluded_lost_or_cordoned_is_not_chosen(desk: Desk) -> None:
    with pytest.raises(UnknownModel):
        desk.decide(1)
    desk.node("a", "b", "c")
    desk.stores("a", *range(10))
    assert desk.decide(*range(10)).node.name == "a"
    assert desk.decide(*range(10), exclude=["a", "b"]).node.name == "c"
    with pytest.raises(NoNode):
        desk.decide(1, exclude=["a", "b", "c"])
    desk.put("node", "b", types.NodeCordoned("b"))
    desk.put("node", "a", types.NodeLost("a"))
    assert {desk.decide(*range(10)).node.name for _ in range(9)} == {"c"}
    desk.put("node", "c", types.NodeRemoved("c"))
    with pytest.raises(NoNode):
        desk.decide(1)
    desk.put("node", "a", types.NodeRecovered("a"))
    found = desk.decide(*range(10))
    assert (found.node.name, found.match) == ("a", 0)


@installed
def test_a_request_that_comes_again_counts_once(desk: Desk) -> None:
    desk.node("a", "b", most=1)
    query = desk.query(1, 2, 3)
    first = desk.routes(query)
    second = desk.routes(query._replace(exclude=frozenset([first])))
    assert {first, second} == {"a", "b"}
    assert desk.routes(desk.query(1, 2, 3, name="other")) == first
    with pytest.raises(Overloaded):
        desk.decide(1)
    desk.put("node", second, types.NodeLost(second))
    desk.put("access", second, types.RequestCompleted(query.id, second))
    desk.node(second)
    assert desk.decide(1).node.name == second


@installed
def test_blocks_that_cannot_be_told_are_refused(desk: Desk) -> None:
    with pytest.raises(BadRequest):
        desk.put("node", "a", registered("a", size=2, models=["small"]))
    desk.node("b")
    with pytest.raises(BadRequest):
        desk.put("node", "c", registered("c", size=32, models=["other"]))


@installed
@pytest.mark.parametrize("settings", [{}, OTHER])
def test_the_cost_that_is_written_down_is_the_one_that_decides(settings: dict[str, float]) -> None:
    rng = random.Random(1)
    scale, credit, weight = (settings.get(name, known.default) for name, known in PARAMETERS.items())
    names = ["a", "b", "c", "d"]
    held: dict[str, set[int]] = {name: set() for name in names}
    running: dict[str, tuple[str, list[int], float]] = {}
    selector = Selector(settings)
    for name in names:
        selector.add(name, SIZE)
    for number in range(300):
        document = rng.randrange(12)
        chain = [document * 100 + at for at in range(rng.randint(1, 12))]
        chain += [10_000 + number * 100 + at for at in range(rng.randint(0, 9))]
        tokens = len(chain) * SIZE + rng.randrange(SIZE)
        costs, found = {}, {}
        for name in names:
            here = [one for one in running.values() if one[0] == name]
            match = next((at for at, block in enumerate(chain) if block not in held[name]), len(chain))
            new = (sum(left for _, _, left in here) + tokens) / SIZE
            blocks = set(chain).union(*(blocks for _, blocks, _ in here))
            costs[name] = scale * max(0.0, new - credit * match) + len(blocks) + weight * len(here)
            found[name] = match
        chosen, match = selector.select(f"r{number}", pack_hashes(chain), tokens, names)
        assert costs[chosen] == pytest.approx(min(costs.values()))
        assert match == found[chosen]
        selector.book(f"r{number}")
        running[f"r{number}"] = (chosen, chain, tokens - match * SIZE)
        selector.store(chosen, chain[match:], chain[match - 1] if match else None)
        held[chosen] |= set(chain)
        while len(running) > 12:
            over = rng.choice([*running])
            node, blocks_used, left = running[over]
            if left:
                selector.computed(over)
                running[over] = (node, blocks_used, 0.0)
            else:
                selector.free(over)
                del running[over]
    selector.close()


def work(count: int) -> list[Work]:
    """Turns of conversations, as blocks."""
    rng = random.Random(2)
    chains: dict[int, list[int]] = {}
    made = []
    for number in range(count):
        session = rng.randrange(20)
        chain = chains.setdefault(session, [1, 2, 3])
        chain += [1000 * (number + 1) + at for at in range(rng.randint(1, 8))]
        hashes = pack_hashes(chain)
        made.append(Work(hashes, len(chain) * 64 + rng.randrange(64), rng.randint(1, 60), "", number * 0.03))
    return made


class Watched(PeerDesk):
    """Compares each decision with the fold: both see the same events of blocks."""

    def __init__(self, state: FleetState, name: str) -> None:
        super().__init__(state, name)
        self.folded = state

    def decide(self, query: Query, now: int) -> Decision:
        decision = super().decide(query, now)
        index = self.folded.caches.index(decision.node.model)
        assert decision.match == index.match(query.hashes, query.blocks)[decision.node.slots["gpu"]]
        return decision


def simulate(desk: type[PeerDesk] = PeerDesk, **settings: object) -> Outcome:
    chosen = Settings(nodes=3, block_size=64, capacity=300, policy="dynamo", **settings)  # type: ignore[arg-type]
    return World(chosen, work(300), desk).run()


@installed
def test_a_fleet_runs_with_it_and_twice_the_same() -> None:
    first, second = simulate(Watched), simulate()
    assert len(first.served) == 300
    assert {served.node for served in first.served} == {0, 1, 2}
    assert sum(served.cached for served in first.served) > 0
    assert (first.served, first.busy) == (second.served, second.busy)


@installed
def test_a_node_that_failed_serves_nothing_and_one_that_joins_does() -> None:
    changes = (Change(2.0, "node-2", joins=False), Change(4.0, "node-2", joins=True))
    outcome = simulate(changes=changes, detection=1.0)
    assert len(outcome.served) == 300
    assert outcome.retried
    assert max(served.end for served in outcome.served if served.node == 1) <= 2.0
    assert min(served.arrival for served in outcome.served if served.node == 3) >= 4.0


@installed
@pytest.mark.parametrize(
    "parameters", [{"temperature": 0.0}, {"prefill_load_scale": -1.0}, {"prefill_load_scale": math.nan}]
)
def test_bad_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(BadRequest):
        Selector(parameters)


@installed
def test_too_few_files_are_an_error_and_not_the_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, 100))
    desk.node("a", "b")
    with pytest.raises(BadRequest, match="ulimit"):
        desk.node("c")


@installed
def test_nothing_is_left_open() -> None:
    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    simulate()
    before = files()
    for _ in range(3):
        simulate()
    # One that is left open holds more than 60. Dynamo's own threads end in their own time.
    assert files() < before + 30
