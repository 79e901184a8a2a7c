"""The nodes of a fleet: who they are, whether they may be chosen, and where their blocks are indexed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from kvplane.projections.groups import Groups
from kvplane.projections.prefix import PrefixIndex

if TYPE_CHECKING:
    from kvplane.events.types import NodeRegistered, Tier
    from kvplane.projections.groups import Membership


NodeState = Literal["up", "cordoned", "lost"]


class Node(Struct, kw_only=True):
    """One node. `epoch` is the sequence of its registration, `changed` that of the last change a decision rests on."""

    name: str
    registered: NodeRegistered
    epoch: int
    changed: int
    lost: str | None = None
    """Why the node was concluded to be lost; none while it is not."""
    cordoned: bool = False
    slots: dict[Tier, int] = {}
    groups: Membership | None = None
    """Its KV cache groups beside the one in the slots; none while it has told of none."""

    @property
    def state(self) -> NodeState:
        """Whether it takes requests, and if not, why."""
        return "lost" if self.lost is not None else "cordoned" if self.cordoned else "up"

    @property
    def available(self) -> bool:
        """Whether a request may be sent here at all."""
        return self.state == "up"

    @property
    def managed(self) -> bool:
        """Whether the coordinator, not the engine, decides what is evicted."""
        return self.registered.cache_mode == "managed"

    @property
    def model(self) -> str:
        """The model whose cache this is: the first that the node registered."""
        return self.registered.models[0]


class Caches:
    """The prefix index of every model, and the slots in them. A slot is one tier of one node."""

    def __init__(self) -> None:
        self.by_model: dict[str, PrefixIndex] = {}
        self._owners: dict[str, list[str | None]] = {}
        self._no_index = PrefixIndex()
        self.groups = Groups()
        """What nodes of hybrid models hold beside what is in the indexes."""
        self.slots_made = 0
        """Counts slots that were taken, so that what is derived from them knows when to be made again."""

    def index(self, model: str) -> PrefixIndex:
        """Index of a model; an empty one when no node ever held a block of it."""
        return self.by_model.get(model, self._no_index)

    def owners(self, model: str) -> list[str | None]:
        """Node of every slot in this model's index."""
        return self._owners.get(model, [])

    def slot(self, node: Node, tier: Tier) -> int:
        """Slot of a node's tier; taken, lowest free first, when the tier is used for the first time."""
        slot = node.slots.get(tier)
        if slot is None:
            index = self.by_model.setdefault(node.model, PrefixIndex())
            owners = self._owners.setdefault(node.model, [])
            slot = owners.index(None) if None in owners else len(owners)
            if slot == len(owners):
                owners.append(None)
            owners[slot] = node.name
            index.add_slot(slot)
            node.slots[tier] = slot
            self.slots_made += 1
        return slot

    def adopt(self, model: str, index: PrefixIndex, owners: list[str | None]) -> None:
        """Take over the index of a model, with the node of each of its slots, if there is any."""
        self.by_model[model] = index
        self._owners[model] = owners
        self.forget(model)

    def clear(self, node: Node) -> int:
        """Take all blocks from the node; return how many there were, those of further groups not counted."""
        self.groups.clear(node)
        index = self.index(node.model)
        return sum(index.clear(slot) for slot in node.slots.values())

    def release(self, node: Node) -> int:
        """Clear the node and free its slots; the index of a model that no node has any more goes."""
        cleared = self.clear(node)
        self.groups.release(node)
        owners = self._owners.get(node.model, [])
        for slot in node.slots.values():
            owners[slot] = None
        node.slots.clear()
        self.forget(node.model)
        return cleared

    def forget(self, model: str) -> None:
        """Let the index of a model go, if no slot of it has a node."""
        if not any(self._owners.get(model, ())):
            self.by_model.pop(model, None)
            self._owners.pop(model, None)

    def held(self, node: Node, tier: Tier = "gpu") -> int:
        """Blocks that the node holds in a tier."""
        slot = node.slots.get(tier)
        return 0 if slot is None else self.index(node.model).count(slot)
