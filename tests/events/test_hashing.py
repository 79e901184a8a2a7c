"""Block hashes agree with the ecosystem's, and chains are apart where tenants and models must be."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import block_hashes, pack_hashes, parse_hash, unpack_hashes

token_lists = st.lists(st.integers(0, (1 << 32) - 1), max_size=60)
sizes = st.integers(1, 9)


def test_the_first_block_has_the_published_hash() -> None:
    """What `compute_block_hash_for_seq` of ai-dynamo-runtime 1.6.1 gives for these tokens and block size 4."""
    assert unpack_hashes(block_hashes([1, 2, 3, 4], 4)) == (14643705804678351452,)
    assert unpack_hashes(block_hashes([5, 6, 7, 8], 4)) == (16777012769546811212,)


def test_a_chain_is_the_hash_of_the_hash_before_and_the_block() -> None:
    first, second = 14643705804678351452, 16777012769546811212
    chained = xxh3_64_intdigest(struct.pack("<QQ", first, second), 1337)
    assert unpack_hashes(block_hashes([1, 2, 3, 4, 5, 6, 7, 8], 4)) == (first, chained)


@given(token_lists, sizes)
def test_a_peer_hashes_the_same_blocks(tokens: list[int], size: int) -> None:
    peer: Any = pytest.importorskip("dynamo.llm")
    for at in range(len(tokens) // size):
        block = tokens[at * size : (at + 1) * size]
        assert list(unpack_hashes(block_hashes(block, size))) == peer.compute_block_hash_for_seq(block, size)


@given(token_lists, sizes)
def test_only_full_blocks_have_a_hash(tokens: list[int], size: int) -> None:
    assert len(block_hashes(tokens, size)) == len(tokens) // size * 8


@given(token_lists, token_lists, sizes)
def test_equal_prefixes_have_equal_hashes_and_nothing_else_has(left: list[int], right: list[int], size: int) -> None:
    ours, theirs = (unpack_hashes(block_hashes(tokens, size)) for tokens in (left, right))
    for at, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        assert (one == other) == (left[: (at + 1) * size] == right[: (at + 1) * size])


@given(token_lists.filter(lambda tokens: len(tokens) >= 9), sizes, st.data())
def test_a_chain_can_be_continued_from_its_last_hash(tokens: list[int], size: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(tokens) // size)) * size
    head = block_hashes(tokens[:cut], size, lora="a")
    tail = block_hashes(tokens[cut:], size, parent=unpack_hashes(head)[-1])
    assert head + tail == block_hashes(tokens, size, lora="a")


def test_adapter_salt_block_size_and_image_separate_chains() -> None:
    tokens = list(range(32))
    chains = [
        block_hashes(tokens, 8),
        block_hashes(tokens, 16),
        block_hashes(tokens, 8, lora="lora"),
        block_hashes(tokens, 8, salt="lora"),
        block_hashes(tokens, 8, lora="lo", salt="ra"),
        block_hashes(tokens, 8, lora="lora", salt="x"),
        block_hashes(tokens, 8, keys={0: b"image"}),
    ]
    hashes = [value for chain in chains for value in unpack_hashes(chain)]
    assert len(set(hashes)) == len(hashes)


def test_an_image_changes_its_block_and_those_behind_it() -> None:
    tokens = list(range(24))
    plain, keyed = (unpack_hashes(block_hashes(tokens, 8, keys=keys)) for keys in (None, {1: b"image"}))
    assert plain[0] == keyed[0]
    assert not set(plain[1:]) & set(keyed[1:])


@pytest.mark.parametrize("tokens", [[-1], [1 << 32], ["1"], [1.5], [None]])
def test_what_is_no_token_is_refused(tokens: list[Any]) -> None:
    with pytest.raises(BadHashes, match="token ids must be whole numbers"):
        block_hashes(tokens, 1)


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(BadHashes, match="block size 0"):
        block_hashes([1], 0)


@given(st.integers(0, (1 << 64) - 1))
def test_a_hash_is_read_in_decimal_and_hex(value: int) -> None:
    assert parse_hash(value) == value
    assert parse_hash(f"{value:#x}") == value
    assert parse_hash(f"{value:016x}") == value
    if len(str(value)) != 16:
        assert parse_hash(str(value)) == value


@pytest.mark.parametrize("text", ["", "-1", "0x", "1_0", "1.0", "٣", "0x1ffffffffffffffff", str(1 << 64), -1, 1 << 64])
def test_what_is_no_hash_is_refused(text: str | int) -> None:
    with pytest.raises(BadHashes):
        parse_hash(text)


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_hashes_travel_unchanged(values: list[int]) -> None:
    assert list(unpack_hashes(pack_hashes(values))) == values
