"""Decisions of the coordinator: whatever it proposes the fold accepts, and what it refuses it explains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.projections.fleet import FleetState
from kvplane.services.control import admission, commands
from kvplane.services.control import registrations as often
from kvplane.services.control.commands import Proposal
from kvplane.services.control.registrations import AT_ONCE, EVERY_SECONDS, Registrations
from kvplane.services.protocol.errors import (
    BadRequest,
    Conflict,
    NodeExists,
    NoRoom,
    ServiceFault,
    TooOften,
    UnknownModel,
)
from kvplane.services.protocol.messages import (
    AdmitRequest,
    BlocksRequest,
    NodeRequest,
    PolicyRequest,
    RegisterRequest,
    SessionRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Given:
    """A fleet of managed nodes with four blocks each."""

    def __init__(self, *nodes: str, capacity: int = 4) -> None:
        self.state = FleetState("f")
        for node in nodes:
            self.accept(commands.register(self.state, registration(node, capacity)))

    def accept(self, proposal: Proposal | None, based_on: int | None = None) -> None:
        """Commit what was proposed; the fold must accept it."""
        assert proposal is not None
        headers = None if based_on is None else {codec.BASED_ON: str(based_on)}
        body = codec.encode([proposal.event])
        message = Message(self.state.sequence + 1, proposal.subject("f"), self.state.time + 1, headers, body)
        assert self.state.apply(message).skipped is None

    def admit(self, *blocks: int, node: str = "", strategy: str = "least_loaded") -> Proposal:
        request = AdmitRequest(model="m", hashes=pack_hashes(blocks), node=node, strategy=strategy)
        proposal = admission.admit(self.state, request)
        self.accept(proposal, self.state.sequence)
        assert proposal is not None
        return proposal

    def run(self, request: str, node: str, *blocks: int) -> None:
        event = types.RequestRouted(request, "m", node, 0, len(blocks), len(blocks) * 16 + 1, pack_hashes(blocks))
        self.accept(Proposal("access", "w", event))

    def held(self, node: str) -> set[int]:
        found = self.state.nodes[node]
        return set(self.state.caches.index("m").held(found.slots["gpu"]))


def registration(node: str, capacity: int = 4, **fields: Any) -> RegisterRequest:
    usual: dict[str, Any] = {"address": "x", "models": ["m"], "block_size": 16, "capacity_blocks": {"gpu": capacity}}
    return RegisterRequest(node=node, **(usual | {"cache_mode": "managed"} | fields))


def evicted(proposal: Proposal) -> list[int]:
    return list(unpack_hashes(proposal.event.evicted))  # type: ignore[attr-defined]


def test_the_least_loaded_node_with_room_is_taken() -> None:
    given_ = Given("a", "b")
    given_.admit(1, 2, node="a")
    assert given_.admit(3).name == "b"
    given_.run("q", "b")
    assert given_.admit(4).name == "a"
    # Now `a` has no room for two without evicting, `b` has, although a request runs there.
    assert given_.admit(5, 6).name == "b"


def test_best_fit_leaves_the_least_room_over() -> None:
    given_ = Given("a", "b")
    given_.admit(1, 2, node="a")
    assert given_.admit(3, strategy="best_fit").name == "a"
    assert given_.admit(4, 5, strategy="best_fit").name == "b"


def test_the_least_recently_used_leave_first_and_children_before_parents() -> None:
    given_ = Given("a")
    given_.admit(1, 2)
    given_.admit(3, 4)
    given_.accept(admission.touch(given_.state, BlocksRequest(node="a", hashes=pack_hashes([1, 2]))))
    assert evicted(given_.admit(5)) == [4]
    assert evicted(given_.admit(6, 7)) == [3, 2]
    assert given_.held("a") == {1, 5, 6, 7}


def test_a_routed_request_uses_its_blocks() -> None:
    given_ = Given("a")
    given_.admit(1, 2)
    given_.admit(3, 4)
    given_.run("q", "a", 1, 2)
    given_.accept(Proposal("access", "w", types.RequestCompleted("q", "a")))
    assert evicted(given_.admit(5, 6)) == [4, 3]


def test_what_a_request_uses_stays_until_it_is_over() -> None:
    given_ = Given("a")
    given_.admit(1, 2, 3, 4)
    given_.run("q", "a", 1, 2, 3)
    with pytest.raises(
        NoRoom, match="2 new blocks don't fit on any of 1 nodes; on 'a' 0 of 4 are free and 3 are protected"
    ):
        given_.admit(8, 9)
    assert evicted(given_.admit(8)) == [4]
    given_.accept(Proposal("access", "w", types.RequestCompleted("q", "a")))
    assert evicted(given_.admit(9, 10, 11)) == [3, 2, 1]


def test_a_request_that_nobody_ends_protects_for_a_while_only() -> None:
    given_ = Given("a")
    given_.admit(1, 2, 3, 4)
    given_.run("q", "a", 1, 2, 3, 4)
    with pytest.raises(NoRoom):
        given_.admit(9)
    body = codec.encode([types.PolicyChanged("ttft")])
    later = given_.state.time + 16 * 60 * 10**9
    given_.state.apply(Message(given_.state.sequence + 1, "kv.f.control", later, None, body))
    assert evicted(given_.admit(9)) == [4]


def test_blocks_that_are_there_need_no_room() -> None:
    given_ = Given("a")
    given_.admit(1, 2, 3, 4)
    assert evicted(given_.admit(1, 2)) == []


def test_eviction_by_name_and_by_count() -> None:
    given_ = Given("a")
    given_.admit(1, 2, 3)
    given_.accept(admission.evict(given_.state, BlocksRequest(node="a", hashes=pack_hashes([2, 2, 77]))))
    assert given_.held("a") == {1, 3}
    given_.accept(admission.evict(given_.state, BlocksRequest(node="a", count=1)))
    assert given_.held("a") == {1}
    with pytest.raises(NoRoom, match="only 1 blocks"):
        admission.evict(given_.state, BlocksRequest(node="a", count=2))
    given_.run("q", "a", 1)
    with pytest.raises(NoRoom, match="used by running requests"):
        admission.evict(given_.state, BlocksRequest(node="a", hashes=pack_hashes([1])))


def test_nothing_to_do_is_no_proposal() -> None:
    given_ = Given("a")
    node = NodeRequest(node="a")
    assert commands.uncordon(given_.state, node) is None
    assert commands.recovered(given_.state, node) is None
    given_.accept(commands.cordon(given_.state, node))
    assert commands.cordon(given_.state, node) is None
    given_.accept(commands.lost(given_.state, node))
    assert commands.lost(given_.state, node) is None
    assert admission.touch(Given("b").state, BlocksRequest(node="b", hashes=pack_hashes([1]))) is None


def test_a_living_node_is_registered_again_only_on_purpose() -> None:
    given_ = Given("a")
    with pytest.raises(NodeExists, match="registered already"):
        commands.register(given_.state, registration("a"))
    given_.admit(1)
    given_.accept(commands.register(given_.state, registration("a", replace=True)))
    assert given_.held("a") == set()
    given_.accept(commands.lost(given_.state, NodeRequest(node="a")))
    given_.accept(commands.register(given_.state, registration("a")))


def test_what_the_fold_would_never_take_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a coordinator would decide it anew until its time is up, as if it had lost races."""
    given_ = Given("a")
    with pytest.raises(BadRequest, match="gpu; a tier can have 67,108,864 at the most"):
        commands.register(given_.state, registration("b", capacity_blocks={"gpu": 1 << 27}))
    monkeypatch.setattr(commands, "NODES_LIMIT", 1)
    with pytest.raises(Conflict, match="has 1 nodes, more it can't have"):
        commands.register(given_.state, registration("b"))
    given_.accept(commands.register(given_.state, registration("a", replace=True)))


def test_placements_go_to_managed_nodes_that_are_there() -> None:
    given_ = Given("a")
    given_.accept(commands.register(given_.state, registration("r", cache_mode="reported")))
    request = AdmitRequest(model="m", hashes=pack_hashes([1]), node="r")
    with pytest.raises(Conflict, match="reports its own cache"):
        admission.admit(given_.state, request)
    given_.accept(commands.cordon(given_.state, NodeRequest(node="a")))
    with pytest.raises(UnknownModel, match="no managed node is available"):
        given_.admit(1)
    given_.accept(commands.lost(given_.state, NodeRequest(node="a", reason="fire")))
    with pytest.raises(Conflict, match="is lost \\(fire\\)"):
        given_.admit(1, node="a")


steps = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "run", "complete", "evict", "touch"]),
        st.sampled_from(["", "a", "b"]),
        st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True),
    ),
    max_size=40,
)


@given(steps, st.integers(1, 6), st.sampled_from(sorted(admission.STRATEGIES)))
def test_what_is_proposed_is_accepted_and_never_exceeds_capacity(
    todo: list[tuple[str, str, list[int]]], capacity: int, strategy: str
) -> None:
    given_ = Given("a", "b", capacity=capacity)
    for step, node, blocks in todo:
        where = node or "a"
        try:
            if step == "admit":
                given_.admit(*blocks, node=node, strategy=strategy)
            elif step == "run":
                given_.run(f"{where}{blocks[0]}", where, *blocks)
            elif step == "complete":
                given_.accept(Proposal("access", "w", types.RequestCompleted(f"{where}{blocks[0]}", where)))
            else:
                decide = admission.evict if step == "evict" else admission.touch
                proposal = decide(given_.state, BlocksRequest(node=where, hashes=pack_hashes(blocks)))
                if proposal is not None:
                    given_.accept(proposal, given_.state.sequence)
        except ServiceFault as error:
            assert len(str(error)) > 20  # noqa: PT017 - any other error fails the test by itself
        for name in ("a", "b"):
            assert len(given_.held(name)) <= capacity
            assert given_.held(name) == set(given_.state.recency[name].order)


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 65537},
        {"address": "x" * 513},
        {"engine": "x" * 513},
        {"max_active": (1 << 53) + 1},
        {"capacity_blocks": {"gpu": (1 << 53) + 1}},
        {"labels": {"": "x"}},
        {"models": [f"m{number}" for number in range(65)]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_registration_that_the_log_would_not_take_is_refused_before_it_is_written(fields: dict[str, Any]) -> None:
    """Otherwise it is committed, skipped by every replica, committed again, and the caller gets a conflict."""
    with pytest.raises(BadRequest):
        commands.register(FleetState("f"), registration("a", **fields))


def test_reasons_and_parameters_of_any_length_are_refused_or_accepted_by_the_fold() -> None:
    long = "x" * 600
    given_ = Given("a")
    given_.accept(Proposal("session", "m", types.SessionAssigned("s", "m", "a")))
    proposals: list[Callable[[], Proposal | None]] = [
        lambda: commands.cordon(given_.state, NodeRequest(node="a", reason=long)),
        lambda: commands.lost(given_.state, NodeRequest(node="a", reason=long)),
        lambda: commands.remove(given_.state, NodeRequest(node="a", reason=long)),
        lambda: commands.end_session(given_.state, SessionRequest(model="m", session="s", reason=long)),
        lambda: commands.set_policy(given_.state, PolicyRequest(policy="ttft", parameters={"x" * 129: 1.0})),
    ]
    skipped = []
    for propose in proposals:
        try:
            proposal = propose()
        except ServiceFault:
            continue
        assert proposal is not None
        message = Message(given_.state.sequence + 1, proposal.subject("f"), 1, None, codec.encode([proposal.event]))
        skipped.append((type(proposal.event).__name__, given_.state.apply(message).skipped))
    assert [name for name, reason in skipped if reason is not None] == []


def test_what_is_malformed_is_refused_with_a_sentence() -> None:
    given_ = Given("a")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"cache_mode": "shared"}, "must be managed or reported"),
        ({"block_size": 0}, "at least 1 token"),
        ({"max_active": -1}, "must not be negative"),
        ({"pulse_seconds": 4000}, "from 0 to 3600"),
        ({"models": []}, "at least one model"),
        ({"models": ["m", "m"]}, "twice"),
        ({"models": ["a\nb"]}, "can't be printed"),
        ({"capacity_blocks": {"cpu": 1}}, "tier gpu"),
    ]
    for fields, sentence in refusals:
        with pytest.raises(BadRequest, match=sentence):
            commands.register(given_.state, registration("b", **fields))
    with pytest.raises(BadRequest, match="node is empty"):
        commands.register(given_.state, registration(""))
    with pytest.raises(Conflict, match="must have one block size"):
        commands.register(given_.state, registration("b", block_size=32))
    with pytest.raises(BadRequest, match="names a block twice"):
        given_.admit(1, 1)
    with pytest.raises(BadRequest, match="hashes is empty"):
        given_.admit()
    with pytest.raises(BadRequest, match="strategy 'worst'"):
        given_.admit(1, strategy="worst")
    for both in (BlocksRequest(node="a"), BlocksRequest(node="a", hashes=bytes(8), count=1)):
        with pytest.raises(BadRequest, match="either hashes or count"):
            admission.evict(given_.state, both)


def test_a_fleet_has_no_more_models_than_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MODELS_LIMIT", 2)
    ground = Given("a")
    ground.accept(commands.register(ground.state, registration("b", models=["n"])))
    with pytest.raises(Conflict, match="the fleet has 2 models with caches of their own"):
        commands.register(ground.state, registration("c", models=["o"]))
    ground.accept(commands.register(ground.state, registration("c", models=["n", "o"])))
    # The last node of a model takes its index with it.
    ground.accept(commands.register(ground.state, registration("a", models=["n"], replace=True)))
    ground.accept(commands.register(ground.state, registration("d", models=["o"])))


def test_a_node_registers_often_and_not_for_ever() -> None:
    registrations = Registrations()
    for _ in range(AT_ONCE):
        registrations.register("a", 100.0)
    for now in (100.0, 100.0 + EVERY_SECONDS / 2):
        with pytest.raises(TooOften, match=f"has registered {AT_ONCE} times"):
            registrations.register("a", now)
    registrations.register("b", 100.0)
    registrations.register("a", 100.0 + EVERY_SECONDS)
    with pytest.raises(TooOften):
        registrations.register("a", 100.0 + EVERY_SECONDS)
    later = 100.0 + (AT_ONCE + 2) * EVERY_SECONDS
    for _ in range(AT_ONCE):
        registrations.register("a", later)
    with pytest.raises(TooOften):
        registrations.register("a", later)


def test_not_every_node_that_ever_registered_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(often, "NAMES_LIMIT", 3)
    registrations = Registrations()
    for number in range(10):
        registrations.register(f"n{number}", 1.0)
    assert list(registrations._full) == ["n7", "n8", "n9"]
