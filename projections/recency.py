"""Recency of blocks on managed nodes: what to evict first, and what must not be evicted.

The order of use is the order of the log. A use touches a chain from its end to its root, so that of one chain the
deepest block is always the least recently used: a child leaves before its parent. The blocks of requests that run on
the node are protected; a block may be protected before it is placed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvplane.events.hashing import unpack_hashes

if TYPE_CHECKING:
    from collections.abc import Collection


class Recency:
    """Order of use and protection of one managed node's blocks."""

    def __init__(self) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()
        """Held blocks, least recently used first."""
        self.protected: dict[int, int] = {}
        """How many running requests use a block."""

    def use(self, packed: bytes, *, add: bool = False) -> None:
        """Mark blocks as used now; with `add`, also those that are new here."""
        order = self.order
        for block in reversed(unpack_hashes(packed)):
            if block in order:
                order.move_to_end(block)
            elif add:
                order[block] = None

    def forget(self, packed: bytes) -> None:
        """Blocks have left the node."""
        for block in unpack_hashes(packed):
            self.order.pop(block, None)

    def clear(self) -> None:
        """All blocks have left the node; what runs is still protected."""
        self.order.clear()

    def protect(self, packed: bytes) -> None:
        """A request that uses these blocks runs."""
        protected = self.protected
        for block in unpack_hashes(packed):
            protected[block] = protected.get(block, 0) + 1

    def release(self, packed: bytes) -> None:
        """A request that used these blocks is over."""
        protected = self.protected
        for block in unpack_hashes(packed):
            count = protected.get(block, 0)
            if count <= 1:
                protected.pop(block, None)
            else:
                protected[block] = count - 1

    def victims(self, count: int, keep: Collection[int] = ()) -> list[int]:
        """The `count` least recently used blocks that may leave, fewer when there are not enough."""
        found: list[int] = []
        if count > 0:
            for block in self.order:
                if block not in self.protected and block not in keep:
                    found.append(block)
                    if len(found) == count:
                        break
        return found
