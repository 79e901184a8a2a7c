"""Slower tiers whose blocks have other sizes than the fleet's, as batches of MessagePack."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvplane.services.engines.dialect import decode
from kvplane.services.engines.translate import Translator
from tests.support.naive_engine import naive_hashes
from tests.support.one_node_fold import Folded

SIZE = 16
TOKENS = list(range(1000, 1512))
BLOCKS = naive_hashes(TOKENS, SIZE)


def stored(names: list[Any], tokens: list[int], parent: Any = None, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": tokens, "block_size": SIZE,
        "lora_id": None, "medium": "GPU", "lora_name": None, **fields,
    }  # fmt: skip


def removed(*names: Any, medium: str = "CPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "medium": medium}


class Node:
    """A node of 32 blocks that holds all of them, and the fleet's fold of it."""

    def __init__(self) -> None:
        self.translator = Translator("a", SIZE, {"gpu": 32})
        self.translator.epoch = 1
        self.folded = Folded(block_size=SIZE)
        self.say(stored(list(range(1, 33)), TOKENS))

    def say(self, *events: dict[str, Any]) -> None:
        self.folded.put(self.translator.apply(decode(msgspec.msgpack.encode([1.0, list(events), 0])), 1))
        assert self.held() == self.translator.held("cpu")

    def held(self) -> set[int]:
        return self.folded.held("cpu")

    def counted(self) -> dict[str, int]:
        return self.translator.oddities()


@pytest.mark.parametrize("name", [9001, b"\x90" * 32])
def test_a_larger_block_of_a_slower_tier_is_as_many_of_the_fleets(name: Any) -> None:
    node = Node()
    node.say(stored([name], TOKENS[:256], block_size=256, medium="CPU"))
    assert node.translator.wrong_size == 0
    assert node.held() == set(BLOCKS[:16])
    # The next one continues behind its end, and so does one of the usual size.
    node.say(stored([9002], TOKENS[256:], name, block_size=256, medium="CPU"))
    node.say(stored([77], [7] * SIZE, 9002, medium="CPU"))
    assert node.held() == {*BLOCKS, naive_hashes([*TOKENS, *[7] * SIZE], SIZE)[-1]}
    node.say(removed(9002, 77), removed(name))
    assert node.held() == set()
    assert node.counted() == {}
    assert node.translator.used("gpu") == 32


def test_several_of_them_in_one_store_go_one_by_one() -> None:
    node = Node()
    node.say(stored([9001, 9002], TOKENS, block_size=256, medium="CPU"))
    node.say(removed(9001))
    assert node.held() == set(BLOCKS[16:])


def test_what_does_not_divide_is_counted_and_left_out() -> None:
    node = Node()
    node.say(stored([1], TOKENS[:24], block_size=24, medium="CPU"))
    node.say(stored([1, 2], TOKENS[:16], block_size=8, medium="CPU"))
    node.say(stored([1], TOKENS[:16], block_size=0, medium="STORAGE"))
    node.say(stored([1], TOKENS[:16], block_size=-16, medium="STORAGE"))
    # Which of the sixteen blocks has the image is not said.
    node.say(stored([1], TOKENS[:256], block_size=256, medium="CPU", extra_keys=[[["ab" * 32, 0]]]))
    node.say(stored([1], TOKENS[:255], block_size=256, medium="CPU"))
    assert (node.held(), node.translator.wrong_size) == (set(), 0)
    assert node.translator.counts["indivisible"] == 6
    assert node.translator.counts["misfit"] == 1


def test_the_fast_tier_still_judges_the_size() -> None:
    node = Node()
    node.say(stored([9001], TOKENS[:256], block_size=256))
    assert node.translator.wrong_size == 256


def test_a_restarted_adapter_removes_all_of_it() -> None:
    """It has the names from the log."""
    node = Node()
    node.say(stored([9001, b"\x91" * 32], TOKENS, block_size=256, medium="CPU"))
    names = dict(node.translator._tiers["cpu"].names)
    other = Translator("a", SIZE, {"gpu": 32})
    other.restore("cpu", names)
    other.apply(decode(msgspec.msgpack.encode([1.0, [removed(9001)], 0])), 2)
    assert other.held("cpu") == set(BLOCKS[16:])
    other.apply(decode(msgspec.msgpack.encode([1.0, [removed(b"\x91" * 32)], 0])), 3)
    assert other.held("cpu") == set()


def test_what_is_only_taught_need_not_fit() -> None:
    """Batches whose effects are known already are read for their names; one that does not fit ended the adapter."""
    node = Node()
    odd = stored([50, 51], TOKENS[:8]), stored([9001], TOKENS[:256], block_size=256, medium="CPU")
    node.translator.learn(decode(msgspec.msgpack.encode([1.0, list(odd), 0])))
    node.say(stored([52], TOKENS[256:272], 9001))
    assert node.translator.used("gpu") == 32
    node.say(stored([77], [7] * SIZE, 52, medium="CPU"))
    assert node.held() == {naive_hashes([*TOKENS[:272], *[7] * SIZE], SIZE)[-1]}
