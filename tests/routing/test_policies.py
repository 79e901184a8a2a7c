"""Each policy's own rule, and what can be set about it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.routing.policies import POLICIES, allow, check, policy
from kvplane.services.routing.query import Query
from tests.support.routing_given import CHAIN, NOW, Given

if TYPE_CHECKING:
    from kvplane.services.routing.decide import Decision

allow(["tests.routing.test_policies", "math"])


def fleet(**held: int) -> Given:
    """Nodes by name, each with so many leading blocks of the chain."""
    given = Given()
    for name, blocks in held.items():
        given.node(name, prefill_tokens_per_s="1000")
        if blocks:
            given.holds(name, blocks)
    return given


def decide(given: Given, name: str, session: str = "", **parameters: float) -> Decision:
    given.policy(name, **parameters)
    decision = given.decide(session=session)
    assert not given.chooser.last_failure
    return decision


def routed(given: Given, node: str, request: str, *, match: int = 0, tokens: int = 513, blocks: int = 32) -> None:
    hashes = pack_hashes(range(10_000, 10_000 + blocks))
    given.put("access.w", types.RequestRouted(request, "m", node, match, blocks, tokens, hashes))


def test_session_goes_where_the_session_is_whatever_lies_elsewhere() -> None:
    given = fleet(a=0, b=32)
    given.put("session.m", types.SessionAssigned("s", "m", "a"))
    given.runs("a", 3)
    assert decide(given, "session", "s").node.name == "a"
    assert decide(given, "session", "another").node.name == "b"


def test_threshold_follows_a_long_match_only_while_load_is_even() -> None:
    given = fleet(a=17, b=0)
    given.runs("a", 32)
    assert decide(given, "threshold").node.name == "a"
    given.put("access.w", types.RequestRouted("more", "m", "a", 0, 0, 0))
    assert decide(given, "threshold").node.name == "b"
    assert decide(given, "threshold", imbalance=33).node.name == "a"
    assert decide(given, "threshold", imbalance=33, least_match=0.6).node.name == "b"


def test_threshold_takes_the_least_loaded_when_the_match_is_short() -> None:
    given = fleet(a=16, b=0)
    given.runs("a", 1)
    assert decide(given, "threshold").node.name == "b"


def test_blocks_weighs_what_is_left_to_prefill_against_what_is_in_use() -> None:
    given = fleet(a=20, b=0)
    # 20 blocks of match are worth as much as 19 blocks in use and their prefill that is done.
    routed(given, "a", "q", blocks=19, match=19, tokens=19 * 16)
    assert decide(given, "blocks").node.name == "a"
    routed(given, "a", "r", blocks=2, match=2, tokens=2 * 16)
    assert decide(given, "blocks").node.name == "b"
    assert decide(given, "blocks", overlap_weight=2).node.name == "a"


def test_blocks_counts_prefill_that_is_not_done() -> None:
    given = fleet(a=20, b=0)
    routed(given, "a", "q", blocks=0, tokens=21 * 16)
    assert decide(given, "blocks").node.name == "b"


def test_e2_exploits_a_match_of_more_than_half_and_explores_else() -> None:
    given = fleet(a=17, b=0)
    routed(given, "a", "q", tokens=100_000)
    assert decide(given, "e2").node.name == "a"
    given = fleet(a=15, b=0)
    routed(given, "a", "q", tokens=100_000)
    assert decide(given, "e2").node.name == "b"


def test_e2_spares_the_node_whose_blocks_are_worth_more() -> None:
    given = Given()
    for name in ("a", "b"):
        given.put(f"node.{name}", types.NodeRegistered(name, "x", ["m"], 16, {"gpu": 40}))
        # All of b's prompts were cached, none of a's was: what b holds is used again.
        routed(given, name, f"{name} request", match=32 if name == "b" else 0, tokens=32 * 16)
        epoch = given.state.nodes[name].epoch
        given.put(f"cache.{name}", types.BlocksStored(name, epoch, 1, pack_hashes(range(500, 540))))
    assert decide(given, "e2", window=0).node.name == "a"


def test_ttft_waits_for_a_queue_that_is_shorter_than_computing_anew() -> None:
    given = fleet(a=32, b=0)
    routed(given, "a", "q", tokens=200)
    assert decide(given, "ttft", load_seconds=0).node.name == "a"
    routed(given, "a", "r", tokens=800)
    assert decide(given, "ttft", load_seconds=0).node.name == "b"


def test_ttft_keeps_to_what_is_cached_when_everybody_waits() -> None:
    given = fleet(a=32, b=0)
    for number in range(200):
        routed(given, "a", f"a{number}", tokens=1000)
        routed(given, "b", f"b{number}", tokens=993)
    assert decide(given, "ttft", load_seconds=0, uncached_weight=0.5).node.name == "a"
    assert decide(given, "ttft", load_seconds=0, uncached_weight=0.5, crowd_weight=0).node.name == "b"


def test_ttft_keeps_a_session_that_would_gain_little_by_moving() -> None:
    given = fleet(a=0, b=0)
    given.put("session.m", types.SessionAssigned("s", "m", "a"))
    routed(given, "a", "q", tokens=90)
    assert decide(given, "ttft", "s", load_seconds=0).node.name == "a"
    assert decide(given, "ttft", "s", load_seconds=0, session_seconds=0.05).node.name == "b"


def test_ttft_prefers_blocks_that_need_not_be_loaded() -> None:
    given = Given()
    for name in ("a", "b"):
        given.node(name)
    given.holds("a", 32, tier="cpu")
    given.holds("b", 32)
    assert decide(given, "ttft").node.name == "b"
    given.runs("b", 1)
    assert decide(given, "ttft", slow_share=0, decode_seconds=1).node.name == "a"


def test_ttft_believes_what_nodes_turned_out_to_do() -> None:
    """A node that says it is fast and needs ten times as long is not sent what the others do sooner."""
    given = Given()
    given.node("liar", prefill_tokens_per_s="4000")
    given.node("honest", prefill_tokens_per_s="2000")
    assert decide(given, "ttft").node.name == "liar"
    for number in range(60):
        for name, speed in (("liar", 400), ("honest", 2000)):
            hashes = pack_hashes([50_000 + number])
            event = types.RequestRouted(f"{name}{number}", "m", name, 0, 1, 8000, hashes)
            given.put("access.w", event)
            given.at += 8000 * 10**9 // speed
            epoch = given.state.nodes[name].epoch
            given.put(f"cache.{name}", types.BlocksStored(name, epoch, number, hashes))
            given.put("access.w", types.RequestCompleted(f"{name}{number}", name))
    given.policy("ttft", load_seconds=0)
    query = Query("q", "m", pack_hashes(CHAIN), 513, 32, 16)
    assert given.chooser.decide(query, NOW + given.at).node.name == "honest"


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_says_what_it_is_and_what_its_parameters_mean(name: str) -> None:
    known = POLICIES[name]
    assert known.summary.endswith(".")
    for parameter in (known.parameters or {}).values():
        assert parameter.unit
        assert parameter.meaning
        assert parameter.least <= parameter.default <= parameter.most


@pytest.mark.parametrize("name", POLICIES)
def test_each_parameter_is_looked_at(name: str) -> None:
    """A policy that ignored one would have the same costs whatever it is set to."""
    given = fleet(a=17, b=3, c=0)
    given.holds("a", 20, start=17, tier="cpu")
    given.put("session.m", types.SessionAssigned("s", "m", "c"))
    for number in range(40):
        routed(given, "a", f"a{number}", match=number % 3, tokens=1000 + number)
    routed(given, "b", "b", tokens=100)
    given.runs("c", 1)
    routed(given, "c", "decodes", tokens=100)
    routed(given, "c", "came later", tokens=100)
    given.put("access.w", types.RequestCompleted("came later", "c"))

    def costs(**parameters: float) -> list[float]:
        given.policy(name, **parameters)
        return [candidate.cost for candidate in given.decide(session="s").candidates]

    known = POLICIES[name].parameters or {}
    for parameter, facts in known.items():
        values = [min(value, facts.most) for value in (facts.default * 100 + 1, 0.0, facts.default / 3)]
        # Some matter only when another is not at its default.
        bases = [{}, *({other: min(1e6, known[other].most)} for other in known if other != parameter)]
        assert any(costs(**base, **{parameter: value}) != costs(**base) for base in bases for value in values), (
            parameter
        )
    assert not given.chooser.last_failure


def test_parameters_are_checked_by_name_and_limits() -> None:
    check("ttft", {"session_seconds": 1.0})
    check("math:dist", {"anything": -1.0})
    for name, parameters, message in [
        ("ttft", {"seconds": 1.0}, "has no parameter 'seconds'; it has uncached_weight"),
        ("cascade", {"x": 1.0}, "it has hold, hold_seconds"),
        ("ttft", {"slow_share": 1.5}, "from 0 to 1"),
        ("ttft", {"session_seconds": -1.0}, "session_seconds is -1"),
        ("ttft", {"session_seconds": math.nan}, "session_seconds is nan"),
        ("fastest", {}, "is not one of"),
        ("os:system", {}, "may not be used"),
    ]:
        with pytest.raises(BadRequest, match=message):
            check(name, parameters)
    assert policy("math:dist").parameters is None
