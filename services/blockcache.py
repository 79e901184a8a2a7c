"""The block cache of a simulated node, as engines have it: reference counts, least recently used first, children first."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple


class Allocation(NamedTuple):
    """What a request found and caused. `stored` continues the chain behind its `cached` leading blocks."""

    cached: int
    stored: tuple[int, ...]
    evicted: tuple[int, ...]


class BlockCache:
    """Blocks of one node, up to `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[int, int] = OrderedDict()
        """Users of each block, least recently used first."""

    def leading(self, hashes: tuple[int, ...]) -> int:
        """How many leading blocks are here."""
        count = 0
        for block in hashes:
            if block not in self.blocks:
                break
            count += 1
        return count

    def start(self, hashes: tuple[int, ...]) -> Allocation | None:
        """Take a request's blocks into use, evicting for those that are new; none when there is no room now."""
        cached = self.leading(hashes)
        # A later block may be here although one before it is not: it is used again, not stored twice.
        stored = tuple(block for block in dict.fromkeys(hashes[cached:]) if block not in self.blocks)
        need = len(self.blocks) + len(stored) - self.capacity
        evicted: list[int] = []
        if need > 0:
            wanted = set(hashes)
            for block, users in self.blocks.items():
                if not users and block not in wanted:
                    evicted.append(block)
                    if len(evicted) == need:
                        break
            if len(evicted) < need:
                return None
        for block in evicted:
            del self.blocks[block]
        for block in stored:
            self.blocks[block] = 0
        for block in dict.fromkeys(hashes):
            self.blocks[block] += 1
        return Allocation(cached, stored, tuple(evicted))

    def finish(self, hashes: tuple[int, ...]) -> None:
        """A request is over. Its deepest block becomes the least recently used of its chain."""
        for block in dict.fromkeys(reversed(hashes)):
            self.blocks[block] -= 1
            self.blocks.move_to_end(block)
