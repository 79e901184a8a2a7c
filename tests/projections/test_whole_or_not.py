"""A commit is applied whole or not at all: what is skipped leaves no trace, and a process that fails is of no use any more.

The machine writes commits of all kinds of events, mixed, stale, forged and broken. Whenever one is skipped, the state must
be the one that bytes which mean nothing would have left, at the same sequence, on the same subject, at the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from msgspec.structs import replace

from kvplane.events import codec, types, versions
from kvplane.events.codec import Message
from kvplane.events.errors import NewerFormat
from kvplane.events.hashing import pack_hashes
from kvplane.events.subjects import subject
from kvplane.projections import fleet as rules
from kvplane.projections import snapshot_body
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadSnapshot, Unusable
from kvplane.projections.fleet import FleetState
from kvplane.projections.load import Load
from kvplane.projections.prefix import PrefixIndex
from kvplane.projections.recency import Recency
from kvplane.projections.snapshot import dump, load
from tests.support.fold_given import SECOND, START, Given, headers_of, registered, two_nodes

if TYPE_CHECKING:
    from collections.abc import Callable

NEWEST = versions.FORMAT + 1
"""The newest format that the machine's kvplane knows."""

nodes = st.sampled_from(["a", "b", "c"])
epochs = st.integers(1, 3) | st.just(0)
blocks = st.lists(st.integers(1, 9), max_size=5).map(pack_hashes)
parents = st.none() | st.integers(1, 9)
tiers = st.sampled_from(types.TIERS)
models = st.sampled_from(["m", "n"])
requests = st.sampled_from(["q", "r"])
FIELDS: dict[type[types.Event], dict[str, st.SearchStrategy[Any]]] = {
    types.NodeRegistered: {
        "node": nodes, "address": st.just(""), "models": st.sampled_from([["m"], ["n", "m"]]),
        "block_size": st.sampled_from([16, 16, 16, 32]), "capacity_blocks": st.integers(1, 5).map(lambda n: {"gpu": n}),
        "cache_mode": st.sampled_from(["managed", "reported"]),
    },
    types.NodeCordoned: {"node": nodes},
    types.NodeUncordoned: {"node": nodes},
    types.NodeLost: {"node": nodes},
    types.NodeRecovered: {"node": nodes},
    types.NodeRemoved: {"node": nodes},
    types.BlocksStored: {
        "node": nodes, "epoch": epochs, "batch": st.just(1), "hashes": blocks, "parent": parents, "tier": tiers,
    },
    types.BlocksRemoved: {"node": nodes, "epoch": epochs, "batch": st.just(1), "hashes": blocks, "tier": tiers},
    types.BlocksPlaced: {"node": nodes, "epoch": epochs, "stored": blocks, "evicted": blocks, "parent": parents},
    types.CacheCleared: {"node": nodes, "epoch": epochs},
    types.GroupStored: {
        "node": nodes, "epoch": epochs, "batch": st.just(1), "group": st.integers(0, 2),
        "kind": st.sampled_from(["full", "sliding", "chunked", "state"]), "hashes": blocks, "window": st.just(32),
        "span": st.integers(1, 2),
    },
    types.GroupRemoved: {
        "node": nodes, "epoch": epochs, "batch": st.just(1), "group": st.integers(0, 2), "hashes": blocks,
    },
    types.SessionAssigned: {"session": st.sampled_from("st"), "model": models, "node": nodes},
    types.SessionEnded: {"session": st.sampled_from("st"), "model": models},
    types.RequestRouted: {
        "request": requests, "model": models, "node": nodes, "match": st.integers(0, 2), "blocks": st.integers(0, 3),
        "tokens": st.integers(0, 99), "session": st.sampled_from(["", "s"]),
    },
    types.RequestCompleted: {"request": requests, "node": nodes},
    types.RequestHeld: {"request": requests, "model": models, "tokens": st.integers(0, 99)},
    types.RequestReleased: {"request": requests, "model": models, "reason": st.sampled_from(["room", "left"])},
    types.PolicyChanged: {
        "policy": st.sampled_from(["ttft", "cascade"]), "parameters": st.sampled_from([{}, {"hold": 1.0}]),
    },
    types.FormatRaised: {"format": st.integers(2, NEWEST)},
}  # fmt: skip
TOPICS = {
    topic: st.one_of(*(st.builds(kind, **FIELDS[kind]) for kind in get_args(union)))
    for topic, union in codec._UNIONS.items()
}


def test_the_machine_knows_every_event() -> None:
    assert FIELDS.keys() == set(types.Event.__subclasses__())
    for kind, fields in FIELDS.items():
        needed = set(kind.__struct_fields__[: len(kind.__struct_fields__) - len(kind.__struct_defaults__)])
        assert needed <= fields.keys() <= set(kind.__struct_fields__)


class SkipMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for reader in (rules, snapshot_body):
            self.patch.setattr(reader, "FORMAT", NEWEST)
        self.state = FleetState("f")
        self.number = 0

    def teardown(self) -> None:
        self.patch.undo()

    @initialize(mode=st.sampled_from(["managed", "reported"]))
    def begin(self, mode: Any) -> None:
        for event in (registered("a", mode=mode, capacity=5), registered("b", capacity=5)):
            self.deliver(subject("f", "node", event.node), codec.encode([event]), {})

    def deliver(self, where: str, body: bytes, headers: dict[str, str]) -> None:
        sequence = self.state.sequence + 1
        message = Message(sequence, where, START + sequence * SECOND, headers or None, body)
        before = load("f", dump(self.state, known_digest=""))
        if self.state.apply(message).skipped is None:
            return
        before.apply(message._replace(headers=None, body=b""))
        # A skip is counted, and its writer's number is used up; nothing else.
        before.skipped = dict(self.state.skipped)
        own = (where, headers.get(codec.WRITER, ""))
        counters = {key: number for key, number in self.state.writers.items() if key != own}
        assert counters == {key: number for key, number in before.writers.items() if key != own}
        before.writers = dict(self.state.writers)
        # What a node wrote counts, whatever became of it.
        others = {name: full for name, full in self.state.allowances.items() if name != where}
        assert others == {name: full for name, full in before.allowances.items() if name != where}
        before.allowances = self.state.allowances
        assert digest(self.state) == digest(before)

    @rule(
        data=st.data(), topic=st.sampled_from(list(TOPICS)), name=nodes, many=st.integers(1, 4),
        counter=st.sampled_from([0, 0, 0, 1, -1]), behind=st.sampled_from([None, None, 0, 1, 4]),
        mangled=st.sampled_from([*[False] * 9, True]),
    )  # fmt: skip
    def write(
        self, data: st.DataObject, topic: Any, name: str, many: int, counter: int, behind: int | None, mangled: bool
    ) -> None:
        events = data.draw(st.lists(TOPICS[topic], min_size=1, max_size=many))
        if topic in {"node", "cache"}:
            # Mostly they speak for the node of their subject, as of the life that it has.
            known = self.state.nodes.get(name)
            life = {"epoch": known.epoch} if known is not None and topic == "cache" and data.draw(st.booleans()) else {}
            events = [replace(event, node=name, **life) for event in events]
        elif topic == "session":
            events = [replace(event, model="m") for event in events]
        self.number += max(0, counter)
        number = 0 if not counter else max(0, self.number + min(0, counter))
        body = codec.encode(events)
        based_on = None if behind is None else max(0, self.state.sequence - behind)
        headers = headers_of(body, writer="w" if number else "", counter=number, based_on=based_on, crc=True)
        self.deliver(subject("f", topic, "w" if topic == "access" else "m" if topic == "session" else name),
                     body[:-1] if mangled else body, headers)  # fmt: skip

    @rule(data=st.data(), topic=st.sampled_from(list(TOPICS)), other=st.sampled_from(list(TOPICS)), name=nodes)
    def write_elsewhere(self, data: st.DataObject, topic: Any, other: Any, name: str) -> None:
        """Events of two topics in one commit."""
        assume(topic != other)
        events = data.draw(st.permutations([data.draw(TOPICS[topic]), data.draw(TOPICS[other])]))
        self.deliver(subject("f", topic, name), codec.encode(events), {})

    @rule(
        steps=st.lists(st.integers(-1, 2), min_size=1, max_size=3), at=st.integers(0, 3), policy=st.sampled_from("xyz")
    )
    def control(self, steps: list[int], at: int, policy: str) -> None:
        """Formats that go up, stay or go back, with a change of policy between them."""
        formats = [min(max(2, self.state.format + step), NEWEST) for step in steps]
        events: list[types.Event] = [types.FormatRaised(number) for number in formats]
        events.insert(at, types.PolicyChanged(policy))
        self.deliver("kv.f.control", codec.encode(events), {})


TestNoSkippedCommitChangesTheDigest = SkipMachine.TestCase
TestNoSkippedCommitChangesTheDigest.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize(
    "events",
    [
        [types.PolicyChanged("x"), types.FormatRaised(2)],
        [types.FormatRaised(3), types.PolicyChanged("x"), types.FormatRaised(3)],
        [types.FormatRaised(4), types.FormatRaised(3)],
    ],
)
def test_a_control_commit_that_is_skipped_for_its_last_event_changes_nothing(
    events: list[types.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "FORMAT", NEWEST)
    given = Given()
    assert given.put("control", "", types.FormatRaised(2)) is None
    assert given.put("control", "", *events) == "no_change"
    assert (given.state.format, given.state.policy) == (2, rules.DEFAULT_POLICY)
    assert given.put("control", "", types.FormatRaised(3), types.PolicyChanged("x"), types.FormatRaised(4)) is None
    assert (given.state.format, given.state.policy) == (4, "x")


def test_where_the_log_goes_on_in_a_newer_format_nothing_of_its_commit_is_applied_and_no_snapshot_is_made() -> None:
    given = Given()
    for _ in range(2):
        with pytest.raises(NewerFormat, match="from commit 1 on .* is in format 99"):
            given.put("control", "", types.PolicyChanged("x"), types.FormatRaised(99))
    assert given.state.policy == rules.DEFAULT_POLICY
    with pytest.raises(BadSnapshot, match="from commit 1 on"):
        dump(given.state)


def test_a_format_that_would_not_be_raised_stops_nobody() -> None:
    """Those who know it skip the commit, so those who don't can."""
    given = Given()
    events = [types.FormatRaised(99), types.FormatRaised(99)]
    assert given.put("control", "", *events) == "no_change"


OWN_FAILURES = [MemoryError(), RecursionError("stack"), OSError(12, "Cannot allocate memory"), BufferError("exported"),
                SystemError("lost"), KeyboardInterrupt(), SystemExit(1)]  # fmt: skip


def _stores(given: Given) -> None:
    given.stores("a", 7, 8)


def _routes(given: Given) -> None:
    given.routes("q", "a", 1)


@pytest.mark.parametrize("failure", OWN_FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize(
    ("part", "method", "act"),
    [
        (PrefixIndex, "store", _stores),
        (Load, "routed", _routes),
        (Load, "expired", _routes),
        (Recency, "use", lambda given: given.places("m", 3)),
        (FleetState, "_check_writer", _stores),
        (codec, "validate", _stores),
    ],
)
def test_a_failure_of_this_process_is_not_taken_for_one_of_the_commit(
    part: Any, method: str, act: Callable[[Given], object], failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = two_nodes()
    given.node(registered("m", mode="managed"))

    def fail(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(part, method, fail)
        expected = Unusable if isinstance(failure, Exception) else type(failure)
        with pytest.raises(expected):
            act(given)
    assert given.state.skipped == {}
    # And it stays so: nothing is applied to half a commit, redeliveries included, and no snapshot spreads it.
    sentence = rf"failed while it applied commit {len(given.messages)} \({type(failure).__name__}"
    for again in (act, lambda given: given.state.apply(given.messages[0])):
        with pytest.raises(Unusable, match=sentence):
            again(given)
    with pytest.raises(BadSnapshot, match=sentence):
        dump(given.state)


@pytest.mark.parametrize("defect", rules.DEFECTS)
def test_a_defect_that_every_replica_has_is_skipped_by_each(
    defect: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = two_nodes()

    def fail(*_: object, **__: object) -> None:
        raise defect("wrong")

    with monkeypatch.context() as patch:
        patch.setattr(Load, "routed", fail)
        assert given.routes("q", "a", 1) == "defect"
    assert given.stores("a", 4) is None
    assert given.state.skipped == {"defect": 1}
