"""Decisions about nodes with hybrid models: a match is what all KV cache groups serve, and nothing is expected beyond it."""

from __future__ import annotations

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.versions import FORMAT
from kvplane.services.routing.query import Query
from tests.support.routing_given import CHAIN, NOW, Given


def given_with(*names: str) -> Given:
    given = Given()
    given.put("control", types.FormatRaised(FORMAT))
    for name in names:
        given.node(name)
    given.policy("cascade")
    return given


def keeps(given: Given, name: str, *blocks: int) -> None:
    """A node keeps states at the ends of these blocks."""
    event = types.GroupStored(name, given.state.nodes[name].epoch, 1, 1, "state", pack_hashes(blocks))
    given.put(f"cache.{name}", event)


def test_the_node_whose_groups_serve_most_wins() -> None:
    given = given_with("a", "b", "plain")
    given.holds("a", 32)
    given.holds("b", 20)
    given.holds("plain", 12)
    assert given.decide().node.name == "a"
    keeps(given, "a", CHAIN[7])
    keeps(given, "b", CHAIN[15])
    decision = given.decide()
    assert (decision.node.name, decision.match) == ("b", 16)
    assert decision.fallbacks == ["plain", "a"]
    matches, _ = given.chooser.matches(given.chooser.roster("m"), Query("q", "m", pack_hashes(CHAIN), 513, 32, 16))
    assert matches.tolist() == [8, 16, 12]


def test_a_match_is_looked_for_within_the_blocks_that_can_be_reused() -> None:
    given = given_with("a")
    given.holds("a", 32)
    keeps(given, "a", CHAIN[31], CHAIN[29])
    # Of a prompt of 32 blocks the last token is computed, and the block before it with it.
    query = Query("q", "m", pack_hashes(CHAIN), 32 * 16, 31, 16)
    assert given.chooser.decide(query, NOW).match == 30
    assert given.decide(blocks=31).match == 30
    assert given.decide(blocks=32).match == 32


def test_nothing_is_expected_that_was_not_told() -> None:
    given = given_with("hybrid", "plain")
    keeps(given, "hybrid")
    for name in ("hybrid", "plain"):
        given.overlay.predict("m", name, given.state.load.ordinal[name], pack_hashes(CHAIN), NOW)
    matches, _ = given.chooser.matches(given.chooser.roster("m"), Query("q", "m", pack_hashes(CHAIN), 513, 32, 16))
    assert matches.tolist() == [0, 32]


def test_slower_tiers_of_hybrid_nodes_are_not_counted() -> None:
    given = given_with("a", "b")
    for name in "ab":
        given.holds(name, 8)
        given.holds(name, 20, start=8, tier="cpu")
    keeps(given, "a", CHAIN[3], CHAIN[15])
    matches, slow = given.chooser.matches(given.chooser.roster("m"), Query("q", "m", pack_hashes(CHAIN), 513, 32, 16))
    assert slow is not None
    assert (matches.tolist(), slow.tolist()) == ([4, 20], [0, 12])
