"""How a model's prompts become hashes of blocks."""

from __future__ import annotations

from msgspec import Struct


class Hashing(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the blocks of a model's prompts are hashed with, for who can't send all their tokens."""

    block_size: int
    lora: str = ""
    """LoRA adapter that the model's name is; `adapter` of a request goes before it."""
    tokenizer: str = ""
    """How prompts as text become tokens: `bytes`, or not known."""
