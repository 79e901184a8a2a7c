"""Blocks that nodes will hold soon: chains of one model's prompts, each from its root, and who was given them.

Theory. A prediction is made with every decision and forgotten within seconds, so it must cost less than the block by block
entries of `projections.prefix`. Chains lie in a radix tree: an edge is a run of hashes with a bit mask of the slots that
were given all of it and, since chains begin at the root, all before it. A new chain is one entry where it leaves those that
are known, however long it is; a request is compared with each edge by one `memcmp`.

The tree can't tell where a block lies. What is taken back (`drop`) is kept as a mark beside it, which cuts a slot's chains at
that block until it is given the block again. Only blocks that the slot was given are ever marked (`given`); which these are
is made out when somebody asks for the first time, and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from events.hashing import unpack_hashes
from projections.segment import common, fill

if TYPE_CHECKING:
    from collections.abc import Collection

_HASH_BYTES = 8


class _Edge:
    """A run of chains, and the slots that were given all of it."""

    __slots__ = ("mask", "next", "run")

    def __init__(self, run: bytes, mask: int, following: dict[bytes, _Edge] | None = None) -> None:
        self.run = run
        self.mask = mask
        self.next = following
        """Edges that go on from its end, by their first hash."""

    def split(self, count: int) -> None:
        """End after `count` blocks; the rest becomes an edge that goes on from there."""
        at = count * _HASH_BYTES
        rest = _Edge(self.run[at:], self.mask, self.next)
        self.run, self.next = self.run[:at], {rest.run[:_HASH_BYTES]: rest}


class Predictions:
    """Predicted chains of one model. A slot is the ordinal of a node."""

    def __init__(self) -> None:
        self._roots: dict[bytes, _Edge] = {}
        self._slots = 0
        """Slots that were given anything, as a bit mask."""
        self._marks: dict[int, set[int]] = {}
        self._given: dict[int, set[int]] = {}
        self._unlisted: dict[int, list[bytes]] = {}
        """Chains whose blocks are not in `_given` yet."""

    def store(self, slot: int, packed: bytes) -> None:
        """A slot is given a chain, from its root on."""
        bit = 1 << slot
        self._slots |= bit
        self._unlisted.setdefault(slot, []).append(packed)
        marks = self._marks.get(slot)
        if marks:
            marks.difference_update(unpack_hashes(packed))
        edges, at, size = self._roots, 0, len(packed)
        while at < size:
            edge = edges.get(packed[at : at + _HASH_BYTES])
            if edge is None:
                edges[packed[at : at + _HASH_BYTES]] = _Edge(packed[at:], bit)
                return
            length = len(edge.run)
            if not packed.startswith(edge.run, at):
                count = common(edge.run, 0, packed, at // _HASH_BYTES, min(length, size - at) // _HASH_BYTES)
                edge.split(count)
                length = count * _HASH_BYTES
            edge.mask |= bit
            at += length
            if edge.next is None:
                edge.next = {}
            edges = edge.next

    def match(self, packed: bytes, limit: int, slots: int) -> list[int]:
        """Leading blocks of a request that each of so many slots was given; only the first `limit` blocks count."""
        lengths = [0] * max(slots, self._slots.bit_length())
        size = min(len(packed), limit * _HASH_BYTES)
        edges: dict[bytes, _Edge] | None = self._roots
        alive, at = -1, 0
        while at < size and edges:
            edge = edges.get(packed[at : at + _HASH_BYTES])
            if edge is None:
                break
            length = len(edge.run)
            whole = at + length <= size and packed.startswith(edge.run, at)
            if not whole:
                length = (
                    common(edge.run, 0, packed, at // _HASH_BYTES, min(length, size - at) // _HASH_BYTES) * _HASH_BYTES
                )
            on = alive & edge.mask
            if at:
                fill(lengths, alive & ~on, at // _HASH_BYTES)
            alive, at = on, at + length
            if not alive or not whole:
                break
            edges = edge.next
        if at:
            fill(lengths, alive, at // _HASH_BYTES)
        if self._marks:
            self._cut(lengths, packed)
        return lengths

    def _cut(self, lengths: list[int], packed: bytes) -> None:
        """End what each slot has before the first block that was taken back."""
        blocks: tuple[int, ...] = ()
        for slot, marks in self._marks.items():
            if marks and lengths[slot]:
                blocks = blocks or unpack_hashes(packed)
                mine = blocks[: lengths[slot]]
                if not marks.isdisjoint(mine):
                    lengths[slot] = next(at for at, block in enumerate(mine) if block in marks)

    def knows(self, packed: bytes) -> bool:
        """Whether any slot was given the first block of a request, and keeps it."""
        edge = self._roots.get(packed[:_HASH_BYTES])
        if edge is None:
            return False
        left = edge.mask
        first = int.from_bytes(packed[:_HASH_BYTES], "little")
        for slot, marks in self._marks.items():
            if first in marks:
                left &= ~(1 << slot)
        return left != 0

    def given(self, slot: int, blocks: Collection[int]) -> list[int]:
        """Those of some blocks that the slot was given and keeps."""
        if not self._slots >> slot & 1:
            return []
        listed = self._given.setdefault(slot, set())
        for packed in self._unlisted.pop(slot, ()):
            listed.update(unpack_hashes(packed))
        marks = self._marks.get(slot, ())
        return [block for block in blocks if block in listed and block not in marks]

    def drop(self, slot: int, blocks: Collection[int]) -> None:
        """Take back blocks that the slot was given."""
        self._marks.setdefault(slot, set()).update(blocks)

    def clear(self, slot: int) -> None:
        """Take back everything from a slot."""
        bit = 1 << slot
        if not self._slots & bit:
            return
        self._slots &= ~bit
        self._marks.pop(slot, None)
        self._given.pop(slot, None)
        self._unlisted.pop(slot, None)
        edges = list(self._roots.values())
        while edges:
            edge = edges.pop()
            if edge.mask & bit:
                edge.mask &= ~bit
                edges += (edge.next or {}).values()
