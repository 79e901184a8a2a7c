"""An engine's events as the fleet's: copies, tiers, chains that are unknown, groups, adapters."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvplane.events.hashing import block_hashes, unpack_hashes
from kvplane.events.types import BlocksRemoved, BlocksStored
from kvplane.services.engines.dialect import Batch, decode
from kvplane.services.engines.holding import Former
from kvplane.services.engines.translate import COUNTS, EVENT_BLOCKS, Translator
from tests.support.naive_engine import naive_hashes
from tests.support.one_node_fold import Folded

TOKENS = list(range(100, 112))
BLOCKS = naive_hashes(TOKENS, 4)


def stored(names: list[Any], tokens: list[int], parent: Any = None, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": tokens, "block_size": 4,
        "lora_id": None, "medium": "GPU", "lora_name": None, **fields,
    }  # fmt: skip


def removed(*names: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "medium": "GPU", **fields}


class Node:
    """A translator and the fleet's fold of what it says."""

    def __init__(self, **options: Any) -> None:
        self.translator = Translator("a", 4, **options)
        self.folded = Folded(block_size=4)
        self.translator.epoch = 1
        self.batch = 0

    def say(self, *events: dict[str, Any]) -> list[Any]:
        self.batch += 1
        out = self.translator.apply(batch(*events), self.batch)
        self.folded.put(out)
        tiers = {tier: self.translator.held(tier) for tier in self.translator.tiers()}
        assert {tier: self.folded.held(tier) for tier in tiers} == tiers
        return out

    def held(self, tier: Any = "gpu") -> set[int]:
        return self.folded.held(tier)

    def counted(self) -> dict[str, int]:
        return {
            name: count
            for name, count in self.translator.counts.items()
            if count and name not in {"stored", "removed", "cleared"}
        }


def batch(*events: dict[str, Any]) -> Batch:
    return decode(msgspec.msgpack.encode([1.0, list(events), 0]))


def test_a_run_is_stored_with_its_parent_and_both_names() -> None:
    node = Node()
    node.say(stored([1, 2], TOKENS[:8]))
    (event,) = node.say(stored([3], TOKENS[8:], 2))
    assert event == BlocksStored("a", 1, 2, block_hashes(TOKENS, 4)[16:], BLOCKS[1], "gpu", [3])
    assert node.held() == set(BLOCKS)


def test_a_block_is_told_once_however_many_copies_there_are() -> None:
    node = Node()
    node.say(stored([1, 2, 3], TOKENS))
    assert node.say(stored([1, 2, 3], TOKENS)) == []
    assert node.say(removed(1), removed(2)) == []
    assert node.held() == set(BLOCKS)
    (event,) = node.say(removed(1), removed(2))
    assert isinstance(event, BlocksRemoved)
    assert node.held() == {BLOCKS[2]}
    assert node.say(removed(3)) == []
    node.say(removed(3))
    assert node.held() == set()
    assert node.counted() == {}


def test_only_what_is_new_of_a_run_is_told() -> None:
    node = Node()
    node.say(stored([2], TOKENS[:4]), stored([1, 2, 3], TOKENS))
    assert node.counted() == {"ambiguous": 1}
    node = Node()
    node.say(stored([1, 2, 3], TOKENS))
    node.say(removed(1), removed(3))
    first, last = node.say(stored([1, 2, 3], TOKENS))
    assert (first.parent, unpack_hashes(first.hashes)) == (None, (BLOCKS[0],))
    assert (last.parent, unpack_hashes(last.hashes)) == (BLOCKS[1], (BLOCKS[2],))


def test_tiers_are_counted_each_by_itself() -> None:
    node = Node()
    node.say(stored([1, 2, 3], TOKENS))
    # Offloaded blocks are named, without their tokens.
    node.say(stored([1, 2], [], medium="CPU", block_size=0))
    node.say(removed(1), removed(2))
    assert node.held() == {BLOCKS[2]}
    assert node.held("cpu") == {BLOCKS[0], BLOCKS[1]}
    # A name is still known after its last copy has gone.
    node.say(removed(1, medium="CPU"))
    node.say(stored([1, 77], [], medium="STORAGE", block_size=0))
    assert node.held("disk") == {BLOCKS[0]}
    assert node.counted() == {"unnamed": 1}
    node.say({"type": "AllBlocksCleared"})
    assert (node.held(), node.held("cpu"), node.held("disk")) == (set(), set(), set())


def test_what_follows_an_unknown_parent_is_left_out() -> None:
    node = Node()
    node.say(stored([2, 3], TOKENS[4:], 1))
    assert node.held() == set()
    assert node.counted() == {"lost_parent": 2}
    # Once the chain is reported from its root, what follows is known.
    node.say(stored([1], TOKENS[:4]))
    node.say(stored([2, 3], TOKENS[4:], 1))
    assert node.held() == set(BLOCKS)


def test_a_parent_that_has_left_is_still_a_parent() -> None:
    node = Node()
    node.say(stored([1], TOKENS[:4]))
    node.say(removed(1), stored([2, 3], TOKENS[4:], 1))
    assert node.held() == set(BLOCKS[1:])


def test_a_known_block_in_a_run_of_an_unknown_parent_gives_the_chain() -> None:
    node = Node()
    node.say(stored([1, 2, 3], TOKENS))
    node.translator.clear()
    node.folded.register()
    node.translator.epoch = node.folded.state.sequence
    more = [*TOKENS[4:], 7, 7, 7, 7]
    node.say(stored([88, 3, 4], more, 99))
    # 88 is not known, nor is its parent; block 3 is, and so is what comes behind it.
    assert node.held() == {BLOCKS[2], naive_hashes([*TOKENS, 7, 7, 7, 7], 4)[3]}
    assert node.counted() == {"lost_parent": 1}


def test_removals_of_blocks_never_seen_are_counted() -> None:
    node = Node()
    assert node.say(removed(5, 6)) == []
    assert node.counted() == {"unknown_removed": 2}


def test_adapters_salts_and_images_make_other_chains() -> None:
    node = Node()
    node.say(stored([1, 2], TOKENS[:8]))
    node.say(stored([11, 12], TOKENS[:8], lora_name="ad", extra_keys=[["ad"], ["ad"]]))
    node.say(stored([21, 22], TOKENS[:8], extra_keys=[["salt"], None]))
    image = "ab" * 32
    node.say(stored([31, 32], TOKENS[:8], extra_keys=[None, [[image, 0]]]))
    expected = {
        *naive_hashes(TOKENS[:8], 4),
        *naive_hashes(TOKENS[:8], 4, "ad"),
        *naive_hashes(TOKENS[:8], 4, "", "salt"),
    }
    key = int("ab" * 8, 16).to_bytes(8, "little")
    pictured = unpack_hashes(block_hashes(TOKENS[:8], 4, keys={1: key}))
    assert node.held() == {*expected, pictured[1]}
    assert len(node.held()) == 7
    # A continuation names its parent, so the salt need not come again.
    node.say(stored([23], TOKENS[8:], 22))
    assert naive_hashes(TOKENS, 4, "", "salt")[2] in node.held()


def test_hybrid_models_are_followed_in_their_full_attention() -> None:
    node = Node()
    full, sliding = (
        {"group_idx": 1, "kv_cache_spec_kind": "full_attention"},
        {"group_idx": 0, "kv_cache_spec_kind": "sliding_window"},
    )
    # In a sliding window the tokens are those of all blocks, the names only those of some.
    node.say(stored([3], TOKENS, **sliding), stored([1, 2, 3], TOKENS, **full))
    assert node.held() == set(BLOCKS)
    node.say(removed(3, group_idx=0))
    assert node.held() == set(BLOCKS)
    node.say(stored([3], [], medium="CPU", block_size=0, group_idx=0))
    assert node.held("cpu") == set()
    node.say(removed(3, group_idx=1))
    assert node.held() == set(BLOCKS[:2])
    assert node.counted() == {"other_group": 1}


def test_less_than_a_block_is_no_block() -> None:
    node = Node()
    node.say(stored([9], TOKENS[:2], block_size=2))
    assert (node.held(), node.counted(), node.translator.wrong_size) == (set(), {"partial": 1}, 0)
    node.say(stored([1, 2], TOKENS[:8], block_size=4), stored([8], TOKENS[:3]))
    assert node.counted() == {"partial": 1, "misfit": 1}


def test_blocks_of_another_size_are_noticed() -> None:
    node = Node()
    node.say(stored([1, 2], list(range(16)), block_size=8))
    assert node.translator.wrong_size == 8


def test_blocks_elsewhere_are_counted() -> None:
    node = Node()
    node.say(stored([1], TOKENS[:4], locality="REMOTE", medium="STORAGE"), removed(1, locality="REMOTE"))
    assert (node.held(), node.counted()) == (set(), {"elsewhere": 2})


def test_one_name_for_two_contents_never_leaves_a_block_that_is_gone() -> None:
    """SGLang gives the same name with and without an adapter."""
    node = Node()
    node.say(stored([1], TOKENS[:4]), stored([1], TOKENS[:4], lora_id=1))
    assert node.held() == set(naive_hashes(TOKENS[:4], 4, "1"))
    node.say(removed(1))
    assert node.held() == set()


def test_two_names_of_one_content_hold_it_together() -> None:
    """An adapter that was loaded again from another path."""
    node = Node()
    node.say(stored([1], TOKENS[:4]), stored([2], TOKENS[:4]))
    node.say(removed(1))
    assert node.held() == {BLOCKS[0]}
    node.say(removed(2))
    assert node.held() == set()


def test_copies_that_can_not_exist_are_taken_back() -> None:
    node = Node(capacity={"gpu": 3})
    node.say(stored([1], TOKENS[:4]))
    for _ in range(10):
        node.say(stored([1], TOKENS[:4]))
    # The block goes, and three others fill the cache: the nine copies that were reported and never existed must not keep it.
    node.say(removed(1), stored([5, 6, 7], list(range(12))))
    assert node.held() == set(naive_hashes(list(range(12)), 4))


def test_unknown_events_are_counted_by_type_and_not_without_end() -> None:
    node = Node()
    node.say({"type": "BlockPinned"}, {"type": "BlockPinned"})
    assert node.translator.counts["unknown:BlockPinned"] == 2
    for number in range(1000):
        node.say({"type": f"New{number}"})
    assert len(node.translator.counts) < len(COUNTS) + 100


@pytest.mark.parametrize("names", ["int", "bytes"])
def test_telling_all_again_gives_the_same_cache(names: str) -> None:
    node = Node()
    tokens = list(range(4 * (EVENT_BLOCKS + 10)))
    named = [n.to_bytes(32, "big") if names == "bytes" else n for n in range(EVENT_BLOCKS + 10)]
    node.say(stored(named, tokens))
    node.say(stored(named[:2], [], medium="CPU", block_size=0), removed(named[5]))
    other = Folded(block_size=4)
    other.put(node.translator.report(7))
    assert (other.held(), other.held("cpu")) == (node.held(), node.held("cpu"))
    assert len(other.held()) == EVENT_BLOCKS + 9


def test_the_last_names_of_blocks_no_longer_held_are_remembered() -> None:
    former = Former(8)
    for number in range(100):
        former.put(number, number + 1000)
        newest = range(max(0, number - 3), number + 1)
        assert [former.get(name) for name in newest] == [name + 1000 for name in newest]
    assert 4 <= sum(former.get(name) is not None for name in range(100)) <= 8
    former.put(98, 7)
    assert former.get(98) == 7
