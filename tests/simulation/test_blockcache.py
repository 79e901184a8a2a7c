"""The block cache of a simulated node: never more than its capacity, nothing in use leaves, children before parents."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.simulation.blockcache import Allocation, BlockCache

CHAINS = [(1, 2, 3, 4, 5, 6), (1, 2, 13, 14), (21, 22, 23), (31, 31, 32)]
requests = st.builds(lambda chain, length: chain[:length], st.sampled_from(CHAINS), st.integers(0, 6))


def warm(capacity: int, *requests: tuple[int, ...]) -> BlockCache:
    cache = BlockCache(capacity)
    for hashes in requests:
        assert cache.start(hashes) is not None
        cache.finish(hashes)
    return cache


def test_a_request_finds_its_prefix_and_stores_the_rest() -> None:
    cache = warm(8, (1, 2))
    assert cache.start((1, 2, 3, 4)) == Allocation(2, (3, 4), ())
    assert cache.leading((1, 2, 3, 9, 4)) == 3


def test_the_deepest_blocks_of_the_chain_not_used_for_longest_leave_first() -> None:
    cache = warm(6, (1, 2, 3), (21, 22, 23))
    assert cache.start((41, 42)) == Allocation(0, (41, 42), (3, 2))
    cache.finish((41, 42))
    assert cache.start((51, 52, 53)) == Allocation(0, (51, 52, 53), (1, 23, 22))


def test_a_use_makes_a_chain_the_last_to_leave() -> None:
    cache = warm(6, (1, 2, 3), (21, 22, 23), (1, 2, 3))
    assert cache.start((41,)) == Allocation(0, (41,), (23,))


def test_what_is_in_use_stays_until_its_last_user_is_done() -> None:
    cache = BlockCache(3)
    for _ in range(2):
        assert cache.start((1, 2, 3)) is not None
    assert cache.start((9,)) is None
    cache.finish((1, 2, 3))
    assert cache.start((9,)) is None
    cache.finish((1, 2, 3))
    assert cache.start((9,)) == Allocation(0, (9,), (3,))


def test_a_request_does_not_evict_what_it_is_about_to_use() -> None:
    cache = warm(3, (1, 2, 3))
    assert cache.start((1, 2, 3, 4)) is None
    assert cache.start((1, 2, 4)) == Allocation(2, (4,), (3,))


def test_a_later_block_that_is_here_is_used_and_not_stored_twice() -> None:
    cache = warm(4, (5, 2))
    assert cache.start((1, 2)) == Allocation(0, (1,), ())
    assert cache.blocks == {5: 0, 2: 1, 1: 1}


def test_a_request_larger_than_the_cache_is_refused_and_changes_nothing() -> None:
    cache = warm(3, (1, 2))
    before = list(cache.blocks.items())
    assert cache.start((11, 12, 13, 14)) is None
    assert list(cache.blocks.items()) == before


@given(st.integers(1, 9), st.lists(st.tuples(st.booleans(), requests), max_size=60))
def test_a_simulated_engine_keeps_its_word(capacity: int, steps: list[tuple[bool, tuple[int, ...]]]) -> None:
    """What it says it stored and evicted is what it holds, and of what runs nothing is missing."""
    cache = BlockCache(capacity)
    held: set[int] = set()
    running: list[tuple[int, ...]] = []
    for starts, hashes in steps:
        if not starts and running:
            cache.finish(running.pop(0))
            continue
        used = {block for request in running for block in request}
        room = capacity - len(used | set(hashes))
        allocation = cache.start(hashes)
        assert (allocation is None) == (room < 0)
        if allocation is not None:
            prefix = next((at for at, block in enumerate(hashes) if block not in held), len(hashes))
            assert allocation.cached == prefix
            assert set(allocation.stored) == set(hashes) - held
            assert len(allocation.stored) == len(set(allocation.stored))
            assert set(allocation.evicted) <= held - used - set(hashes)
            held = held - set(allocation.evicted) | set(allocation.stored)
            running.append(hashes)
        assert set(cache.blocks) == held
        assert len(held) <= capacity
        assert cache.blocks == {block: sum(block in request for request in running) for block in held}


@given(st.integers(2, 9), st.lists(st.sampled_from(CHAINS[:3]), min_size=1, max_size=30))
def test_a_child_never_outlives_its_parent(capacity: int, chains: list[tuple[int, ...]]) -> None:
    cache = BlockCache(capacity)
    for hashes in chains:
        if cache.start(hashes) is not None:
            cache.finish(hashes)
        for chain in CHAINS[:3]:
            inside = [block in cache.blocks for block in chain]
            assert inside == sorted(inside, reverse=True)
