"""How a model's prompts become hashes of blocks."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from kvplane.events.hashing import format_hash, unpack_hashes

PACKED_FIELDS = {"hashes", "evicted", "stored"}
"""Fields of requests and answers that hold hashes, 8 bytes each."""


class Hashing(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the blocks of a model's prompts are hashed with, for who can't send all their tokens."""

    block_size: int
    lora: str = ""
    """LoRA adapter that the model's name is; `adapter` of a request goes before it."""
    tokenizer: str = ""
    """How prompts as text become tokens: `bytes`, or not known."""


def hashes_as_text(data: Any) -> Any:  # noqa: ANN401 - plain data of any shape
    """Plain data with its packed hashes as JSON has them."""
    if isinstance(data, dict):
        return {
            key: [format_hash(value) for value in unpack_hashes(part)]
            if key in PACKED_FIELDS and isinstance(part, bytes)
            else hashes_as_text(part)
            for key, part in data.items()
        }
    if isinstance(data, list):
        return [hashes_as_text(part) for part in data]
    return data
