"""`ttft` and the contexts of live conversations: where new ones go, and when one moves."""

from __future__ import annotations

import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections.contexts import CONTEXTS_FORMAT
from kvplane.services.routing.query import Query
from tests.support.routing_given import CHAIN, NOW, Given

COMMON = CHAIN[:8]


def fleet(in_force: int = CONTEXTS_FORMAT, capacity: int = 64) -> Given:
    """Two idle nodes; two conversations of many turns live on `a`, where their common beginning lies."""
    given = Given()
    if in_force > 1:
        given.put("control", types.FormatRaised(in_force))
    for name in "ab":
        given.put(f"node.{name}", types.NodeRegistered(name, "x", ["m"], 16, {"gpu": capacity}))
    given.holds("a", 8)
    for turn in range(6):
        for session in ("s", "t"):
            asks(given, f"{session}{turn}", "a", session)
    return given


def asks(given: Given, request: str, node: str, session: str, blocks: int = 20) -> None:
    hashes = pack_hashes([*COMMON, *range(1000, 1000 + blocks - 8)])
    routed = types.RequestRouted(request, "m", node, blocks, blocks, blocks * 16, hashes, session)
    given.put("access.w", routed)
    given.put(f"access.{node}", types.RequestCompleted(request, node))


@pytest.mark.parametrize("session", ["new", ""])
def test_a_new_conversation_goes_where_fewer_live_not_where_its_beginning_is(session: str) -> None:
    assert fleet().decide(blocks=9, session=session).node.name == "b"


def test_a_log_of_an_earlier_format_is_decided_as_it_was() -> None:
    assert fleet(in_force=2).decide(blocks=9).node.name == "a"


def test_a_conversation_is_no_reason_to_leave_its_own_node() -> None:
    given = fleet()
    given.put("session.m", types.SessionAssigned("s", "m", "a"))
    given.put("session.m", types.SessionAssigned("t", "m", "b"))
    given.holds("b", 8)
    asks(given, "moved", "b", "t")
    for name in ("s", "t"):
        assert given.decide(blocks=9, session=name).session == "kept"


def test_the_longer_a_context_the_more_than_in_proportion_its_move_costs() -> None:
    """What it pushes out, and who waits meanwhile, count beside its own time."""
    given = fleet()
    given.holds("a", 32)
    given.put("session.m", types.SessionAssigned("t", "m", "b"))
    asks(given, "moved", "b", "t")
    given.put("session.m", types.SessionAssigned("s", "m", "a"))
    of_a_move = []
    for blocks in (8, 16, 32):
        cost = {each.node: each.cost for each in given.decide(blocks=blocks, session="s").candidates}
        of_a_move.append(cost["b"] - cost["a"])
    first, second, third = of_a_move
    assert 0 < 2 * (second - first) < third - second


def test_a_conversation_is_no_neighbour_of_its_own() -> None:
    given = fleet()

    def lives(session: str) -> list[float]:
        query = Query("q", "m", pack_hashes(CHAIN), 600, 32, 16, session, frozenset())
        view, _, _ = given.chooser.weigh(given.chooser.roster("m"), query, session, NOW)
        return [*map(float, view.contexts)]

    assert (lives("s"), lives("t"), lives("new")) == ([320, 0], [320, 0], [640, 0])


def test_what_is_pushed_out_counts_the_more_the_less_room_there_is() -> None:
    of_the_crowded = []
    for capacity in (10_000, 64):
        decision = fleet(capacity=capacity).decide(blocks=32, session="new")
        cost = {each.node: each.cost for each in decision.candidates}
        of_the_crowded.append(cost["a"] - cost["b"])
    assert of_the_crowded[0] < of_the_crowded[1]


def test_the_second_turn_of_a_conversation_that_is_named_then_stays_where_the_first_was() -> None:
    given = Given()
    given.put("control", types.FormatRaised(CONTEXTS_FORMAT))
    for name in "ab":
        given.node(name)
    first = pack_hashes(CHAIN[:30])
    given.put("access.w", types.RequestRouted("first", "m", "a", 0, 30, 487, first))
    given.holds("a", 31)
    given.put("access.a", types.RequestCompleted("first", "a"))
    assert given.decide(blocks=32, session="named").node.name == "a"
