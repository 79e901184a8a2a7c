"""What is stored and asked in the index benchmarks, the same in both interpreters. Standard library only.

A chain is 256 random block hashes, packed as little-endian u64. Chain c is stored on node c modulo 64.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = 64
CHAIN = 256
"""Blocks of a chain."""


def chains(seed: int, count: int) -> list[bytes]:
    """Random chains, always the same for the same seed."""
    draw = random.Random(seed)
    return [draw.randbytes(CHAIN * 8) for _ in range(count)]


def pieces(chain: bytes, size: int) -> Iterator[tuple[bytes, int | None]]:
    """A chain as runs of `size` blocks, each with the hash before its first."""
    parent = None
    for at in range(0, len(chain), size * 8):
        piece = chain[at : at + size * 8]
        yield piece, parent
        parent = int.from_bytes(piece[-8:], "little")


def numbers(packed: bytes) -> list[int]:
    """Hashes of a packed string."""
    return list(struct.unpack(f"<{len(packed) // 8}Q", packed))


def holdings(kind: str, seed: int, count: int, size: int) -> Iterator[tuple[int, bytes, int | None]]:
    """Who holds how much of each of `count` chains: node, run of at most `size` blocks, hash before it.

    `same`: all nodes hold whole chains, and reported them in turn. `differ`: each of the 64 another length, 4 to 256
    blocks, in no order.
    """
    draw = random.Random(seed + 1)
    for chain in chains(seed, count):
        if kind == "same":
            for piece, parent in pieces(chain, size):
                for node in range(NODES):
                    yield node, piece, parent
            continue
        lengths = [(node + 1) * CHAIN // NODES for node in range(NODES)]
        draw.shuffle(lengths)
        for node, length in enumerate(lengths):
            for piece, parent in pieces(chain[: length * 8], size):
                yield node, piece, parent
