"""What a coordinator tells an adapter of its node's past."""

from __future__ import annotations

from msgspec import Struct

from kvplane.events.hashing import unpack_hashes
from kvplane.events.types import EngineHash, GroupKind, Tier  # noqa: TC001 - msgspec looks them up as it decodes


class Remembered(Struct, frozen=True, kw_only=True):
    """What the log says of the last epoch of a node: how it was registered, the last batch, and what each tier holds.

    A tier is its block hashes, packed, and the engine's hashes of them in the same order.
    """

    epoch: int
    block_size: int
    labels: dict[str, str]
    position: int | None
    tiers: dict[Tier, tuple[bytes, list[EngineHash]]]
    groups: dict[int, tuple[GroupKind, int, int, bytes, list[EngineHash]]] = {}
    """Further KV cache groups, by their numbers: kind, window, span, and what each holds, as a tier's."""

    def engine_hashes(self) -> dict[Tier, dict[EngineHash, int]]:
        """Blocks by the engine's hashes, in each tier."""
        return {
            tier: dict(zip(names, unpack_hashes(hashes), strict=True)) for tier, (hashes, names) in self.tiers.items()
        }
