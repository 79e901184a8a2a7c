"""All ranks of one engine as nodes: the service that `kvplane attach` runs."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import anyio
import structlog

from kvplane.services.engines.adapter import Adapter
from kvplane.services.engines.attachment import AdapterConfig
from kvplane.services.engines.facts import ANSWER_SECONDS, check
from kvplane.services.protocol.errors import EngineUnfit
from kvplane.services.rpc.readiness import Readiness
from kvplane.services.rpc.tally import Tally

if TYPE_CHECKING:
    from anyio.abc import TaskStatus
    from nats.aio.client import Client

    from kvplane.services.engines.attachment import Attachment
    from kvplane.services.engines.facts import Engine, Facts

RETRY_SECONDS = 1.0
SOON_SECONDS = 1.5
"""How long the engine has for its first answer, before it is reported that there is none."""
WRONG_SECONDS = 2.0
"""So long it must be the same wrong thing that answers: what stands before an engine may need a moment."""

_log = structlog.get_logger("kvplane.engines")


class Adapters:
    """Adapters of one engine in one process, on one connection."""

    role = "adapter"

    def __init__(self, client: Client, fleet: str, engine: Engine, wanted: Attachment) -> None:
        self.client = client
        self.fleet = fleet
        self.engine = engine
        self.wanted = wanted
        self.tally = Tally()
        self.adapters: list[Adapter] = []
        """None before the engine has answered what it is."""
        self._waits_for = ""
        """What is wrong with the engine that is waited for."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Wait for the engine, and attach it until cancelled; then its nodes leave. Started means: all of them are registered.

        Raises `EngineUnfit` when it can't be attached as it is, or is not well in time.
        """
        self.adapters = self._made(self.wanted.facts(await self._asked()))
        try:
            async with anyio.create_task_group() as group:
                async with anyio.create_task_group() as starting:
                    for adapter in self.adapters:
                        starting.start_soon(group.start, adapter.run)
                task_status.started()
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as leaving:
                    for adapter in self.adapters:
                        leaving.start_soon(adapter.leave)

    def _made(self, facts: Facts) -> list[Adapter]:
        wanted, made = self.wanted, []
        sources = wanted.sources(facts)
        check(self.engine.kind, facts, sources)
        for source in sources:
            config = AdapterConfig(
                node=wanted.node_of(source, sources), address=wanted.address or self.engine.url,
                ranked=len(facts.sources) > 1 or wanted.rank is not None,
                max_active=wanted.max_active, pulse_seconds=wanted.pulse_seconds,
            )  # fmt: skip
            adapter = Adapter(self.client, self.fleet, self.engine, facts, source, config, wanted.sources)
            made.append(adapter)
            if adapter.published.bound and not source.events.startswith("bind:"):
                log = _log.warning if wanted.events else _log.info
                log(
                    "events_bound", node=config.node, endpoint=source.events,
                    hint="the adapter listens there and the engine connects, since this endpoint has no `*`; if the engine "
                    "listens, give --events connect: before it",
                )  # fmt: skip
            if not source.replay:
                _log.warning(
                    "no_replay_endpoint", node=config.node,
                    hint="every lost message and every restart of this adapter empties the node for the fleet; give the "
                    'engine a "replay_endpoint" in --kv-events-config, such as tcp://*:5558',
                )  # fmt: skip
        return made

    async def _asked(self) -> Facts:
        """The engine's facts, once it is well: loading a model takes minutes."""
        seconds = self.wanted.wait
        deadline = anyio.current_time() + seconds
        reported, wrong_since = "", inf
        patience = SOON_SECONDS
        while not (health := await self.engine.health(patience)).well:
            now = anyio.current_time()
            wrong_since = min(wrong_since, now) if health.final else inf
            if now - wrong_since >= WRONG_SECONDS:
                raise EngineUnfit(
                    f"there is no engine: {health.reason}; give --engine the URL of its API, such as http://127.0.0.1:8000"
                )
            if now >= deadline:
                raise EngineUnfit(
                    f"{health.reason}; no engine is well at {self.engine.url} after {seconds:g} s: give --engine the URL of "
                    "its API, or a longer --wait"
                )
            self._waits_for = health.reason
            if health.reason != reported:
                _log.info("engine_waited_for", engine=self.engine.url, reason=health.reason, seconds=seconds)
                reported = health.reason
            patience = ANSWER_SECONDS
            await anyio.sleep(RETRY_SECONDS)
        self._waits_for = ""
        return await self.engine.facts()

    def readiness(self) -> Readiness:
        """Whether the fleet knows of all nodes what it should."""
        troubles = [f"node {one.config.node}: {trouble}" for one in self.adapters if (trouble := one.trouble())]
        if not self.adapters:
            why = f": {self._waits_for}" if self._waits_for else ""
            troubles = [f"the engine at {self.engine.url} is not well yet{why}"]
        unheard = [one.config.node for one in self.adapters if one.hearing.missing]
        return Readiness(
            "; ".join(troubles), {"nodes": len(self.adapters), **({"unheard": unheard} if unheard else {})}
        )
