"""Predicted chains against sets of blocks: whatever is given, taken back and given again, in any order."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvplane.events.hashing import pack_hashes
from kvplane.services.routing.predictions import Predictions

SLOTS = 2
# Two symbols: chains that share beginnings, leave each other anywhere, and end within each other.
chains = st.text("ab", min_size=1, max_size=5)
steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "drop", "drop", "clear"]),
        st.integers(0, SLOTS - 1),
        chains,
        st.sets(st.integers(1, 5), min_size=1, max_size=3),
    ),
    max_size=25,
)


def block(prefix: str) -> int:
    """Hash of a block: of all that is before it, as real ones are."""
    return xxh3_64_intdigest(prefix.encode())


def blocks(chain: str) -> list[int]:
    return [block(chain[: at + 1]) for at in range(len(chain))]


@settings(max_examples=400)
@given(steps, st.lists(st.tuples(chains, st.integers(0, 6)), min_size=1, max_size=6))
def test_predictions_are_sets_of_blocks(script: list[tuple[str, int, str, set[int]]], asked: list[Any]) -> None:
    predictions, naive = Predictions(), defaultdict[int, set[int]](set)
    for what, slot, chain, places in script:
        if what == "store":
            predictions.store(slot, pack_hashes(blocks(chain)))
            naive[slot] |= set(blocks(chain))
        elif what == "drop":
            some = [block(chain[:place]) for place in places if place <= len(chain)]
            given_ = predictions.given(slot, some)
            assert given_ == [each for each in some if each in naive[slot]]
            predictions.drop(slot, given_)
            naive[slot] -= set(some)
        else:
            predictions.clear(slot)
            naive[slot].clear()
        for request, limit in [*asked, (chain, len(chain))]:
            wanted = blocks(request)[:limit]
            expected = [
                next((at for at, each in enumerate(wanted) if each not in naive[slot]), len(wanted))
                for slot in range(SLOTS)
            ]
            floor = [number % 4 for number in range(SLOTS)]
            lengths = floor.copy()
            known = predictions.lift(pack_hashes(blocks(request)), limit, lengths)
            assert lengths == [max(pair) for pair in zip(floor, expected, strict=True)]
            assert known == (limit > 0 and any(block(request[0]) in held for held in naive.values()))


def test_a_slot_that_was_given_nothing_is_answered_for() -> None:
    predictions = Predictions()
    predictions.store(1, pack_hashes(blocks("aab")))
    lengths = [0] * 4
    assert predictions.lift(pack_hashes(blocks("aabb")), 4, lengths)
    assert lengths == [0, 3, 0, 0]
    assert predictions.given(3, blocks("a")) == []
    predictions.clear(3)


@pytest.mark.parametrize("listed", [True, False])
def test_what_was_cleared_was_not_given(listed: bool) -> None:
    predictions = Predictions()
    predictions.store(0, pack_hashes(blocks("ab")))
    if listed:
        assert predictions.given(0, blocks("ab")) == blocks("ab")
    predictions.clear(0)
    predictions.store(0, pack_hashes(blocks("b")))
    assert predictions.given(0, blocks("ab")) == []
