"""An engine's events as events of the fleet. Pure.

The engine's hashes are only names here: every block gets the fleet's own hash, computed from its tokens, its LoRA, its
salt and the block before it. The translator knows which names the engine holds, how many copies of each, and in which tier;
events name a block once when its first copy comes, and once when the last one goes.

What can't be known is never guessed: a block whose chain is unknown is left out and counted, and a removal that can be
understood in two ways removes. So the fleet may know less than the engine holds, and never more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import block_hashes, pack_hashes, unpack_hashes
from kvplane.events.types import BlocksRemoved, BlocksStored, CacheCleared
from kvplane.services.engines.dialect import Cleared, Removed, Stored
from kvplane.services.engines.groups import Group, Groups
from kvplane.services.engines.holding import Former, Holding
from kvplane.services.engines.parts import part, parts, parts_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvplane.events.types import EngineHash, Event, Tier
    from kvplane.services.engines.dialect import Batch

FORMER_NAMES = 65536
"""Names of blocks no longer held that are remembered: children and copies in slower tiers may still refer to them."""
EVENT_BLOCKS = 4096
"""Most blocks in one event."""
MISFITS = 3
"""So many stores, none of which could be understood, are no accident."""
UNKNOWN_TYPES = 64
"""Most types of unknown events that are counted by name."""

COUNTS = {
    "stored": "copies of blocks that the engine stored",
    "removed": "copies of blocks that the engine removed",
    "cleared": "times that the engine cleared its cache",
    "lost_parent": "blocks whose parent was never reported, so that their content is unknown",
    "unknown_removed": "removals of blocks that are not known to be held",
    "unnamed": "blocks that were stored by a name that is not known, without their tokens",
    "partial": "entries of less than a block",
    "indivisible": "blocks of a slower tier or a further group that are no whole number of the fleet's",
    "misfit": "stores whose tokens are not those of their blocks",
    "other_group": "blocks of KV cache groups that are not followed, or not there",
    "elsewhere": "blocks in places that are not this engine's own",
    "ambiguous": "names that the engine gave to two contents",
    "overfull": "times that more blocks were reported as held than fit, so that all were forgotten",
    "trimmed": "copies that were reported more often than they can exist",
}
"""What a translator counts, beside events of unknown types."""
UNKNOWN = "unknown:"
"""Before such a type in the names of what is counted."""


class Translator:
    """What one engine holds, in its own names and in the fleet's hashes."""

    def __init__(self, node: str, block_size: int, capacity: Mapping[Tier, int] | None = None) -> None:
        self.node = node
        self.block_size = block_size
        self.epoch = 0
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.wrong_size = 0
        """A block size of the engine's fast tier that is not this node's; 0 while there is none."""
        self._misfits = 0
        """Stores that did not fit, since the last that did."""
        self._capacity = capacity or {}
        self._tiers: dict[Tier, Holding] = {}
        self._former = Former(FORMER_NAMES)
        self._group: int | None = None
        self._others: set[int] = set()
        self.groups = Groups(node, block_size, self.counts, self._block)
        """The further groups of a hybrid model."""
        self._aside: list[Stored | Removed] = []
        """Of the batch that is applied, what is of those."""
        self._parts = 0
        """Into how many of the fleet's blocks one of a slower tier was split at the most."""

    def oddities(self) -> dict[str, int]:
        """What was counted beside the ordinary, rounded down to a power of two, so that a stream of it is worth a few lines."""
        return {
            name: 1 << (count.bit_length() - 1)
            for name, count in self.counts.items()
            if count and name not in {"stored", "removed", "cleared"}
        }

    def held(self, tier: Tier = "gpu") -> set[int]:
        """Block hashes that the engine holds in a tier."""
        holding = self._tiers.get(tier)
        return set(holding.blocks) if holding else set()

    def tiers(self) -> list[Tier]:
        """Tiers in which anything was ever held."""
        return list(self._tiers)

    def used(self, tier: Tier = "gpu") -> int:
        """How many different blocks the engine holds in a tier."""
        holding = self._tiers.get(tier)
        return len(holding.blocks) if holding else 0

    def clear(self) -> None:
        """Nothing is known to be held any more. Names keep their meaning: they are hashes of content."""
        for holding in self._tiers.values():
            for name, block in holding.names.items():
                self._former.put(name, block)
            holding.clear()
        self.groups.clear()

    def forget(self) -> None:
        """Know nothing: names of another life may mean something else."""
        self._tiers, self._former, self._group, self._others = {}, Former(FORMER_NAMES), None, set()
        self.groups.by_number.clear()
        self._parts = 0
        self._misfits = 0

    def overfull(self) -> str:
        """More is held than fits, in a sentence: removals were lost, or the capacity is not the engine's. Empty otherwise."""
        for tier, most in self._capacity.items():
            holding = self._tiers.get(tier)
            copies = max(0 if holding is None else holding.copies, self.groups.most_copies() if tier == "gpu" else 0)
            if copies > most:
                return (
                    f"the engine reported {copies:,} blocks as held and {most:,} fit: its removals were lost, or "
                    "--capacity-blocks is too small"
                )
        return ""

    def misfits(self) -> str:
        """That no store of the engine's fits its blocks, in a sentence; empty when one did a short while ago."""
        if self._misfits < MISFITS:
            return ""
        return (
            f"none of the engine's last {self._misfits:,} stores of blocks could be understood: their tokens are not those of "
            f"blocks of {self.block_size}; is its version newer than this kvplane?"
        )

    def restore(self, tier: Tier, names: Mapping[EngineHash, int]) -> None:
        """Hold what is known from elsewhere, one copy each."""
        holding = self._holding(tier)
        self._parts = max(self._parts, parts_named(names))
        for name, block in names.items():
            if name not in holding.names:
                holding.add(name, block)

    def restore_group(self, number: int, group: Group, names: Mapping[EngineHash, int]) -> None:
        """Have a further group, and hold in it what is known from elsewhere."""
        self._others.add(number)
        self.groups.restore(number, group, names)

    def apply(self, batch: Batch, number: int, *, again: bool = False) -> list[Event]:
        """Events that a batch means. `again`: some of the batch may have been applied before."""
        out = _Out(self, number)
        aside = self._aside = []
        for event in batch.events:
            if type(event) is Stored:
                self._store(event, out, again=again)
            elif type(event) is Removed:
                self._remove(event, out)
            elif type(event) is Cleared:
                self.counts["cleared"] += 1
                out.cleared()
                self.clear()
                aside.clear()
        for kind, count in batch.unknown.items():
            key = UNKNOWN + kind
            if key in self.counts or len(self.counts) < len(COUNTS) + UNKNOWN_TYPES:
                self.counts[key] = self.counts.get(key, 0) + count
        self._trim(out)
        events = out.events
        if aside:
            # Last, since their names are those of the followed group; but first, which groups there are.
            new, then = self.groups.apply(aside, self.epoch, number, again=again)
            events = [*new, *events, *then, *self.groups.trim(self.epoch, number, self._capacity.get("gpu", 1 << 62))]
        return events

    def learn(self, batch: Batch) -> None:
        """Take the meaning of names and groups from a batch whose effects are known already."""
        for event in batch.events:
            if type(event) is not Stored or not event.tokens:
                continue
            if not self._followed(event.group, event):
                if event.tier == "gpu":
                    self.groups.see(event)
                continue
            fitted = self._fitted(event)
            if isinstance(fitted, Stored):
                for name, block in zip(fitted.hashes, self._blocks(fitted), strict=True):
                    if block is not None and not self._anywhere(name):
                        self._former.put(name, block)

    def report(self, number: int) -> list[Event]:
        """All that is held, for a fleet that knows nothing of it."""
        out = _Out(self, number)
        for event in self.groups.report(self.epoch, number):
            out.further(event)
        for tier, holding in self._tiers.items():
            # Chains are not kept, so blocks are reported without parents: any reader understands that.
            out.stored(tier, list(holding.names), list(holding.names.values()))
        return out.events

    def _holding(self, tier: Tier) -> Holding:
        holding = self._tiers.get(tier)
        if holding is None:
            holding = self._tiers[tier] = Holding()
        return holding

    def _block(self, name: EngineHash) -> int | None:
        for holding in self._tiers.values():
            block = holding.names.get(name)
            if block is not None:
                return block
        return self._former.get(name)

    def _anywhere(self, name: EngineHash) -> bool:
        return any(name in holding.names for holding in self._tiers.values())

    def _followed(self, group: int | None, stored: Stored | None) -> bool:
        """Whether the index follows this group: the first one seen whose attention is full."""
        if group is None:
            return True
        if stored is not None and stored.tokens:
            if not stored.full:
                self._others.add(group)
            elif self._group is None and group not in self._others:
                self._group = group
        if self._group is None:
            # A removal may be of the group to follow, so it counts; a store without tokens teaches nothing.
            return stored is None and group not in self._others
        return group == self._group

    def _fitted(self, stored: Stored) -> Stored | str:
        """A store in the fleet's blocks; else the name under which it is counted that it can't be."""
        names, size = stored.hashes, self.block_size
        if not stored.tokens:
            return stored
        if stored.block_size == size:
            return stored if len(stored.tokens) == len(names) * size else "misfit"
        if stored.tier == "gpu":
            if stored.block_size > size or len(names) > 1:
                self.wrong_size = stored.block_size
            return "partial"
        # Slower tiers have sizes of their own: one name then means several of the fleet's blocks.
        each, rest = divmod(stored.block_size, size)
        if each < 1 or rest or stored.keys:
            # Which of the blocks has the multimodal item is not said.
            return "indivisible"
        if len(stored.tokens) != len(names) * stored.block_size:
            return "misfit"
        self._parts = max(self._parts, each)
        return stored._replace(hashes=[one for name in names for one in parts(name, each)], block_size=size)

    def _blocks(self, stored: Stored) -> list[int | None]:
        """The blocks that a fitted store's names mean; none at all where its tokens can't be hashed."""
        try:
            return self._resolved(stored)
        except BadHashes:
            return [None] * len(stored.hashes)

    def _resolved(self, stored: Stored) -> list[int | None]:
        """The blocks that the names mean; none where that is unknown."""
        names, size = stored.hashes, self.block_size
        if not stored.tokens:
            return [self._block(name) for name in names]
        blocks: list[int | None] = []
        parent = None if stored.parent is None else self._block(stored.parent)
        if stored.parent is not None and parent is None:
            # Without the chain before it, a block is known by its name only; those behind it follow.
            while parent is None and len(blocks) < len(names):
                parent = self._block(names[len(blocks)])
                blocks.append(parent)
            if parent is None:
                return blocks
        start, keys = len(blocks), stored.keys
        if keys and start:
            keys = {position - start: key for position, key in keys.items() if position >= start}
        tokens = stored.tokens[start * size :] if start else stored.tokens
        packed = block_hashes(tokens, size, lora=stored.lora, salt=stored.salt, parent=parent, keys=keys)
        blocks += unpack_hashes(packed)
        return blocks

    def _store(self, stored: Stored, out: _Out, *, again: bool) -> None:
        counts, names, tier = self.counts, stored.hashes, stored.tier
        if tier is None:
            counts["elsewhere"] += len(names)
            return
        if not self._followed(stored.group, stored):
            if self._group is None and stored.full and stored.group not in self._others:
                # Perhaps the one to follow.
                counts["other_group"] += len(names)
            else:
                self._aside.append(stored)
            return
        counts["stored"] += len(names)
        fitted = self._fitted(stored)
        try:
            blocks = [] if isinstance(fitted, str) else self._resolved(fitted)
        except BadHashes:
            fitted = "misfit"
        if isinstance(fitted, str):
            counts[fitted] += len(names)
            self._misfits += fitted == "misfit"
            return
        self._misfits = 0
        stored, names = fitted, fitted.hashes
        holding = self._holding(tier)
        parent = None if stored.parent is None else self._block(stored.parent)
        whole = [block for block in blocks if block is not None]
        if len(whole) == len(names) and holding.add_all(names, whole):
            out.stored(tier, names, whole, parent)
            return
        run: list[int] = []
        start = 0
        for position, (name, block) in enumerate(zip(names, blocks, strict=True)):
            fresh = False
            if block is None:
                counts["lost_parent" if stored.tokens else "unnamed"] += 1
            else:
                known = holding.names.get(name)
                if known is not None and known != block:
                    # SGLang does not hash LoRAs. Whichever of the two is removed first, neither may stay.
                    counts["ambiguous"] += 1
                    out.removed(tier, holding.drop_all(name))
                    known = None
                fresh = not (again and known is not None) and holding.add(name, block)
            if fresh and block is not None:
                if not run:
                    start = position
                run.append(block)
            elif run:
                out.stored(tier, names[start:position], run, blocks[start - 1] if start else parent)
                run = []
        if run:
            out.stored(tier, names[start:], run, blocks[start - 1] if start else parent)

    def _remove(self, removed: Removed, out: _Out) -> None:
        counts = self.counts
        if removed.tier is None:
            counts["elsewhere"] += len(removed.hashes)
            return
        if not self._followed(removed.group, None):
            self._aside.append(removed)
            return
        counts["removed"] += len(removed.hashes)
        holding = self._holding(removed.tier)
        names, alone = holding.names, len(self._tiers) == 1
        hashes = removed.hashes
        if self._parts and removed.tier != "gpu":
            split = [one for name in hashes for at in range(self._parts - 1) if (one := part(name, at)) in names]
            hashes = [*split, *hashes]
        for name in hashes:
            block = names.get(name)
            if block is None:
                counts["unknown_removed"] += 1
                continue
            out.removed(removed.tier, holding.drop(name))
            if name not in names and (alone or not self._anywhere(name)):
                self._former.put(name, block)

    def _trim(self, out: _Out) -> None:
        """An engine can't hold more copies than it has blocks: what is reported again, unmarked, leaks copies."""
        for tier, most in self._capacity.items():
            holding = self._tiers.get(tier)
            while holding is not None and holding.copies > most and holding.doubtful:
                self.counts["trimmed"] += 1
                out.removed(tier, holding.trim())


class _Out:
    """Events of one batch, in order; removals that follow each other are one."""

    def __init__(self, translator: Translator, number: int) -> None:
        self._translator = translator
        self._number = number
        self._events: list[Event] = []
        self._gone: list[int] = []
        self._gone_tier: Tier = "gpu"

    @property
    def events(self) -> list[Event]:
        self._flush()
        return self._events

    def further(self, event: Event) -> None:
        self._events.append(event)

    def removed(self, tier: Tier, blocks: Sequence[int]) -> None:
        if blocks:
            if tier != self._gone_tier:
                self._flush()
                self._gone_tier = tier
            self._gone += blocks

    def cleared(self) -> None:
        self._gone = []
        self._events = [CacheCleared(self._translator.node, self._translator.epoch, self._number, "engine")]

    def stored(self, tier: Tier, names: Sequence[EngineHash], blocks: Sequence[int], parent: int | None = None) -> None:
        self._flush()
        who = self._translator
        for at in range(0, len(blocks), EVENT_BLOCKS):
            part = blocks[at : at + EVENT_BLOCKS]
            self._events.append(
                BlocksStored(
                    who.node,
                    who.epoch,
                    self._number,
                    pack_hashes(part),
                    parent,
                    tier,
                    list(names[at : at + EVENT_BLOCKS]),
                )
            )
            parent = part[-1]

    def _flush(self) -> None:
        gone, self._gone = self._gone, []
        who = self._translator
        for at in range(0, len(gone), EVENT_BLOCKS):
            packed = pack_hashes(gone[at : at + EVENT_BLOCKS])
            self._events.append(BlocksRemoved(who.node, who.epoch, self._number, packed, self._gone_tier))
