"""Contexts of live conversations: whose they are, where they count, when they end; logs of earlier formats have none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections import contexts, snapshot
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadSnapshot
from tests.support.fold_given import SECOND, Given, registered, replayed


def fleet(in_force: int = contexts.CONTEXTS_FORMAT) -> Given:
    """Three nodes of a log in a format."""
    given = Given()
    if in_force > 1:
        assert given.put("control", "", types.FormatRaised(in_force)) is None
    for name in "abc":
        given.node(registered(name, capacity=1000))
    return given


def asks(given: Given, node: str, *blocks: int, session: str = "", best: int = 0, after: float = 1) -> None:
    """A request is sent to a node, of which some node holds so many leading blocks."""
    event = types.RequestRouted(
        f"q{len(given.messages)}", "m", node, 0, len(blocks), len(blocks) * 16, pack_hashes(blocks), session, best=best
    )
    assert given.put("access", "w", event, after=after) is None


def tokens(given: Given) -> dict[str, float]:
    load = given.state.load
    return {name: load.contexts.tokens[at] for name, at in load.ordinal.items()}


def test_the_last_prompt_of_a_session_counts_where_it_was_sent() -> None:
    given = fleet()
    asks(given, "a", 1, 2, session="s")
    asks(given, "b", 7, session="t")
    asks(given, "a", 1, 2, 3, session="s")
    assert (tokens(given), given.state.load.contexts.turns) == ({"a": 48, "b": 16, "c": 0}, 3)
    asks(given, "c", 1, 2, 3, 4, session="s")
    assert tokens(given) == {"a": 0, "b": 16, "c": 64}


def test_a_conversation_without_a_name_is_known_by_the_prompt_that_it_goes_on_from() -> None:
    given = fleet()
    asks(given, "a", 1, 2, 3)
    asks(given, "b", 1, 2, 3, 4, 5, best=3)
    assert (tokens(given), len(given.state.load.contexts)) == ({"a": 0, "b": 80, "c": 0}, 1)
    # Parts of the answer may be cached as well.
    asks(given, "b", 1, 2, 3, 4, 5, 6, 7, 8, best=7)
    assert (tokens(given), given.state.load.contexts.turns) == ({"a": 0, "b": 128, "c": 0}, 3)


def test_a_conversation_that_gets_its_name_later_is_the_same_one() -> None:
    given = fleet()
    asks(given, "a", 1, 2, 3)
    asks(given, "a", 1, 2, 3, 4, session="s", best=3)
    assert (tokens(given), len(given.state.load.contexts)) == ({"a": 64, "b": 0, "c": 0}, 1)
    # Another name is another conversation.
    asks(given, "b", 1, 2, 3, 4, 5, session="t", best=4)
    assert (tokens(given), len(given.state.load.contexts)) == ({"a": 64, "b": 80, "c": 0}, 2)


def test_a_prompt_that_branched_off_long_ago_goes_on_with_no_conversation() -> None:
    given = fleet()
    asks(given, "a", 1, 2, 3)
    longer = [*range(1, 4 + contexts.LOOKED_AT_BLOCKS)]
    asks(given, "b", *longer, best=len(longer))
    assert given.state.load.contexts.turns == len(given.state.load.contexts) == 2


def test_a_beginning_that_many_share_makes_no_conversation() -> None:
    given = fleet()
    asks(given, "a", 1, 2, 3)
    asks(given, "b", 1, 2, 4, best=2)
    asks(given, "c", 1, 2, 5, best=2)
    assert tokens(given) == {"a": 48, "b": 48, "c": 48}


def test_who_is_silent_for_long_is_expected_no_more() -> None:
    given = fleet()
    asks(given, "a", 1, 2, session="s")
    asks(given, "b", 7, session="t", after=contexts.LIVE_SECONDS)
    assert tokens(given) == {"a": 32, "b": 16, "c": 0}
    asks(given, "b", 7, 8, session="t", after=1)
    assert (tokens(given), len(given.state.load.contexts)) == ({"a": 0, "b": 32, "c": 0}, 1)


@pytest.mark.parametrize("how", ["ended", "lost", "registered"])
def test_a_context_goes_with_its_session_and_with_its_node(how: str) -> None:
    given = fleet()
    given.assigns("s", "a")
    asks(given, "a", 1, 2, session="s")
    asks(given, "b", 7, session="t")
    if how == "ended":
        assert given.put("session", "m", types.SessionEnded("s", "m")) is None
    elif how == "lost":
        assert given.change(types.NodeLost, "a") is None
    else:
        given.node(registered("a", capacity=1000))
    assert tokens(given).get("a", 0) == 0
    assert (tokens(given)["b"], given.state.load.contexts.turns) == (16, 1)


def test_a_clock_that_was_ahead_keeps_nobody_alive() -> None:
    given = fleet()
    given.now += 5000 * SECOND
    asks(given, "a", 1, 2, session="s")
    given.now -= 5000 * SECOND
    asks(given, "b", 7, session="t")
    asks(given, "b", 7, session="t", after=contexts.LIVE_SECONDS + 1)
    assert tokens(given) == {"a": 0, "b": 16, "c": 0}


def test_there_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "CONTEXTS_LIMIT", 2)
    given = fleet()
    for number, name in enumerate("abc"):
        asks(given, name, number + 1, session=name)
    assert tokens(given) == {"a": 0, "b": 16, "c": 16}


@pytest.mark.parametrize("in_force", [1, 2])
def test_a_log_of_an_earlier_format_has_none(in_force: int) -> None:
    given = fleet(in_force)
    asks(given, "a", 1, 2, session="s")
    assert not given.state.load.contexts
    assert tokens(given) == {"a": 0, "b": 0, "c": 0}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("asks"), st.sampled_from("abc"), st.integers(1, 5), st.sampled_from(["", "s", "t"])),
        st.tuples(st.just("waits"), st.sampled_from([1.0, 400.0, 700.0])),
        st.tuples(st.just("joins"), st.sampled_from("abcd")),
        st.tuples(st.just("leaves"), st.sampled_from("abc")),
    ),
    max_size=30,
)


@settings(max_examples=60)
@drawn(steps)
def test_whatever_happens_nodes_have_the_tokens_of_their_contexts_and_snapshots_say_the_same(drawn: list[Any]) -> None:
    given = fleet()
    for step in drawn:
        match step:
            case "asks", node, length, session:
                if node in given.state.load.ordinal:
                    asks(given, node, *range(1, length + 1), session=session, best=length - 1)
            case "waits", seconds:
                given.now += int(seconds * SECOND)
            case "joins", node:
                given.node(registered(node, capacity=1000))
            case "leaves", node:
                given.change(types.NodeRemoved, node)
        kept = given.state.load.contexts
        expected = dict.fromkeys(given.state.load.ordinal, 0.0)
        for context in kept.values():
            expected[context.node] += context.tokens
        assert tokens(given) == expected
        assert kept.turns == sum(context.turns for context in kept.values())
    state = given.state
    assert digest(replayed(given.messages)) == digest(state)
    kept = state.load.contexts
    again = snapshot.load("f", snapshot.dump(state), verify=True).load.contexts
    assert (list(again.items()), again.tokens, again.turns) == (list(kept.items()), kept.tokens, kept.turns)


def test_the_digest_tells_contexts_apart() -> None:
    one, other = fleet(), fleet()
    for given in (one, other):
        asks(given, "a", 1, 2, session="s")
    before = digest(other.state)
    assert digest(one.state) == before
    other.state.load.contexts.clear()
    assert digest(other.state) != before


def test_a_snapshot_with_contexts_that_can_not_be_is_refused() -> None:
    given = fleet()
    asks(given, "a", 1, 2, session="s")
    kept = given.state.load.contexts
    key, context = next(iter(kept.items()))
    kept[key] = contexts.Context("nobody", context.tokens, context.turns, context.time)
    with pytest.raises(BadSnapshot, match="a context can't be"):
        snapshot.load("f", snapshot.dump(given.state))
