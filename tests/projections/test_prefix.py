"""The prefix index against a dictionary of sets, over whatever runs may come: honest chains or not."""

from __future__ import annotations

import pytest
from hypothesis import settings

from kvplane.events.hashing import pack_hashes
from kvplane.projections.prefix import PrefixIndex
from tests.support.index_machine import IndexMachine

TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=40, stateful_step_count=50, deadline=None, print_blob=True)


def index_of(*runs: tuple[int, list[int]]) -> PrefixIndex:
    index = PrefixIndex()
    for slot, run in runs:
        index.store(slot, pack_hashes(run))
    return index


def test_a_parent_that_left_before_its_child_ends_the_match() -> None:
    index = index_of((0, [1, 2, 3, 4]), (1, [1, 2, 3, 4]))
    index.remove(0, pack_hashes([2]))
    assert index.match(pack_hashes([1, 2, 3, 4])) == [1, 4]
    index.store(0, pack_hashes([2]), 1)
    assert index.match(pack_hashes([1, 2, 3, 4])) == [4, 4]


def test_a_block_that_nobody_holds_is_forgotten() -> None:
    index = index_of((0, [1, 2, 3]), (1, [1, 2]))
    index.remove(0, pack_hashes([3, 2, 1]))
    assert len(index) == 2
    index.clear(1)
    assert len(index) == 0
    assert index.match(pack_hashes([1, 2, 3])) == [0, 0]


def test_blocks_that_share_a_key_are_told_apart() -> None:
    one, two = 100 + (1 << 60), 100 + (1 << 62)
    index = index_of((0, [one, 101, two, 105]), (1, [100]))
    assert len(index) == 5
    assert index.match(pack_hashes([one, 101, two, 105])) == [4, 0]
    assert index.match(pack_hashes([100])) == [0, 1]
    assert index.match(pack_hashes([100 + (1 << 63)])) == [0, 0]
    index.remove(0, pack_hashes([one]))
    assert [index.holds(0, block) for block in (one, two, 100)] == [False, True, False]
    index.clear(0)
    assert len(index) == 1
    assert index.match(pack_hashes([100])) == [0, 1]


def test_clearing_one_slot_leaves_the_others() -> None:
    index = index_of((0, [1, 2, 3]), (1, [1, 2]), (2, [9]))
    assert index.clear(0) == 3
    assert index.match(pack_hashes([1, 2, 3])) == [0, 2, 0]
    assert set(index.held(2)) == {9}


@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_runs_of_any_size_make_one_segment_a_chain(size: int) -> None:
    """Decoding stores block by block; the index must not pay for a segment each time."""
    chain = [*range(1, 257)]
    index = PrefixIndex()
    for at in range(0, 256, size):
        index.store(0, pack_hashes(chain[at : at + size]), chain[at - 1] if at else None)
    assert len({id(segment) for segment in index._where.values()}) == 1
    assert index.match(pack_hashes(chain)) == [256]


def test_a_slot_that_was_never_seen_holds_nothing() -> None:
    index = index_of((0, [1, 2]))
    assert (index.count(7), index.clear(7), index.remove(7, pack_hashes([1])), index.held(7)) == (0, 0, 0, ())
    assert not index.holds(7, 1)
    assert index.match(pack_hashes([1, 2])) == [2]


def test_a_block_keeps_its_holders_when_its_neighbours_leave_everyone() -> None:
    index = index_of((0, [*range(1, 10)]), (1, [*range(1, 10)]), (2, [4, 5, 6]))
    for slot in (0, 1):
        index.remove(slot, pack_hashes([5, 3, 1]))
    index.clear(2)
    assert sorted(index.held(0)) == sorted(index.held(1)) == [2, 4, 6, 7, 8, 9]
    assert index.match(pack_hashes([6, 7, 8, 9, 10])) == [4, 4, 0]
    assert index.match(pack_hashes([4, 5, 6])) == [1, 1, 0]
    assert index.extent(0, pack_hashes([1, 2, 3, 4]), 1, 4) == 1


@pytest.mark.parametrize("more", [[], [600, 601]])
def test_a_block_whose_key_was_taken_is_found_when_that_key_is_free_again(more: list[int]) -> None:
    """It stays in the place that it was given; another store of it must not give it a second one."""
    twin = 100 + (1 << 60)
    index = index_of((0, [100]), (1, [twin]))
    index.remove(0, pack_hashes([100]))
    assert index.store(2, pack_hashes([twin, *more])) == 1 + len(more)
    assert index.store(1, pack_hashes([twin, *more])) == len(more)
    assert len(index) == 1 + len(more)
    assert index.clear(1) == 1 + len(more)
    assert index.match(pack_hashes([twin, *more])) == [0, 0, 1 + len(more)]
    assert index.clear(2) == 1 + len(more)
    assert len(index) == 0
