"""The candidates for a model as columns, one entry a node, in the order of the fold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvplane.projections.fleet import OVERFULL
from kvplane.services.protocol.errors import NoNode, UnknownModel
from kvplane.services.protocol.labels import is_lora

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.load import Load
    from kvplane.projections.prefix import PrefixIndex

Column = NDArray[Any]


class Columns(NamedTuple):
    """Columns of the fold, as arrays that change with it; they are replaced when a node is added."""

    active: Column
    blocks: Column
    pending: Column
    pace: Column
    prefill_done: Column
    recent_requests: Column
    recent_tokens: Column
    recent_uncached: Column
    decoding: Column

    @classmethod
    def of(cls, load: Load) -> Columns:
        """The columns as they are now."""
        arrays = (getattr(load, name) for name in cls._fields)
        return cls(*(np.frombuffer(array, np.int64 if array.typecode == "q" else np.float64) for array in arrays))


class Roster:
    """The candidates for a model as columns. Made anew when nodes change, not for each request."""

    def __init__(self, state: FleetState, model: str) -> None:
        serving = [node for node in state.nodes.values() if model in node.registered.models]
        if not serving:
            raise UnknownModel(
                f"no node serves model {model[:80]!r}; `kvplane node list` shows which models are served"
            )
        self.made = (state.changes, state.caches.slots_made)
        self.nodes = [node for node in serving if node.available]
        self.serving = len(serving)
        self._lost = sum(node.lost is not None for node in serving)
        self.names = [node.name for node in self.nodes]
        self.ordinals = np.array([state.load.ordinal[node.name] for node in self.nodes], dtype=np.intp)
        self.columns = Columns.of(state.load)
        self.capacity = np.array([node.registered.capacity_blocks["gpu"] for node in self.nodes], dtype=np.float64)
        self.most_blocks = OVERFULL * max(
            (sum(node.registered.capacity_blocks.values()) for node in self.nodes), default=0
        )
        """More no node can say that it holds, so no longer request is matched to its end."""
        # Policies see this very array, decision after decision.
        self.capacity.setflags(write=False)
        self.position = {node.name: position for position, node in enumerate(self.nodes)}
        self.limits = np.array([node.registered.max_active or math.inf for node in self.nodes])
        self.limited = bool(np.isfinite(self.limits).any())
        self.places = float(self.limits.sum())
        """Requests that they may run at once."""
        self.contexts = np.frombuffer(state.load.contexts.tokens)
        """Tokens of live contexts, as an array that changes with them, by the fold's ordinals."""
        self.zeros = np.zeros(len(self.nodes))
        self.hybrid = [position for position, node in enumerate(self.nodes) if node.groups is not None]
        """Those with further KV cache groups, of whose slower tiers nothing is expected."""
        self.tiered = [at for at, node in enumerate(self.nodes) if len(node.slots) > 1 and node.groups is None]
        self.block_size = serving[0].registered.block_size
        blocks = [sum(node.registered.capacity_blocks.values()) for node in self.nodes]
        self.room = np.array(blocks, dtype=np.float64) * self.block_size
        """Tokens that they can hold, in all tiers."""
        self.mean_room = float(self.room.mean()) if blocks else 0.0
        self.is_lora = any(is_lora(node.registered, model) for node in serving)
        """Whether the model that was asked for is a LoRA."""
        self.indexes: list[tuple[str, PrefixIndex, NDArray[np.intp], NDArray[np.intp]]] = []
        """For each cache model: its index, the candidates that have it, and their slots of the tier `gpu`."""
        for cache_model in dict.fromkeys(node.model for node in self.nodes):
            having = [at for at, node in enumerate(self.nodes) if node.model == cache_model]
            slots = [self.nodes[at].slots["gpu"] for at in having]
            index = state.caches.index(cache_model)
            self.indexes.append((cache_model, index, np.array(having, np.intp), np.array(slots, np.intp)))

        everyone = np.arange(len(state.load.active))
        self.whole = bool(np.array_equal(self.ordinals, everyone))
        """Whether the candidates are all nodes, in the order of the fold's columns."""
        self.aligned = (
            self.whole
            and len(self.indexes) == 1
            and not self.tiered
            and not self.hybrid
            and bool(np.array_equal(self.indexes[0][3], np.arange(len(state.caches.owners(self.indexes[0][0])))))
        )
        """Whether the slots are the candidates, too, and each has one only."""

    def nobody(self, model: str) -> NoNode:
        """The error that none of them is available."""
        counts = {"lost": self._lost, "cordoned": self.serving - self._lost}
        why = ", ".join(f"{'all ' * (count == self.serving)}{count} {what}" for what, count in counts.items() if count)
        return NoNode(f"no node of model {model[:80]!r} is available: {why}; `kvplane node list` shows more")

    def rows(self, column: Column) -> Column:
        """The candidates' entries of a column of the fold, to be read only: it may be the column itself."""
        return column if self.whole else column[self.ordinals]

    def pick(self, column: Column) -> Column:
        """A copy of the candidates' entries of a column of the fold."""
        return column.copy() if self.whole else column[self.ordinals]
