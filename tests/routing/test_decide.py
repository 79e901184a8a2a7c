"""Decisions: who is never chosen, that equal questions have equal answers, and what a bad policy can't break."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.hashing import pack_hashes
from kvplane.projections.digest import digest
from kvplane.services.protocol.errors import NoNode, Overloaded, ServiceFault, UnknownModel
from kvplane.services.routing import policies
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import PREDICTION_SECONDS, Overlay
from kvplane.services.routing.policies import POLICIES, Policy
from kvplane.services.routing.query import Query
from tests.support.odd_policies import KEPT
from tests.support.routing_given import CHAIN, NOW, Given, Parameters

if TYPE_CHECKING:
    from kvplane.services.routing.view import Request, View

policies.allow(["tests.support.odd_policies"])


STATES = ["up", "cordoned", "lost", "removed", "full", "other model"]


@given(st.lists(st.tuples(st.sampled_from(STATES), st.integers(0, 32), st.integers(0, 3)), min_size=1, max_size=8),
       st.sampled_from(sorted(POLICIES)), st.text(max_size=5))  # fmt: skip
def test_only_a_node_that_may_be_chosen_is_chosen(nodes: list[tuple[str, int, int]], policy: str, request: str) -> None:
    given_ = Given()
    for number, (state, held, active) in enumerate(nodes):
        name = f"n{number}"
        given_.node(name, model="other" if state == "other model" else "m", most=2 if state == "full" else 0)
        if held:
            given_.holds(name, held)
        given_.runs(name, 2 if state == "full" else active)
        change = {"cordoned": types.NodeCordoned, "lost": types.NodeLost, "removed": types.NodeRemoved}.get(state)
        if change is not None:
            given_.put(f"node.{name}", change(name))
    given_.policy(policy)
    allowed = {f"n{number}" for number, (state, _, _) in enumerate(nodes) if state == "up"}
    try:
        decision = given_.decide(request)
    except ServiceFault:
        assert not allowed
        return
    assert decision.node.name in allowed
    assert {decision.node.name, *decision.fallbacks} <= allowed
    assert len(set(decision.fallbacks)) == len(decision.fallbacks) == min(3, len(allowed) - 1)
    assert decision == given_.decide(request)


def test_the_three_refusals_are_told_apart() -> None:
    given_ = Given()
    with pytest.raises(UnknownModel):
        given_.decide()
    given_.node("a", most=1)
    with pytest.raises(NoNode, match="excluded"):
        given_.decide(exclude=("a",))
    given_.runs("a", 1)
    with pytest.raises(Overloaded):
        given_.decide()
    given_.put("node.a", types.NodeCordoned("a"))
    with pytest.raises(NoNode, match="no node of model .* is available: all 1 cordoned"):
        given_.decide()


def test_own_decisions_count_against_the_limit_before_the_log_says_so() -> None:
    given_ = Given()
    given_.node("a", most=1)
    at = given_.state.load.ordinal["a"]
    given_.overlay.decided(types.RequestRouted("first", "m", "a", 0, 0, 0), at, 16, NOW)
    with pytest.raises(Overloaded):
        given_.decide()
    given_.overlay.on_log("first")
    assert given_.decide().node.name == "a"


@pytest.mark.parametrize("policy", ["cascade", "ttft"])
def test_the_longest_match_wins_among_equals(policy: str) -> None:
    given_ = Given()
    for number, held in enumerate([0, 20, 32, 31]):
        given_.node(f"n{number}")
        if held:
            given_.holds(f"n{number}", held)
    given_.policy(policy)
    decision = given_.decide()
    assert (decision.node.name, decision.kind, decision.match) == ("n2", "exact", 32)
    assert decision.fallbacks == ["n3", "n1", "n0"]
    assert given_.decide(exclude=("n2",)).kind == "prefix"


def test_the_last_token_is_always_computed() -> None:
    given_ = Given()
    given_.node("a")
    given_.holds("a", 32)
    query = Query("q", "m", pack_hashes(CHAIN), 32 * 16, 31, 16)
    decision = given_.chooser.decide(query, NOW)
    assert (decision.match, decision.kind) == (31, "exact")


def test_queued_prefill_sends_a_request_past_its_match() -> None:
    """Half a second of queue costs more than 512 cached tokens save at 8,000 tokens a second."""
    given_ = Given()
    given_.node("idle")
    given_.node("busy")
    given_.holds("busy", 32)
    assert given_.decide().node.name == "busy"
    given_.put("access.w", types.RequestRouted("big", "m", "busy", 0, 0, 4000))
    assert given_.decide().node.name == "idle"
    given_.put("access.w", types.RequestCompleted("big", "busy"))
    assert given_.decide().node.name == "busy"


def test_a_faster_node_is_worth_more() -> None:
    given_ = Given()
    given_.node("slow", prefill_tokens_per_s="1000")
    given_.node("fast", prefill_tokens_per_s="9000")
    assert given_.decide().node.name == "fast"


def test_a_match_goes_on_in_a_slower_tier() -> None:
    given_ = Given()
    given_.node("gpu")
    given_.holds("gpu", 16)
    given_.node("both")
    given_.holds("both", 16)
    given_.holds("both", 32, start=16, tier="cpu")
    decision = given_.decide()
    assert (decision.node.name, decision.match, decision.kind) == ("both", 32, "exact")
    # A node that has it all on the GPU is still better.
    given_.node("best")
    given_.holds("best", 32)
    assert given_.decide().node.name == "best"


def test_a_session_stays_moves_and_is_new() -> None:
    given_ = Given()
    given_.node("a")
    given_.node("b")
    first = given_.decide(session="s")
    assert first.session == "new"
    given_.put("session.m", types.SessionAssigned("s", "m", "a"))
    assert (given_.decide("x", session="s").node.name, given_.decide("y", session="s").session) == ("a", "kept")
    given_.put("node.a", types.NodeLost("a"))
    moved = given_.decide(session="s")
    assert (moved.node.name, moved.session, moved.moved_from) == ("b", "moved", "a")


LONG = [*range(1, 501)]
"""A prefix of 8,000 tokens."""


def burst(given_: Given, count: int, *, predict: bool) -> Counter[str]:
    """Requests with one prefix that come faster than any node can report; how many went to each node."""
    nodes: Counter[str] = Counter()
    for number in range(count):
        hashes = pack_hashes([*LONG, 1000 + number])
        decision = given_.chooser.decide(Query(f"r{number}", "m", hashes, 8020, 501, 16), NOW)
        nodes[decision.node.name] += 1
        event = types.RequestRouted(f"r{number}", "m", decision.node.name, decision.match, 501, 8020, hashes)
        at = given_.state.load.ordinal[decision.node.name]
        given_.overlay.decided(event, at, 16, NOW, predict="m" if predict else "")
    return nodes


def test_a_burst_with_one_prefix_does_not_scatter() -> None:
    predicted, blind = Given(), Given()
    for given_ in (predicted, blind):
        for number in range(16):
            given_.node(f"n{number}")
    nodes = burst(predicted, 50, predict=True)
    assert len(nodes) <= 4
    assert max(nodes.values()) <= 40
    assert len(burst(blind, 50, predict=False)) == 16


def test_predictions_end_with_their_node_and_with_time() -> None:
    given_ = Given()
    given_.node("a")
    burst(given_, 1, predict=True)
    assert given_.decide("x").match == 32
    given_.overlay.node_changed("a")
    assert given_.decide("x").match == 0
    assert not given_.overlay.pending
    burst(given_, 1, predict=True)
    assert given_.decide("x").match == 32
    for _ in range(2):
        given_.overlay.expire(NOW + int(2.1 * PREDICTION_SECONDS * 1e9))
    assert given_.decide("x").match == 0


@pytest.mark.parametrize(
    "name",
    [
        "raises",
        "nan",
        "plus_infinity",
        "minus_infinity",
        "short",
        "text",
        "no_such_function",
    ],
)
def test_a_policy_that_fails_is_counted_and_the_least_loaded_node_taken(name: str) -> None:
    given_ = Given()
    for node in ("a", "b", "c"):
        given_.node(node)
    given_.holds("a", 32)
    given_.runs("a", 3)
    given_.runs("b", 1)
    given_.runs("c", 2)
    given_.policy(f"tests.support.odd_policies:{name}")
    for count in (1, 2):
        decision = given_.decide()
        assert (decision.node.name, decision.policy) == ("b", "least_loaded")
        assert given_.chooser.policy_failures == count


def test_any_function_can_be_a_policy() -> None:
    given_ = Given()
    for node in ("a", "b"):
        given_.node(node)
    given_.policy("tests.support.odd_policies:first")
    decision = given_.decide()
    assert (decision.node.name, decision.policy) == ("a", "tests.support.odd_policies:first")


def test_what_a_policy_keeps_is_not_changed_by_a_decision() -> None:
    given_ = Given()
    for node in ("a", "b"):
        given_.node(node)
    given_.policy("tests.support.odd_policies:kept")
    assert given_.decide(exclude=("a",)).node.name == "b"
    assert KEPT.tolist() == [1.0, 2.0]
    assert given_.decide().node.name == "a"


def test_ties_are_spread_over_requests() -> None:
    given_ = Given()
    for number in range(4):
        given_.node(f"n{number}")
    chosen = [given_.decide(f"request {number}").node.name for number in range(400)]
    assert min(chosen.count(f"n{number}") for number in range(4)) > 60


def test_round_robin_takes_each_node_as_often() -> None:
    given_ = Given()
    for number in range(4):
        given_.node(f"n{number}")
    given_.holds("n0", 32)
    given_.policy("round_robin")
    chosen = [given_.decide(f"request {number}").node.name for number in range(400)]
    assert min(chosen.count(f"n{number}") for number in range(4)) > 60


def test_a_policy_can_not_change_the_fold() -> None:
    given_ = Given()
    given_.node("a")
    given_.runs("a", 3)

    def greedy(view: View, _request: Request, _parameters: Parameters) -> Any:
        view.active[:] = 0
        return view.active

    policies.POLICIES["greedy"] = Policy(greedy, None)
    try:
        given_.policy("greedy")
        given_.decide()
    finally:
        del policies.POLICIES["greedy"]
    load = given_.state.load.of("a")
    assert load is not None
    assert load.active == 3
    assert np.frombuffer(given_.state.load.active)[0] == 3


def test_a_policy_can_not_change_its_parameters_on_the_fold() -> None:
    """They are part of the digest: a replica that routes would fork from one that does not."""
    given_ = Given()
    given_.node("a")

    def forgetful(view: View, _request: Request, parameters: Parameters) -> Any:
        return view.active * parameters.pop("weight", 1.0)

    policies.POLICIES["forgetful"] = Policy(forgetful, None)
    try:
        given_.policy("forgetful", weight=2.0)
        before = digest(given_.state)
        given_.decide()
    finally:
        del policies.POLICIES["forgetful"]
    assert given_.state.parameters == {"weight": 2.0}
    assert digest(given_.state) == before


@given(st.lists(st.tuples(st.sampled_from(["gpu", "cpu", "disk"]), st.integers(0, 9), st.integers(1, 9)), max_size=6),
       st.integers(0, 10))  # fmt: skip
def test_a_match_is_what_lies_in_any_tier_without_a_gap_up_to_its_bound(
    parts: list[tuple[types.Tier, int, int]], bound: int
) -> None:
    given_ = Given()
    given_.node("a")
    held: set[int] = set()
    for tier, start, length in parts:
        given_.holds("a", start + length, start=start, tier=tier)
        held |= set(CHAIN[start : start + length])
    query = Query("q", "m", pack_hashes(CHAIN[:10]), 161, bound, 16)
    expected = next((at for at, block in enumerate(CHAIN[:bound]) if block not in held), bound)
    decision = given_.chooser.decide(query, NOW)
    assert decision.match == expected
    assert decision.kind == ("miss" if not expected else "exact" if expected == bound else "prefix")


changes = st.sampled_from(
    ["node", "node", "holds", "slow", "cordon", "uncordon", "lose", "recover", "remove", "runs", "policy"]
)
KINDS = {
    "cordon": types.NodeCordoned, "uncordon": types.NodeUncordoned, "lose": types.NodeLost,
    "recover": types.NodeRecovered, "remove": types.NodeRemoved,
}  # fmt: skip


@given(st.lists(st.tuples(changes, st.sampled_from("abcd"), st.integers(0, 32)), max_size=25))
def test_a_router_that_saw_all_changes_decides_like_one_that_has_just_started(
    steps: list[tuple[str, str, int]],
) -> None:
    """What a chooser keeps between decisions must follow every change of nodes, slots and policy."""
    given_ = Given()
    for number, (what, name, value) in enumerate(steps):
        known = given_.state.nodes.get(name)
        if what == "node":
            mode = "managed" if value % 5 == 0 else "reported"
            given_.node(name, model="other" if value % 7 == 0 else "m", most=value % 3, mode=mode)
        elif known is None:
            continue
        elif what in KINDS:
            body = codec.encode([KINDS[what](name)])
            given_.state.apply(Message(given_.state.sequence + 1, f"kv.f.node.{name}", NOW, None, body))
        elif what == "policy":
            given_.policy(sorted(POLICIES)[value % len(POLICIES)])
        elif what == "runs" and known.lost is None:
            given_.put("access.w", types.RequestRouted(f"{number}", "m", name, 0, 0, value * 100))
        elif not known.managed and value:
            given_.holds(name, value, tier="cpu" if what == "slow" else "gpu")
        answers: list[Any] = []
        for chooser in (given_.chooser, Chooser(given_.state, Overlay())):
            try:
                answers.append(chooser.decide(Query("q", "m", pack_hashes(CHAIN), 513, 32, 16), NOW))
            except ServiceFault as error:
                answers.append((type(error), str(error)))
        assert answers[0] == answers[1]
