"""Simulated nodes: they speak events and heartbeats as the adapter of a real engine would, and take time like one.

A node prefills one request at a time at a given speed and decodes any number side by side. Reported nodes own their cache
and report it; managed nodes ask the coordinator to admit what they computed.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from itertools import cycle
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog

from kvplane.events import types
from kvplane.events.allowance import Pace
from kvplane.events.hashing import longest_match, pack_hashes, unpack_hashes
from kvplane.events.log.append import Appender, new_life
from kvplane.events.log.group import GroupWriter, Writers
from kvplane.events.subjects import access_name, subject, token
from kvplane.projections.load import PREFILL_LABEL
from kvplane.services.http.listener import bound
from kvplane.services.membership.member import Conclusion, Member
from kvplane.services.protocol import labels, messages
from kvplane.services.protocol.endpoints import served
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.readiness import Readiness
from kvplane.services.rpc.server import Endpoint, serve
from kvplane.services.rpc.tally import Tally
from kvplane.services.simulation.blockcache import BlockCache
from kvplane.services.simulation.engine_api import EngineApi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from anyio.abc import TaskGroup, TaskStatus
    from nats.aio.client import Client

_log = structlog.get_logger("kvplane.simnode")

LINGER_SECONDS = 0.002


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulated node is. Speeds in tokens per second, for prefill of the node and for decode of each request."""

    name: str
    model: str = "sim"
    cache_mode: str = "reported"
    block_size: int = 16
    capacity_blocks: int = 4096
    prefill_speed: float = 8000.0
    decode_speed: float = 60.0
    max_active: int = 64
    pulse_seconds: float = 0.5
    http: str | None = None
    """Host at which it answers as an engine, at a port of its own; without one it is asked over NATS only."""


class SimNode:
    """One simulated node."""

    def __init__(self, client: Client, fleet: str, config: NodeConfig, tally: Tally | None = None) -> None:
        self.client = client
        self.fleet = fleet
        self.config = config
        self.cache = BlockCache(config.capacity_blocks)
        self.epoch = 0
        self.active = 0
        self.waiting = 0
        self.subject = self.address = f"kv.{fleet}.serve.{token(config.name)}"
        access = access_name(config.name)
        self.member = Member(client, fleet, config.name, self._concluded)
        self.appender = Appender(client, fleet, new_life(access))
        self.tally = tally or Tally()
        self.not_admitted = 0
        """Requests whose blocks the coordinator did not take."""
        self.writers = Writers()
        self._cache_log, self._access_log = (
            self.writers.add(GroupWriter(self.appender, target, linger=LINGER_SECONDS, pace=Pace(anyio.current_time())))
            for target in (subject(fleet, "cache", config.name), subject(fleet, "access", access))
        )
        self._prefill = anyio.Lock()
        self._batch = 0
        self.reporting = False
        self._register_again = anyio.Event()
        self._finished = anyio.Event()
        """Set when blocks come out of use."""

    @property
    def model(self) -> str:
        """Model that it serves."""
        return self.config.model

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.config.block_size

    @property
    def managed(self) -> bool:
        """Whether the coordinator owns this node's evictions."""
        return self.config.cache_mode == "managed"

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Started means: registered and taking requests."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.writers.run)
            try:
                async with self._listening():
                    await self._serve(group)
                    task_status.started()
                    while True:
                        await self._register_again.wait()
                        await self._register()
            finally:
                await self.writers.close()

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Answer as an engine does, where that is wanted."""
        if self.config.http is None:
            yield
            return
        async with EngineApi(self).server.listening(bound(self.config.http, 0)) as (host, port):
            self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            yield

    async def _serve(self, group: TaskGroup) -> None:
        await self.member.listen()
        (spec,) = served("node")
        endpoint = Endpoint(spec.name, self.subject, spec.request, self.serve, concurrent=True, traced=spec.traced)
        await serve(
            self.client, group, "kvplane-simnode", f"simulated node {self.config.name!r}", [endpoint],
            {"fleet": self.fleet, "node": self.config.name}, self.tally,
            # A node may write to the inboxes of those alone who sent it a request.
            listed=False,
        )  # fmt: skip
        await self._register()
        group.start_soon(self.member.heartbeat, self._heartbeat, self.config.pulse_seconds)

    async def _register(self) -> None:
        """Register until it succeeds, and report what the cache holds."""
        self._register_again = anyio.Event()
        # A commit must not hold events of two epochs: what is on its way goes first, what comes meanwhile is told anew.
        await self._cache_log.flush()
        self.reporting = False
        config = self.config
        request = messages.RegisterRequest(
            node=config.name, address=self.address, models=[config.model], block_size=config.block_size,
            capacity_blocks={"gpu": config.capacity_blocks}, cache_mode=config.cache_mode, engine="kvplane-simnode",
            max_active=config.max_active, pulse_seconds=config.pulse_seconds, replace=True,
            labels={PREFILL_LABEL: str(config.prefill_speed), labels.TOKENIZER: "bytes"},
        )  # fmt: skip
        self.epoch = await self.member.register(request, self._not_registered)
        self._batch = 0
        self.reporting = True
        if self.managed:
            self.cache = BlockCache(config.capacity_blocks)
        elif self.cache.blocks:
            # In the order of use, without parents: each block is told by itself, which any reader understands.
            self._report(
                types.BlocksStored(config.name, self.epoch, self._next_batch(), pack_hashes(self.cache.blocks))
            )
        _log.info("node_registered", node=config.name, epoch=self.epoch)

    def _not_registered(self, error: ServiceFault) -> None:
        _log.info("registration_waits", node=self.config.name, error=str(error))

    async def leave(self, seconds: float) -> None:
        """Tell the fleet that the node leaves, when `run` has ended in good order."""
        await self.member.leave("it was stopped", seconds=seconds)

    def _concluded(self, conclusion: Conclusion) -> None:
        if conclusion is Conclusion.FORGOTTEN:
            self._register_again.set()

    def _heartbeat(self) -> messages.Heartbeat:
        return messages.Heartbeat(
            node=self.config.name, epoch=self.epoch, active=self.active, waiting=self.waiting,
            used_blocks=len(self.cache.blocks),
        )  # fmt: skip

    async def serve(self, request: messages.ServeRequest, trace: str = "") -> messages.ServeAnswer:
        """Run a request that was asked for over NATS, and record how it ended."""
        answer = await self.run_request(request)
        self._access_log.put(
            types.RequestCompleted(
                request=request.request, node=self.config.name, prompt_tokens=request.tokens,
                cached_tokens=answer.cached_tokens, output_tokens=request.output_tokens, ttft=answer.ttft,
                duration=answer.duration, trace=trace,
            )
        )  # fmt: skip
        return answer

    async def run_request(
        self, request: messages.ServeRequest, on_token: Callable[[int], None] | None = None
    ) -> messages.ServeAnswer:
        """Run a request: wait for space, prefill what is not cached, decode, report. `on_token` gets each token's number."""
        arrived = time.monotonic()
        hashes = unpack_hashes(request.hashes)
        usable = hashes[: longest_match(request.tokens, self.config.block_size)]
        # Longer than the cache: an engine would recompute it each time; nothing of it is kept.
        kept = not self.managed and len(hashes) <= self.config.capacity_blocks
        taken = prefilling = False
        self.active += 1
        self.waiting += 1
        try:
            async with self._prefill:
                self.waiting -= 1
                prefilling = True
                cached = min(len(usable), await self._take(hashes) if kept else self.cache.leading(usable))
                taken = kept
                uncached = request.tokens - cached * self.config.block_size
                await anyio.sleep(uncached / self.config.prefill_speed)
            ttft = time.monotonic() - arrived
            if self.managed:
                await self._admit(request, hashes)
            await self._decode(request.output_tokens, on_token)
        finally:
            # Whoever asked may have left at any point.
            if not prefilling:
                self.waiting -= 1
            if taken:
                self.cache.finish(hashes)
                self._finished.set()
                self._finished = anyio.Event()
            self.active -= 1
        return messages.ServeAnswer(
            request=request.request, node=self.config.name, cached_tokens=cached * self.config.block_size, ttft=ttft,
            duration=time.monotonic() - arrived,
        )  # fmt: skip

    async def _decode(self, tokens: int, on_token: Callable[[int], None] | None) -> None:
        if on_token is None:
            await anyio.sleep(tokens / self.config.decode_speed)
            return
        begin = time.monotonic()
        for number in range(tokens):
            # By the clock, so that what a sleep takes too long is made up for.
            await anyio.sleep(max(0.0, begin + number / self.config.decode_speed - time.monotonic()))
            on_token(number)

    async def _take(self, hashes: tuple[int, ...]) -> int:
        """Put a request's blocks into the own cache and report what changed; how many leading ones were there."""
        while (allocation := self.cache.start(hashes)) is None:
            await self._finished.wait()
        name, epoch = self.config.name, self.epoch
        if allocation.evicted:
            self._report(types.BlocksRemoved(name, epoch, self._next_batch(), pack_hashes(allocation.evicted)))
        if allocation.stored:
            parent = hashes[allocation.cached - 1] if allocation.cached else None
            stored = pack_hashes(allocation.stored)
            self._report(types.BlocksStored(name, epoch, self._next_batch(), stored, parent))
        return allocation.cached

    def _report(self, event: types.Event) -> None:
        if self.reporting:
            self._cache_log.put(event)

    def _next_batch(self) -> int:
        self._batch += 1
        return self._batch

    async def _admit(self, request: messages.ServeRequest, hashes: tuple[int, ...]) -> None:
        """Ask the coordinator to place what was computed; without room it is simply not cached."""
        if not hashes:
            return
        admit = messages.AdmitRequest(
            model=self.config.model, hashes=request.hashes, node=self.config.name, request=request.request
        )
        try:
            answer: dict[str, bytes] = await ask(self.client, self.member.coordinator("cache.admit"), admit)
        except ServiceFault as error:
            self.not_admitted += 1
            _log.info("not_admitted", node=self.config.name, request=request.request, error=str(error))
            return
        for block in unpack_hashes(answer["evicted"]):
            self.cache.blocks.pop(block, None)
        for block in hashes:
            self.cache.blocks.setdefault(block, 0)


class SimNodes:
    """Several nodes in one process, on one connection, or on one each.

    In the end they tell the fleet that they leave, for `leave_seconds` at the most; with 0 they are silent, as if killed.
    """

    role = "simnode"

    def __init__(
        self, clients: Sequence[Client], fleet: str, configs: Sequence[NodeConfig], *, leave_seconds: float = 0
    ) -> None:  # fmt: skip
        self._leave_seconds = leave_seconds
        self.client = clients[0]
        self.fleet = fleet
        self.tally = Tally()
        self.nodes = [
            SimNode(client, fleet, config, self.tally) for client, config in zip(cycle(clients), configs, strict=False)
        ]

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Started means: all are registered."""
        try:
            async with anyio.create_task_group() as group:
                for node in self.nodes:
                    await group.start(node.run)
                task_status.started()
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as leaving:
                    for node in self.nodes if self._leave_seconds else ():
                        leaving.start_soon(node.leave, self._leave_seconds)

    def readiness(self) -> Readiness:
        """Whether all of them are registered."""
        missing = [node.config.name for node in self.nodes if not node.reporting]
        reason = (
            f"{len(missing)} of {len(self.nodes)} nodes are not registered, such as {missing[0]}" if missing else ""
        )
        return Readiness(reason, {"nodes": len(self.nodes)})


async def run_nodes(
    client: Client, fleet: str, configs: list[NodeConfig], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """`SimNodes.run` for those who need nothing else of them."""
    await SimNodes([client], fleet, configs).run(task_status=task_status)
