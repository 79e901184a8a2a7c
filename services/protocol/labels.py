"""Labels of nodes that services look at. Any others are their owners' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvplane.events.types import NodeRegistered

TOKENIZER = "tokenizer"
"""How the node makes tokens of a prompt, where routers can do the same: `bytes`."""
ADAPTER = "adapter"
"""The process beside an engine that made it a node, by its name as a writer."""
STARTED = "engine_started"
"""When the engine began, as it says itself."""
RANK = "rank"
"""Which data-parallel rank of an engine that has several; requests name it in `X-data-parallel-rank`."""
LORAS_FROM = "adapters_from"
"""Place in the node's models from which on they are LoRAs, whose blocks are hashed with their names."""


def is_lora(registered: NodeRegistered, model: str) -> bool:
    """Whether a node means a LoRA by this name of its models."""
    first = registered.labels.get(LORAS_FROM, "")
    return first.isdecimal() and 0 < int(first) <= registered.models.index(model)
