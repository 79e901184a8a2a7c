"""How an engine is to be attached: what the user gives goes before what the engine reports of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from kvplane.services.engines.facts import Source
from kvplane.services.engines.outbox import BUFFER_EVENTS
from kvplane.services.engines.sockets import REPLAY_SECONDS
from kvplane.services.protocol.errors import EngineUnfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.engines.facts import Facts


IDLE_SECONDS = 15.0
"""How often the replay buffer is asked whether anything was missed. A last batch that got lost shows in no other way."""


class AdapterConfig(Struct, frozen=True, kw_only=True):
    """What the node is called and how it is attached."""

    node: str
    address: str
    ranked: bool = False
    """The engine has several ranks, so that requests must name this one."""
    max_active: int = 0
    pulse_seconds: float = 1.0
    buffer_events: int = BUFFER_EVENTS
    idle_seconds: float = IDLE_SECONDS
    replay_seconds: float = REPLAY_SECONDS


class Attachment(Struct, frozen=True, kw_only=True):
    """What the user gives; what is empty, 0 or none is asked of the engine."""

    node: str
    rank: int | None = None
    """The one data-parallel rank to attach; all of them when none is given."""
    events: str = ""
    replay: str = ""
    address: str = ""
    block_size: int = 0
    capacity_blocks: int = 0
    max_active: int = 0
    pulse_seconds: float = 1.0
    wait: float = 600.0
    """Seconds to wait for the engine to be well."""
    one_login: bool = False
    """The log is written with the credentials of one node, so that there can't be others."""

    def facts(self, asked: Facts) -> Facts:
        """The engine's facts, corrected."""
        return replace(
            asked,
            block_size=self.block_size or asked.block_size,
            capacity_blocks=self.capacity_blocks or asked.capacity_blocks,
        )

    def sources(self, facts: Facts) -> list[Source]:
        """Where the ranks to attach publish. Raises `EngineUnfit` where that can't be what is meant."""
        ranks = [source.rank for source in facts.sources]
        if self.rank is not None and ranks and self.rank not in ranks:
            raise EngineUnfit(
                f"the engine has no data-parallel rank {self.rank}; it has {_listed(ranks)}: give --rank that"
            )
        if self.events:
            return [Source(rank=self.rank or 0, events=self.events, replay=self.replay)]
        found = [source for source in facts.sources if self.rank in {None, source.rank}]
        if len(found) > 1 and self.one_login:
            raise EngineUnfit(
                f"the engine has the data-parallel ranks {_listed(ranks)}, and credentials are those of one node; start one "
                "adapter a rank, each with --rank, and with --node and --credentials of its own"
            )
        if len(found) > 1 and self.replay:
            raise EngineUnfit(
                f"--replay is the endpoint of one rank, and the engine has {_listed(ranks)}; give --rank as well"
            )
        return [replace(source, replay=self.replay or source.replay) for source in found]

    def node_of(self, source: Source, sources: Sequence[Source]) -> str:
        """Name of the node that a rank becomes."""
        return self.node if len(sources) == 1 else f"{self.node}-dp{source.rank}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
