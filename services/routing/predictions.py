"""Blocks that nodes will hold soon: chains of one model's prompts, each from its root, and who was given them.

Theory. A prediction is made with every decision and forgotten within seconds, so it must cost less than the block by block
entries of `projections.prefix`. Chains lie in a tree: an edge is a run of hashes, with a bit mask of the nodes that were
given all of it and a number of blocks for those that were given its beginning only. Since chains begin at the root, they were
given all before it. A new chain is one edge that begins where it leaves those that are known, however long it is; edges
are never cut up, others branch off at positions of theirs. A request is compared with each edge on its way by one `memcmp`.

The tree can't tell where a block lies. What is taken back (`drop`) is kept as a mark beside it, which cuts a node's chains at
that block until it is given the block again. Only blocks that the node was given are ever marked (`given`); which these are
is made out when somebody asks for the first time, and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.hashing import unpack_hashes
from kvplane.projections.segment import common, lift

if TYPE_CHECKING:
    from collections.abc import Collection

_HASH_BYTES = 8


class _Edge:
    """A run of chains, and the nodes that were given it."""

    __slots__ = ("branches", "fork", "full", "heads", "run")

    def __init__(self, run: bytes, full: int) -> None:
        self.run = run
        self.full = full
        """Nodes that were given all of it, as a bit mask of ordinals."""
        self.heads: dict[int, int] = {}
        """Of the others, how many bytes they were given."""
        self.branches: dict[tuple[int, bytes], _Edge] = {}
        """Edges that go on from it, by the place in its run, in bytes, and by their first hash."""
        self.fork = 0
        """Place where a chain left it last and went on in a branch."""

    def agrees(self, packed: bytes, at: int) -> int:
        """How many bytes of the run are those of a chain from `at` on."""
        run, fork = self.run, self.fork
        if packed.startswith(run, at):
            return len(run)
        # Most leave it where others did: at the end of a system prompt, say.
        if fork and packed.startswith(run[:fork], at):
            place = at + fork
            if not packed.startswith(run[fork : fork + _HASH_BYTES], place):
                return fork
        most = min(len(run), len(packed) - at) // _HASH_BYTES
        return common(run, 0, packed, at // _HASH_BYTES, most) * _HASH_BYTES

    def branch(self, place: int, first: bytes) -> _Edge | None:
        """The edge that goes on from here with this hash."""
        edge = self.branches.get((place, first))
        if edge is not None:
            self.fork = place
        return edge

    def give(self, ordinal: int, length: int) -> None:
        """A node is given the first `length` bytes."""
        if length == len(self.run):
            self.full |= 1 << ordinal
            self.heads.pop(ordinal, None)
        elif not self.full >> ordinal & 1:
            self.heads[ordinal] = max(length, self.heads.get(ordinal, 0))


class Predictions:
    """Predicted chains of one model. Nodes go by their ordinals, their places in the columns of the load."""

    def __init__(self) -> None:
        self._roots: dict[tuple[int, bytes], _Edge] = {}
        self._nodes = 0
        """Nodes that were given anything, as a bit mask of ordinals."""
        self._marks: dict[int, set[int]] = {}
        self._given: dict[int, set[int]] = {}
        self._unlisted: dict[int, list[bytes]] = {}
        """Chains whose blocks are not in `_given` yet."""

    def store(self, ordinal: int, packed: bytes) -> None:
        """A node is given a chain, from its root on."""
        bit = 1 << ordinal
        self._nodes |= bit
        self._unlisted.setdefault(ordinal, []).append(packed)
        marks = self._marks.get(ordinal)
        if marks:
            marks.difference_update(unpack_hashes(packed))
        edges, place, at, size = self._roots, 0, 0, len(packed)
        while at < size:
            key = place, packed[at : at + _HASH_BYTES]
            edge = edges.get(key)
            if edge is None:
                edges[key] = _Edge(packed[at:], bit)
                return
            place = edge.agrees(packed, at)
            edge.give(ordinal, place)
            at += place
            edges = edge.branches

    def lift(self, packed: bytes, limit: int, lengths: list[int]) -> bool:
        """Raise each ordinal's entry to the leading blocks of a request that it was given.

        Only the first `limit` blocks count. Returns whether any node was given the first block, and keeps it.
        """
        if len(packed) > limit * _HASH_BYTES:
            packed = packed[: limit * _HASH_BYTES]
        first = edge = self._roots.get((0, packed[:_HASH_BYTES]))
        given = [0] * len(lengths) if self._marks else lengths
        at = 0
        while edge is not None:
            place = edge.agrees(packed, at)
            lift(given, edge.full, (at + place) // _HASH_BYTES)
            for ordinal, count in edge.heads.items():
                length = (at + (count if count < place else place)) // _HASH_BYTES  # noqa: FURB136 - `min` takes three times as long
                if given[ordinal] < length:  # noqa: PLR1730
                    given[ordinal] = length
            at += place
            edge = edge.branch(place, packed[at : at + _HASH_BYTES])
        if self._marks:
            self._cut(given, packed)
            lengths[:] = map(max, lengths, given)
            return any(given)
        return first is not None and bool(first.full or first.heads)

    def _cut(self, lengths: list[int], packed: bytes) -> None:
        """End what each node has before the first block that was taken back."""
        blocks: tuple[int, ...] = ()
        for ordinal, marks in self._marks.items():
            if marks and lengths[ordinal]:
                blocks = blocks or unpack_hashes(packed)
                mine = blocks[: lengths[ordinal]]
                if not marks.isdisjoint(mine):
                    lengths[ordinal] = next(at for at, block in enumerate(mine) if block in marks)

    def given(self, ordinal: int, blocks: Collection[int]) -> list[int]:
        """Those of some blocks that the node was given and keeps."""
        if not self._nodes >> ordinal & 1:
            return []
        listed = self._given.setdefault(ordinal, set())
        for packed in self._unlisted.pop(ordinal, ()):
            listed.update(unpack_hashes(packed))
        marks = self._marks.get(ordinal, ())
        return [block for block in blocks if block in listed and block not in marks]

    def drop(self, ordinal: int, blocks: Collection[int]) -> None:
        """Take back blocks that the node was given."""
        self._marks.setdefault(ordinal, set()).update(blocks)

    def clear(self, ordinal: int) -> None:
        """Take back everything from a node."""
        bit = 1 << ordinal
        if not self._nodes & bit:
            return
        self._nodes &= ~bit
        self._marks.pop(ordinal, None)
        self._given.pop(ordinal, None)
        self._unlisted.pop(ordinal, None)
        edges = list(self._roots.values())
        while edges:
            edge = edges.pop()
            if edge.full & bit or ordinal in edge.heads:
                edge.full &= ~bit
                edge.heads.pop(ordinal, None)
                edges += edge.branches.values()
