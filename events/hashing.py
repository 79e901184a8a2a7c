"""Block hashes: tokens in, hashes out.

    local(block)  = XXH3-64(token ids as little-endian u32, seed 1337)
    hash(0)       = local(0)
    hash(i)       = XXH3-64(hash(i-1) as u64 LE ++ local(i) as u64 LE, seed 1337)

This is the scheme of the ecosystem (NVIDIA Dynamo's router), so hashes agree with those of other tools. The model is
not in the hash: every model has an index of its own. A LoRA or a cache salt gives block 0 another seed,
XXH3-64(lora ++ 0x00 ++ salt, seed 1337), so that tenants with other salts never share a chain. A multimodal key is
appended to the bytes of the block that holds it. A partial last block has no hash.
"""

from __future__ import annotations

import struct
import sys
from array import array
from typing import TYPE_CHECKING

from xxhash import xxh3_64_digest, xxh3_64_intdigest

from kvplane.events.errors import BadHashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SEED = 1337
MOST_TOKENS = 1 << 24
"""Longest prompt that is hashed, in tokens (16.8 million)."""

_PAIR = struct.Struct("<QQ").pack


def root_seed(lora: str = "", salt: str = "") -> int:
    """Seed of block 0."""
    if not lora and not salt:
        return SEED
    return xxh3_64_intdigest(lora.encode() + b"\0" + salt.encode(), SEED)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32. Raises `BadHashes` for ids outside 0..2^32-1 and for prompts that are too long."""
    if len(tokens) > MOST_TOKENS:
        raise BadHashes(f"prompt has {len(tokens)} tokens; the limit is {MOST_TOKENS}")
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError):
        raise BadHashes("token ids must be whole numbers from 0 to 4294967295") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def block_hashes(
    tokens: Sequence[int],
    block_size: int,
    *,
    lora: str = "",
    salt: str = "",
    parent: int | None = None,
    keys: Mapping[int, bytes] | None = None,
) -> bytes:
    """Packed hashes of the full blocks of a prompt: 8 bytes (little-endian u64) a block.

    `block_size` is in tokens. With `parent`, the tokens continue a chain whose last hash it is. `keys` maps a block's
    position to its multimodal key. Raises `BadHashes`.
    """
    if block_size < 1:
        raise BadHashes(f"block size {block_size} must be at least 1 token")
    packed = pack_tokens(tokens)
    width = block_size * 4
    seed = root_seed(lora, salt) if parent is None else SEED
    hashes = []
    for position in range(len(tokens) // block_size):
        block = packed[position * width : (position + 1) * width]
        if keys and position in keys:
            block += keys[position]
        local = xxh3_64_intdigest(block, seed)
        parent = local if parent is None else xxh3_64_intdigest(_PAIR(parent, local), SEED)
        seed = SEED
        hashes.append(parent)
    return struct.pack(f"<{len(hashes)}Q", *hashes)


def pack_hashes(hashes: Iterable[int]) -> bytes:
    """Hashes as packed little-endian u64. Raises `BadHashes` for numbers outside 0..2^64-1."""
    values = list(hashes)
    try:
        return struct.pack(f"<{len(values)}Q", *values)
    except struct.error:
        raise BadHashes("block hashes must be whole numbers from 0 to 18446744073709551615") from None


def unpack_hashes(packed: bytes) -> tuple[int, ...]:
    """Hashes of a packed string. Raises `BadHashes` when its length is no multiple of 8."""
    if len(packed) % 8:
        raise BadHashes(f"packed hashes have {len(packed)} bytes; 8 bytes a block are needed")
    return struct.unpack(f"<{len(packed) // 8}Q", packed)


def parse_hash(text: object) -> int:
    """A hash written as a number, a decimal string or a hex string (with `0x`, or 16 digits). Raises `BadHashes`."""
    if isinstance(text, str):
        digits = text.strip().lower()
        hexadecimal = digits.startswith("0x") or len(digits) == 16
        try:
            if not digits.isascii() or not digits.isalnum():
                raise ValueError  # noqa: TRY301 - int() would take signs and underscores
            value = int(digits, 16 if hexadecimal else 10)
        except ValueError:
            raise BadHashes(f"{text[:40]!r} is no block hash; write it in decimal or as 0x and hex digits") from None
    elif isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        raise BadHashes(f"a block hash is {type(text).__name__}; write it in decimal or as 0x and hex digits")
    if not 0 <= value < 1 << 64:
        raise BadHashes("block hashes must be whole numbers from 0 to 18446744073709551615")
    return value


def longest_match(tokens: int, block_size: int) -> int:
    """Most leading blocks of a prompt of so many tokens that can be matched: its last token is always computed."""
    return max(0, tokens - 1) // block_size


def format_hash(value: int) -> str:
    """A hash as 16 hex digits, as JSON and terminals show it."""
    return f"{value:016x}"


def derive_hash(*parts: bytes) -> int:
    """A hash for purposes other than blocks, such as breaking ties the same way everywhere."""
    return int.from_bytes(xxh3_64_digest(b"\0".join(parts), SEED), "big")
