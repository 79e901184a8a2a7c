"""What nodes of hybrid models hold in KV cache groups beside the one in the prefix index, and what that leaves of a match.

Layers of one kind are a group with blocks of its own, and a hit must be one in each: all of the prefix where attention is
full, the last window before its end where it slides, the last chunk where it is chunked, the one block at its end where a
state is kept (Mamba, linear attention). So the longest prefix that all can serve is looked for from the right, as vLLM's
`HybridKVCacheCoordinator` does, for all nodes at once: a node that lacks a block goes on to the left of it, since
every longer end would need that block, too.

Blocks of a group may be `span` times as large as the fleet's. Each goes by the hash of the last of those, which is that of
all the tokens before its end, and a hit ends where blocks of every group do. Nodes without further groups are not here, and
cost nothing.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import lcm
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvplane.events.types import GroupKind, GroupStored
from kvplane.projections.prefix import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvplane.events.types import GroupRemoved, NodeRegistered

_HASH_BYTES = 8


class Layout(NamedTuple):
    """What a hit needs of a group: by its kind, its window or chunk in tokens, and the fleet's blocks in one of its own."""

    kind: GroupKind
    window: int
    span: int

    def lowest(self, end: int, block_size: int) -> int:
        """First of the group's blocks that a hit needs which ends with its block before `end`."""
        size = block_size * self.span
        if self.kind == "state":
            return end - 1
        if self.kind == "sliding" and self.window:
            return max(0, end - max(1, -(-(self.window - 1) // size)))
        if self.kind == "chunked" and self.window:
            return end * size // self.window * self.window // size
        return 0


class Membership:
    """The further groups of one node: its slot in their indexes, which is one for all of them, and their layouts."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.layouts: dict[int, Layout] = {}
        self.key: tuple[tuple[int, Layout], ...] = ()
        """The layouts in the order of their groups."""

    def tell(self, layouts: Mapping[int, Layout]) -> None:
        """Have these groups, too."""
        self.layouts.update(layouts)
        self.key = tuple(sorted(self.layouts.items()))


class Member(Protocol):
    """A node, as far as its groups are concerned."""

    name: str
    registered: NodeRegistered
    groups: Membership | None

    @property
    def model(self) -> str:
        """The model whose cache this is."""


class ModelGroups:
    """The groups of one model: the nodes by their slots, and an index of blocks for each group."""

    def __init__(self) -> None:
        self.owners: list[str | None] = []
        self.indexes: dict[int, PrefixIndex] = {}


class Groups:
    """The groups of all models."""

    def __init__(self) -> None:
        self.by_model: dict[str, ModelGroups] = {}

    def apply(self, node: Member, event: GroupStored | GroupRemoved) -> bool:
        """A node has a group and blocks in it, or lost some. Whether it was not known of the node that it has the group."""
        if isinstance(event, GroupStored):
            return self._stored(node, event)
        if node.groups is not None and event.group in node.groups.layouts:
            self.by_model[node.model].indexes[event.group].remove(node.groups.slot, event.hashes)
        return False

    def _stored(self, node: Member, event: GroupStored) -> bool:
        of = self.by_model.setdefault(node.model, ModelGroups())
        member = node.groups
        if member is None:
            member = node.groups = Membership(of.owners.index(None) if None in of.owners else len(of.owners))
            of.owners[member.slot : member.slot + 1] = [node.name]
        layout = Layout(event.kind, event.window, event.span)
        before = member.layouts.get(event.group)
        index = of.indexes.setdefault(event.group, PrefixIndex())
        if before != layout:
            index.clear(member.slot)
            member.tell({event.group: layout})
        if event.hashes:
            index.store(member.slot, event.hashes)
        return before != layout

    def held(self, node: Member, group: int) -> int:
        """Blocks that a node holds in a group."""
        if node.groups is None or group not in node.groups.layouts:
            return 0
        return self.by_model[node.model].indexes[group].count(node.groups.slot)

    def packed(self, node: Member, group: int) -> bytes:
        """Those blocks, in no particular order."""
        return b"" if node.groups is None else self.by_model[node.model].indexes[group].packed(node.groups.slot)

    def clear(self, node: Member) -> None:
        """Take all blocks from a node. It still has its groups."""
        if node.groups is not None:
            for group in node.groups.layouts:
                self.by_model[node.model].indexes[group].clear(node.groups.slot)

    def release(self, node: Member) -> None:
        """The node has no groups any more."""
        if node.groups is None:
            return
        self.clear(node)
        of = self.by_model[node.model]
        of.owners[node.groups.slot] = None
        node.groups = None
        if not any(of.owners):
            del self.by_model[node.model]

    def limit(self, nodes: Sequence[Member], lengths: Sequence[int], hashes: bytes) -> list[int]:
        """What of the matches of nodes of one model that have groups every group of theirs can serve."""
        found = [0] * len(nodes)
        alike: dict[tuple[int, tuple[tuple[int, Layout], ...]], dict[int, int]] = {}
        where: dict[int, int] = {}
        for at, (node, length) in enumerate(zip(nodes, lengths, strict=True)):
            member = node.groups
            if member is None or not length:
                found[at] = length
                continue
            where[member.slot] = at
            alike.setdefault((node.registered.block_size, member.key), {})[member.slot] = length
        for (block_size, layouts), matches in alike.items():
            indexes = self.by_model[nodes[0].model].indexes
            groups = [(layout, indexes[group]) for group, layout in layouts]
            for slot, end in _ends(groups, block_size, matches, hashes):
                found[where[slot]] = end
        return found


class _Reach:
    """What slots can serve of one request in one group."""

    def __init__(self, layout: Layout, index: PrefixIndex, block_size: int, hashes: bytes) -> None:
        self.span = layout.span
        self._layout, self._index, self._block_size, self._hashes = layout, index, block_size, hashes
        self._holders: dict[int, int] = {}

    def holders(self, block: int) -> int:
        """Slots that hold one of the group's blocks, as a bit mask."""
        known = self._holders.get(block)
        if known is None:
            at = ((block + 1) * self.span - 1) * _HASH_BYTES
            known = self._holders[block] = self._index.holders(self._hashes[at : at + _HASH_BYTES])
        return known

    def needed(self, end: int) -> range:
        """The group's blocks that a hit needs which ends with this many of the fleet's, from the last one on."""
        last = end // self.span
        return range(last - 1, self._layout.lowest(last, self._block_size) - 1, -1)

    def before(self, block: int, slots: int) -> int:
        """Where hits of slots that lack a block may end, at the most."""
        if self._layout.kind != "chunked":
            # All but those of chunks need the block before their end.
            while block and not self.holders(block - 1) & slots:
                block -= 1
        return block * self.span


def _ends(
    groups: Sequence[tuple[Layout, PrefixIndex]], block_size: int, matches: Mapping[int, int], hashes: bytes
) -> Iterable[tuple[int, int]]:
    """The longest end that all groups can serve, for slots with these matches; those that have none are left out."""
    align = lcm(*(layout.span for layout, _ in groups))
    reaches = [_Reach(layout, index, block_size, hashes) for layout, index in groups]
    waiting: dict[int, int] = {}
    ends: list[int] = []

    def later(end: int, slots: int) -> None:
        end -= end % align
        if end not in waiting:
            heappush(ends, -end)
        waiting[end] = waiting.get(end, 0) | slots

    for slot, length in matches.items():
        later(length, 1 << slot)
    while ends:
        end = -heappop(ends)
        slots = waiting.pop(end)
        if not end:
            return
        for reach in reaches:
            for block in reach.needed(end):
                lacking = slots & ~reach.holders(block)
                if lacking:
                    later(reach.before(block, lacking), lacking)
                    slots ^= lacking
                    if not slots:
                        break
            if not slots:
                break
        while slots:
            slot = slots.bit_length() - 1
            slots ^= 1 << slot
            yield slot, end
