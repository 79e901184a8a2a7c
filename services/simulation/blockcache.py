"""The block cache of a simulated node, as engines have it: reference counts, least recently used first, children first."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Allocation(NamedTuple):
    """What a request found and caused. `stored` continues the chain behind its `cached` leading blocks."""

    cached: int
    stored: tuple[int, ...]
    evicted: tuple[int, ...]


class BlockCache:
    """Blocks of one node, up to `capacity`. A block is either used by requests that run, or idle and may be evicted."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: dict[int, int] = {}
        """Users of each block."""
        self.private = 0
        """Blocks in use that nobody else can find: of answers, and of the unfinished ends of prompts."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks without users, least recently used first."""

    def fill(self, blocks: Iterable[int]) -> None:
        """Hold these blocks, least recently used first, that nobody uses yet; of too many the last ones."""
        for block in deque(blocks, maxlen=self.capacity):
            self.blocks[block] = 0
            self._idle[block] = None

    def leading(self, hashes: tuple[int, ...]) -> int:
        """How many leading blocks are here."""
        count = 0
        for block in hashes:
            if block not in self.blocks:
                break
            count += 1
        return count

    def start(self, hashes: tuple[int, ...], private: int = 0) -> Allocation | None:
        """Take a request's blocks into use, evicting for those that are new; none when there is no room now."""
        blocks, idle = self.blocks, self._idle
        cached = self.leading(hashes)
        # A later block may be here although one before it is not: it is used again, not stored twice.
        stored = tuple(block for block in dict.fromkeys(hashes[cached:]) if block not in blocks)
        wanted = dict.fromkeys(hashes)
        need = len(blocks) + len(stored) + self.private + private - self.capacity
        if need > 0 and need > len(idle) - sum(block in idle for block in wanted):
            return None
        for block in wanted:
            users = blocks.get(block, 0)
            if not users:
                idle.pop(block, None)
            blocks[block] = users + 1
        evicted = self._evict(need)
        self.private += private
        return Allocation(cached, stored, evicted)

    def _evict(self, count: int) -> tuple[int, ...]:
        """Give up so many idle blocks, if it is more than none."""
        evicted = tuple(self._idle.popitem(last=False)[0] for _ in range(count))
        for block in evicted:
            del self.blocks[block]
        return evicted

    def finish(self, hashes: tuple[int, ...], private: int = 0) -> None:
        """A request is over. Its deepest block becomes the least recently used of its chain."""
        self.private -= private
        for block in dict.fromkeys(reversed(hashes)):
            self.blocks[block] -= 1
            if not self.blocks[block]:
                self._idle[block] = None
