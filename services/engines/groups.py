"""The further KV cache groups of an engine with a hybrid model, beside the one that is followed as its cache. Pure.

A group's stores name blocks as the followed group does, but often only some of those that their tokens cover, and which is not
said. So a block is known by its name, or by its tokens where a store has all of its blocks; what is known by neither is
left out and counted. A group is told before anything else of the batch in which it is first seen, so that no more is foretold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import block_hashes, pack_hashes, unpack_hashes
from kvplane.events.types import LENGTH_LIMIT, GroupRemoved, GroupStored
from kvplane.services.engines.dialect import Removed, Stored
from kvplane.services.engines.holding import Holding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvplane.events.types import EngineHash, Event, GroupKind

GROUPS_FORMAT = 5
"""From this format of the log on, groups can be told."""
NUMBERS = range(64)
"""Groups that the log takes."""
MOST_SPAN = 65536
EVENT_BLOCKS = 4096
"""Most blocks in one event."""
_KINDS: dict[str, GroupKind] = {
    "sliding_window": "sliding", "sliding_window_mla": "sliding", "chunked_local_attention": "chunked", "mamba": "state",
}  # fmt: skip


class Group:
    """What an engine holds in one group."""

    def __init__(self, kind: GroupKind, window: int, span: int) -> None:
        self.kind, self.window, self.span = kind, window, span
        self.holding = Holding()
        self.told = False
        """Whether the fleet was told that there is this group."""
        self.unfit = 0
        """Tokens in the group's blocks, where those are no whole number of the fleet's."""


class Groups:
    """All of an engine's groups but the followed one, by the engine's numbers."""

    def __init__(
        self, node: str, block_size: int, counts: dict[str, int], block_of: Callable[[EngineHash], int | None]
    ) -> None:
        self.tells = False
        """Whether the log takes what groups hold."""
        self.by_number: dict[int, Group] = {}
        self._node, self._block_size = node, block_size
        self._counts = counts
        self._block_of = block_of

    @property
    def untold(self) -> bool:
        """Whether there are groups, and the log's format is too old for them."""
        return bool(self.by_number) and not self.tells

    def trouble(self) -> str:
        """Why hits of this node are not foretold exactly, in a sentence; empty when they are."""
        if self.untold:
            return (
                "hits of this hybrid model are foretold by its full attention alone, and may not be delivered: the log is in a "
                f"format before {GROUPS_FORMAT}; `kvplane format raise` raises it"
            )
        for number, group in self.by_number.items():
            if group.unfit:
                return (
                    f"no hits are foretold: the blocks of the engine's KV cache group {number} have {group.unfit} tokens, no "
                    f"whole number of this node's blocks of {self._block_size}"
                )
        return ""

    def clear(self) -> None:
        """Nothing is known to be held any more."""
        for group in self.by_number.values():
            group.holding.clear()
            group.told = False

    def see(self, stored: Stored) -> Group:
        """The group of a store, which is there from then on."""
        number = stored.group or 0
        group = self.by_number.get(number)
        if group is None:
            span, rest = divmod(stored.block_size, self._block_size)
            kind = _KINDS.get(stored.kind, "full")
            if kind in {"sliding", "chunked"} and not 0 < stored.window <= LENGTH_LIMIT:
                # As far as it is known, all of it is needed.
                kind = "full"
            group = Group(kind, stored.window if kind in {"sliding", "chunked"} else 0, span)
            if number in NUMBERS:
                self.by_number[number] = group
            if rest or not 0 < span <= MOST_SPAN:
                group.kind, group.window, group.span, group.unfit = "full", 0, 1, stored.block_size
        return group

    def restore(self, number: int, group: Group, names: Mapping[EngineHash, int]) -> None:
        """Have a group that is known from elsewhere, with one copy of each of its blocks."""
        group = self.by_number.setdefault(number, group)
        for name, block in names.items():
            if name not in group.holding.names:
                group.holding.add(name, block)

    def apply(
        self, waiting: Iterable[Stored | Removed], epoch: int, batch: int, *, again: bool
    ) -> tuple[list[Event], list[Event]]:
        """What stores and removals of further groups mean: groups that were not told before, and what is of their blocks."""
        new, then = _Out(self._node, epoch, batch), _Out(self._node, epoch, batch)
        for event in waiting:
            number = event.group or 0
            group = self.see(event) if isinstance(event, Stored) else self.by_number.get(number)
            if group is None or number not in NUMBERS or event.tier != "gpu":
                self._counts["other_group"] += len(event.hashes)
                continue
            if not group.told:
                group.told = True
                new.stored(number, group, [], [])
            if isinstance(event, Removed):
                then.removed(number, self._dropped(group, event))
            else:
                names, blocks = self._taken(group, event, again=again)
                if blocks:
                    then.stored(number, group, names, blocks)
        return (new.done(), then.done()) if self.tells else ([], [])

    def _dropped(self, group: Group, removed: Removed) -> list[int]:
        gone: list[int] = []
        self._counts["removed"] += len(removed.hashes)
        for name in removed.hashes:
            if name in group.holding.names:
                gone += group.holding.drop(name)
            else:
                self._counts["unknown_removed"] += 1
        return gone

    def _taken(self, group: Group, stored: Stored, *, again: bool) -> tuple[list[EngineHash], list[int]]:
        names, blocks = [], []
        self._counts["stored"] += len(stored.hashes)
        for name, block in zip(stored.hashes, self._blocks(group, stored), strict=True):
            if block is None:
                self._counts["indivisible" if group.unfit else "unnamed"] += 1
            elif not (again and name in group.holding.names) and group.holding.add(name, block):
                names.append(name)
                blocks.append(block)
        return names, blocks

    def _blocks(self, group: Group, stored: Stored) -> Sequence[int | None]:
        """The fleet's blocks with which those of a store end; none where that is not known."""
        if group.unfit or stored.block_size != group.span * self._block_size:
            return [None] * len(stored.hashes)
        blocks = [self._block_of(name) for name in stored.hashes]
        parent = None if stored.parent is None else self._block_of(stored.parent)
        whole = len(stored.tokens) == len(blocks) * stored.block_size and (stored.parent is None or parent is not None)
        # Which of the fleet's blocks has a multimodal item is not said.
        if None not in blocks or not whole or (stored.keys and group.span > 1):
            return blocks
        try:
            packed = block_hashes(
                stored.tokens, self._block_size, lora=stored.lora, salt=stored.salt, parent=parent, keys=stored.keys
            )
        except BadHashes:
            return blocks
        return unpack_hashes(packed)[group.span - 1 :: group.span]

    def report(self, epoch: int, batch: int) -> list[Event]:
        """All groups and all that is held in them, for a fleet that knows nothing of it."""
        out = _Out(self._node, epoch, batch)
        for number, group in self.by_number.items():
            group.told = True
            out.stored(number, group, list(group.holding.names), list(group.holding.names.values()))
        return out.done() if self.tells else []

    def most_copies(self) -> int:
        """Copies of blocks that the group has which has most."""
        return max((group.holding.copies for group in self.by_number.values()), default=0)

    def trim(self, epoch: int, batch: int, most: int) -> list[Event]:
        """Take back copies that were reported more often than they can exist."""
        out = _Out(self._node, epoch, batch)
        for number, group in self.by_number.items():
            holding = group.holding
            while holding.copies > most and holding.doubtful:
                self._counts["trimmed"] += 1
                out.removed(number, holding.trim())
        return out.done() if self.tells else []


class _Out:
    """Events of groups, in order; removals from one that follow each other are one."""

    def __init__(self, node: str, epoch: int, batch: int) -> None:
        self._of = (node, epoch, batch)
        self._events: list[Event] = []
        self._gone: list[int] = []
        self._gone_group = 0

    def stored(self, number: int, group: Group, names: list[EngineHash], blocks: list[int]) -> None:
        """Blocks of a group; without any, that it is there."""
        self._flush()
        for at in range(0, max(1, len(blocks)), EVENT_BLOCKS):
            part = blocks[at : at + EVENT_BLOCKS]
            self._events.append(
                GroupStored(
                    *self._of, number, group.kind, pack_hashes(part), group.window, group.span,
                    names[at : at + EVENT_BLOCKS] if part else None,
                )
            )  # fmt: skip

    def removed(self, number: int, blocks: list[int]) -> None:
        """Blocks that left a group."""
        if number != self._gone_group:
            self._flush()
            self._gone_group = number
        self._gone += blocks

    def done(self) -> list[Event]:
        """All of them."""
        self._flush()
        return self._events

    def _flush(self) -> None:
        gone, self._gone = self._gone, []
        for at in range(0, len(gone), EVENT_BLOCKS):
            self._events.append(GroupRemoved(*self._of, self._gone_group, pack_hashes(gone[at : at + EVENT_BLOCKS])))
