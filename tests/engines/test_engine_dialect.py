"""Batches of engines in every dialect, and bytes that are none."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.engines.dialect import Cleared, Removed, Stored, decode, multimodal_key
from kvplane.services.protocol.errors import BadBatch

pack = msgspec.msgpack.encode
DIGEST = "00112233445566778899aabbccddeeff" * 2


def one(event: Any) -> Any:
    (decoded,) = decode(pack([1.5, [event], 3])).events
    return decoded


def stored(**fields: Any) -> Any:
    return one({
        "type": "BlockStored", "block_hashes": [11, 12], "parent_block_hash": None, "token_ids": [1, 2, 3, 4],
        "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None, **fields,
    })  # fmt: skip


def test_maps_arrays_and_a_batch_that_is_a_map_say_the_same() -> None:
    as_map = stored(group_idx=0, kv_cache_spec_kind="full_attention", extra_keys=[["salty"], None])
    as_array = one([
        "BlockStored", [11, 12], None, [1, 2, 3, 4], 2, None, "GPU", None, [["salty"], None], 0, "full_attention",
    ])  # fmt: skip
    assert as_map == as_array
    assert as_map == Stored(
        [11, 12], None, [1, 2, 3, 4], 2, "gpu", "", "salty", None, 0, full=True, kind="full_attention"
    )
    event = {"type": "BlockRemoved", "block_hashes": [b"x" * 32], "medium": "CPU", "group_idx": 1}
    batch = decode(pack({"ts": 1.0, "events": [event], "data_parallel_rank": 2, "whatever": {}}))
    assert batch.events == decode(pack([1.0, [["BlockRemoved", [b"x" * 32], "CPU", 1]], 2])).events
    assert batch.events == [Removed([b"x" * 32], "cpu", 1)]
    assert batch.rank == 2
    assert decode(pack([1.0, [["AllBlocksCleared"]]])) == ([Cleared()], None, {})


def test_sglang_leaves_out_what_is_nothing_and_ends_an_array_with_the_salt() -> None:
    short = one(["BlockStored", [-5], 7, [1, 2], 2, None])
    assert short == Stored([-5], 7, [1, 2], 2, "gpu", "", "", None, None, full=True)
    assert one(["BlockStored", [5], None, [1, 2], 2, None, "GPU", {"cache_salt": "t"}]).salt == "t"
    assert one(["BlockStored", [5], None, [1, 2], 2, None, "CPU_PINNED", [["t"]]])[4:7] == ("cpu", "", "t")
    assert stored(cache_salt="t").salt == "t"
    assert one(["BlockRemoved", [5]]) == Removed([5], "gpu", None)


def test_what_else_is_hashed_is_told_apart() -> None:
    bare = stored(lora_name="ad", extra_keys=[["ad", [DIGEST, 1], "ad"], ["ad", [DIGEST, -1]]])
    assert (bare.lora, bare.salt, bare.keys) == ("ad", "ad", {0: multimodal_key(DIGEST), 1: multimodal_key(DIGEST)})
    typed = stored(
        lora_name=None,
        extra_keys=[
            [
                {"type": "lora", "name": "ad"},
                {"type": "mm", "modality": "image", "hash": DIGEST, "block_offset": 1},
                {"type": "cache_salt", "salt": "ad"},
            ],
            [{"type": "mm", "hash": DIGEST, "block_offset": -1}],
        ],
    )
    assert typed == bare
    assert multimodal_key(DIGEST) == bytes.fromhex("7766554433221100")
    # Beyond the root there is no salt: an older vLLM names images by bare strings.
    older = stored(parent_block_hash=9, extra_keys=[[DIGEST], ["cat"]])
    assert (older.salt, older.keys) == ("", {0: multimodal_key(DIGEST), 1: b"cat"})
    assert stored(extra_keys=[[b"\1\2"], None]).keys == {0: b"\1\2"}
    assert stored(lora_id=4).lora == "4"


def test_places_that_are_not_the_engines_own_are_no_tier() -> None:
    assert stored(medium=None).tier == "gpu"
    assert stored(medium="STORAGE").tier == "disk"
    assert stored(medium="CPU", locality="LOCAL").tier == "cpu"
    assert stored(medium="STORAGE", locality="REMOTE").tier is None
    assert stored(medium="MOON").tier is None


def test_only_full_attention_is_full() -> None:
    kinds = ["full_attention", "mla_attention", "sliding_window", "mamba", "chunked_local_attention"]
    assert [stored(kv_cache_spec_kind=kind).full for kind in kinds] == [True, True, False, False, False]
    assert [stored(kv_cache_spec_kind=kind).kind for kind in kinds] == kinds
    windows = [128, None, -1, "x", True]
    assert [stored(kv_cache_spec_sliding_window=window).window for window in windows] == [128, 0, 0, 0, 0]


def test_events_of_unknown_types_are_counted() -> None:
    batch = decode(pack([1.0, [{"type": "BlockMoved", "x": 1}, ["BlockMoved"], {"type": "AllBlocksCleared"}]]))
    assert batch.unknown == {"BlockMoved": 2}
    assert batch.events == [Cleared()]


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", pack(3), pack([]), pack([1.0]), pack([1.0, 5]), pack([1.0, [5]]), pack({"ts": 1}),
        pack([1.0, [["BlockRemoved"]]]), pack([1.0, [{"type": "BlockRemoved"}]]),
        pack([1.0, [["BlockRemoved", ["text"]]]]), pack([1.0, [["BlockStored", [1], None, "tokens", 2]]]),
        pack([1.0, [["BlockStored", [1], [1], [1, 2], 2]]]),
    ],
)  # fmt: skip
def test_what_can_not_be_understood_is_refused(payload: bytes) -> None:
    with pytest.raises(BadBatch):
        decode(payload)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=12,
)
FIELDS = st.dictionaries(
    st.sampled_from([
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "extra_keys", "group_idx",
        "lora_name", "cache_salt", "kv_cache_spec_kind", "locality",
    ]),
    JSON,
)  # fmt: skip


@given(
    st.lists(
        st.builds(lambda kind, rest: {"type": kind, **rest}, st.sampled_from(["BlockStored", "BlockRemoved"]), FIELDS)
        | JSON
    )
)
def test_no_bytes_raise_anything_else(events: list[Any]) -> None:
    for payload in (pack([1.0, events]), pack(events), pack({"events": events})):
        try:
            decode(payload)
        except BadBatch:
            continue
