"""Which blocks an engine holds in one tier, under which names, in how many copies, and what it held before. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.types import EngineHash


class Holding:
    """The blocks of one tier. A name means one block; a block rarely has several names, and a name rarely several copies."""

    def __init__(self) -> None:
        self.names: dict[EngineHash, int] = {}
        """Block of each name of which there is a copy."""
        self.blocks: set[int] = set()
        self.copies = 0
        """Copies of all names together."""
        self.shared: dict[EngineHash, int] = {}
        """Copies of the names that have more than one, longest ago first."""
        self._shared_once: dict[EngineHash, None] = {}
        """Names that had more than one, and have one."""
        self._aliases: dict[int, int] = {}
        """How many names a block has, for those that have several."""

    def clear(self) -> None:
        """Hold nothing."""
        self.__init__()  # type: ignore[misc]

    def add(self, name: EngineHash, block: int) -> bool:
        """One more copy of a name. True when the tier did not hold the block before."""
        self.copies += 1
        if name in self.names:
            self.shared[name] = self.shared.get(name, 1) + 1
            self._shared_once.pop(name, None)
            return False
        self.names[name] = block
        if block in self.blocks:
            self._aliases[block] = self._aliases.get(block, 1) + 1
            return False
        self.blocks.add(block)
        return True

    def add_all(self, names: Sequence[EngineHash], blocks: Sequence[int]) -> bool:
        """The first copies of names, if neither they nor their blocks are held or named twice; nothing otherwise."""
        known, held = self.names, self.blocks
        if len(set(blocks)) != len(blocks) or len(set(names)) != len(names):
            return False
        if not (held.isdisjoint(blocks) and known.keys().isdisjoint(names)):
            return False
        known.update(zip(names, blocks, strict=True))
        held.update(blocks)
        self.copies += len(names)
        return True

    def drop(self, name: EngineHash) -> list[int]:
        """One copy less of a name that is held. The block, when it is held no longer."""
        self.copies -= 1
        copies = self.shared.pop(name, 1)
        if copies > 1:
            if copies > 2:
                self.shared[name] = copies - 1
            else:
                self._shared_once[name] = None
            return []
        self._shared_once.pop(name, None)
        block = self.names.pop(name)
        aliases = self._aliases.pop(block, 1) - 1
        if aliases:
            if aliases > 1:
                self._aliases[block] = aliases
            return []
        self.blocks.discard(block)
        return [block]

    def drop_all(self, name: EngineHash) -> list[int]:
        """No copy of a name that is held. The block, when it is held no longer."""
        self.copies -= self.shared.pop(name, 1) - 1
        return self.drop(name)

    @property
    def doubtful(self) -> bool:
        """Whether any name ever had more copies than one."""
        return bool(self.shared or self._shared_once)

    def trim(self) -> list[int]:
        """One copy less of a name that has several, or else had. The block, when it is held no longer."""
        return self.drop(next(iter(self.shared or self._shared_once)))


class Former:
    """The last names of blocks that are held no longer.

    There are two generations, since a dictionary from which the first entry is taken again and again looks each time at all
    places that became empty before.
    """

    def __init__(self, most: int) -> None:
        self._half = most // 2
        self._young: dict[EngineHash, int] = {}
        self._old: dict[EngineHash, int] = {}

    def put(self, name: EngineHash, block: int) -> None:
        """Remember what a name means."""
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[name] = block

    def get(self, name: EngineHash) -> int | None:
        """The block that a name meant last; none when that is not remembered."""
        block = self._young.get(name)
        return self._old.get(name) if block is None else block
