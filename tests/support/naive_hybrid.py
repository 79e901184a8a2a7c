"""How vLLM 0.32 finds the longest hit of a hybrid model, step by step as its `HybridKVCacheCoordinator` and the
`find_longest_cache_hit` of its managers do it, without EAGLE and without hits within a block.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple


class NaiveGroup(NamedTuple):
    """One KV cache group: its kind, window or chunk in tokens, tokens a block, and the block hashes that it holds."""

    kind: str
    window: int
    block_size: int
    held: set[int]


def _full(group: NaiveGroup, hashes: list[int], max_length: int, alignment: int) -> int:
    computed = 0
    for block_hash in hashes[: max_length // group.block_size]:
        if block_hash not in group.held:
            break
        computed += 1
    hit_length = computed * group.block_size
    return hit_length - hit_length % alignment


def _sliding(group: NaiveGroup, hashes: list[int], max_length: int, alignment: int) -> int:
    size = group.block_size
    needed = -(-(group.window - 1) // size)
    count = max_length // size
    contiguous = 0
    for i in range(count - 1, -1, -1):
        if hashes[i] in group.held:
            if contiguous == 0 and size != alignment and (i + 1) * size % alignment:
                continue
            contiguous += 1
            if contiguous >= needed:
                return (i + contiguous) * size
        else:
            contiguous = 0
    while size != alignment and contiguous * size % alignment:
        contiguous -= 1
    return contiguous * size


def _chunked(group: NaiveGroup, hashes: list[int], max_length: int, alignment: int) -> int:
    size = group.block_size
    assert size == alignment
    computed = max_length // group.window * group.window // size
    for i in range(computed, max_length // size):
        if hashes[i] not in group.held:
            break
        computed += 1
    return computed * size


def _state(group: NaiveGroup, hashes: list[int], max_length: int, alignment: int) -> int:
    size = group.block_size
    for i in range(max_length // size - 1, -1, -1):
        if hashes[i] in group.held and not (size != alignment and (i + 1) * size % alignment):
            return (i + 1) * size
    return 0


_FIND = {"full": _full, "sliding": _sliding, "chunked": _chunked, "state": _state}


def longest_hit(groups: list[NaiveGroup], hashes: list[int], hash_block_size: int, max_length: int) -> int:
    """Tokens of the longest hit, of a request with these hashes, that is no longer than `max_length`."""
    alignment = lcm(*(group.block_size for group in groups))
    groups = sorted(groups, key=lambda group: group.kind != "full")
    simple = len(groups) == 2 and groups[0].kind == "full"
    found: dict[int, int] = {}
    hit_length = max_length
    while True:
        current = hit_length
        for number, group in enumerate(groups):
            if group.kind == "full" and number in found:
                current = min(current, found[number])
                continue
            scale = group.block_size // hash_block_size
            own = hashes[scale - 1 :: scale]
            current = found[number] = _FIND[group.kind](group, own, current, alignment)
        if current >= hit_length:
            break
        hit_length = current
        if simple:
            break
    return hit_length
