"""What a router knows beyond the log: it counts at once, it goes when the log says so, and it does not outlive its time."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.services.routing.overlay import PENDING_SECONDS, PREDICTION_SECONDS, Overlay
from tests.support.fold_given import SECOND, START
from tests.support.routed_requests import CHAIN, routed


def at(seconds: float) -> int:
    return START + int(seconds * SECOND)


def soon(overlay: Overlay, ordinal: int = 0, model: str = "m") -> int:
    """How many blocks of the chain a node is predicted to hold."""
    lengths = [0] * 4
    assert overlay.lift(model, pack_hashes(CHAIN), len(CHAIN), lengths) is any(lengths)
    return lengths[ordinal]


def test_a_decision_counts_until_the_log_has_it() -> None:
    overlay = Overlay()
    overlay.decided(routed("q", "b", match=3), 2, 16, START)
    assert (list(overlay.active), list(overlay.tokens)) == ([0, 0, 1], [0, 0, 128 - 48])
    assert overlay.on_log("q")
    assert (list(overlay.active), list(overlay.tokens), overlay.pending) == ([0, 0, 0], [0, 0, 0], {})
    assert not overlay.on_log("q")


def test_a_match_beyond_the_prompt_leaves_no_negative_work() -> None:
    overlay = Overlay()
    overlay.decided(routed("q", match=8, tokens=100), 0, 16, START)
    assert list(overlay.tokens) == [0]


def test_a_request_that_is_decided_again_counts_once_and_on_its_new_node() -> None:
    overlay = Overlay()
    overlay.decided(routed("q", "a"), 0, 16, START)
    overlay.decided(routed("q", "b"), 1, 16, START)
    assert list(overlay.active) == [0, 1]


decisions = st.lists(
    st.tuples(
        st.sampled_from(["decide", "decide", "log", "gone"]), st.integers(0, 5), st.integers(0, 2), st.integers(0, 300)
    ),
    max_size=40,
)


@given(decisions)
def test_columns_are_the_sums_of_what_is_pending(steps: list[tuple[str, int, int, int]]) -> None:
    overlay = Overlay()
    expected: dict[str, tuple[int, int]] = {}
    for what, request, node, tokens in steps:
        if what == "decide":
            overlay.decided(routed(f"{request}", f"n{node}", tokens=tokens, match=2), node, 16, START)
            expected[f"{request}"] = (node, max(0, tokens - 32))
        elif what == "log":
            assert overlay.on_log(f"{request}") == (expected.pop(f"{request}", None) is not None)
        else:
            overlay.node_changed(f"n{node}")
            expected = {key: entry for key, entry in expected.items() if entry[0] != node}
        overlay.fit(3)
        active: dict[int, int] = defaultdict(int)
        work: dict[int, int] = defaultdict(int)
        for where, left in expected.values():
            active[where] += 1
            work[where] += left
        assert list(overlay.active) == [active[ordinal] for ordinal in range(3)]
        assert list(overlay.tokens) == [work[ordinal] for ordinal in range(3)]
        assert set(overlay.pending) == set(expected)


def test_blocks_are_predicted_where_the_request_went_and_for_its_model_only() -> None:
    overlay = Overlay()
    overlay.decided(routed("q", length=5), 1, 16, START, predict="m")
    assert (soon(overlay, 1), soon(overlay, 0), soon(overlay, 1, "n")) == (5, 0, 0)


def test_nothing_is_predicted_unasked_or_of_what_is_there_already() -> None:
    overlay = Overlay()
    overlay.decided(routed("q"), 0, 16, START)
    overlay.decided(routed("r", match=8), 0, 16, START, predict="m")
    overlay.decided(types.RequestRouted("s", "m", "a", 0, 8, 128), 0, 16, START, predict="m")
    assert soon(overlay) == 0


def test_predictions_go_with_their_node_and_no_others() -> None:
    overlay = Overlay()
    for ordinal, node in enumerate("ab"):
        overlay.decided(routed(f"q{node}", node), ordinal, 16, START, predict="m")
    overlay.expire(at(PREDICTION_SECONDS))
    overlay.decided(routed("qa", "a"), 0, 16, at(PREDICTION_SECONDS), predict="n")
    overlay.node_changed("a")
    assert (soon(overlay, 0), soon(overlay, 1), soon(overlay, 0, "n")) == (0, 8, 0)
    assert set(overlay.pending) == {"qb"}


@pytest.mark.parametrize("first", [0, 0.1, PREDICTION_SECONDS / 2, PREDICTION_SECONDS - 0.1])
def test_a_prediction_lives_between_one_and_two_periods_of_traffic(first: float) -> None:
    overlay = Overlay()
    overlay.expire(START)
    overlay.predict("m", "a", 0, pack_hashes(CHAIN), at(first))
    lived = 0.0
    while soon(overlay):
        lived += 0.5
        overlay.predict("m", "b", 1, pack_hashes([99]), at(first + lived))
        assert lived <= 2 * PREDICTION_SECONDS
    assert lived >= PREDICTION_SECONDS


def test_a_prediction_that_is_hit_again_and_again_is_not_kept_alive_by_its_own_hits() -> None:
    """A node that never stored what it was to store must not be taken for an exact match for ever."""
    overlay = Overlay()
    overlay.decided(routed("first"), 0, 16, START, predict="m")
    for second in range(1, int(2 * PREDICTION_SECONDS) + 1):
        overlay.expire(at(second))
        if not soon(overlay):
            break
        overlay.decided(routed("q", match=soon(overlay)), 0, 16, at(second), predict="m")
        overlay.on_log("q")
    assert soon(overlay) == 0


def test_what_another_router_predicted_in_the_period_before_goes_with_that_period() -> None:
    """Who has looked at the clock first must make no difference: predictions go by their own times."""
    period = int(PREDICTION_SECONDS)
    begin = START // SECOND // period * period + period - START // SECOND
    overlay = Overlay()
    overlay.expire(at(begin))
    overlay.predict("m", "a", 0, pack_hashes(CHAIN), at(begin - 1))
    assert soon(overlay) == 8
    overlay.expire(at(begin + period))
    assert soon(overlay) == 0
    overlay.predict("m", "a", 0, pack_hashes(CHAIN), at(begin - 1))
    assert soon(overlay) == 0


def test_after_a_long_silence_all_predictions_are_too_old() -> None:
    overlay = Overlay()
    overlay.predict("m", "a", 0, pack_hashes(CHAIN), START)
    overlay.expire(at(2 * PREDICTION_SECONDS))
    assert soon(overlay) == 0


def test_of_a_prefix_in_use_the_young_generation_is_asked_alone() -> None:
    overlay = Overlay()
    overlay.predict("m", "a", 0, pack_hashes(CHAIN), START)
    overlay.predict("m", "b", 1, pack_hashes(CHAIN[:2]), at(PREDICTION_SECONDS + 1))
    assert (soon(overlay, 0), soon(overlay, 1)) == (0, 2)
    assert not overlay.lift("m", pack_hashes([77]), 1, [0, 0])


def test_a_decision_that_never_reached_the_log_stops_counting() -> None:
    overlay = Overlay()
    overlay.expire(START)
    overlay.decided(routed("old"), 0, 16, START)
    overlay.decided(routed("new"), 0, 16, at(PENDING_SECONDS - 1))
    overlay.expire(at(PENDING_SECONDS))
    assert set(overlay.pending) == {"old", "new"}
    overlay.expire(at(PENDING_SECONDS + PREDICTION_SECONDS))
    assert set(overlay.pending) == {"new"}
    assert list(overlay.active) == [1]


def test_decisions_that_never_reached_the_log_stop_counting_though_nothing_is_predicted() -> None:
    """On managed nodes nothing is ever predicted; lost decisions must not count there for ever."""
    overlay = Overlay()
    overlay.decided(routed("old"), 0, 16, START)
    for second in range(1, int(PENDING_SECONDS + 2 * PREDICTION_SECONDS)):
        overlay.decided(routed("q"), 0, 16, at(second))
        overlay.on_log("q")
    assert list(overlay.active) == [0]


def test_a_clock_that_was_ahead_does_not_end_predictions() -> None:
    overlay = Overlay()
    overlay.decided(routed("ahead"), 0, 16, at(86400), predict="m")
    overlay.decided(routed("right", "b"), 1, 16, at(0), predict="m")
    assert (soon(overlay, 0), soon(overlay, 1)) == (0, 8)
    assert list(overlay.pending) == ["right"]


def test_a_late_message_is_no_other_clock() -> None:
    overlay = Overlay()
    overlay.decided(routed("now", "b"), 1, 16, at(60), predict="m")
    overlay.predict("m", "a", 0, pack_hashes(CHAIN), at(0))
    assert soon(overlay, 1) == 8
