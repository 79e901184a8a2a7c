"""The adapter between an engine of real sockets and a real log: every fault that it must get through."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events.hashing import block_hashes
from kvplane.services.engines.adapter import Adapter
from kvplane.services.engines.attachment import AdapterConfig
from kvplane.services.engines.facts import Engine, check
from kvplane.services.protocol.errors import EngineUnfit
from tests.support.fake_engine import FakeEngine, running
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet


class Scene:
    """One engine, its adapter, and a coordinator's fold of what the log says."""

    def __init__(self, fleet: Fleet, engine: FakeEngine, coordinator: Coordinator, tasks: anyio.abc.TaskGroup) -> None:
        self.fleet, self.engine, self.coordinator, self.tasks = fleet, engine, coordinator, tasks
        self.adapter: Adapter
        self.failure: Exception | None = None
        self._stop = anyio.CancelScope()
        self._gone = anyio.Event()

    async def attach(self, **options: Any) -> None:
        """Start an adapter, as the command does."""
        self._stop, self._gone = anyio.CancelScope(), anyio.Event()
        await self.tasks.start(self._attached, options, self._stop, self._gone)

    async def _attached(
        self,
        options: dict[str, Any],
        stop: anyio.CancelScope,
        gone: anyio.Event,
        *,
        task_status: anyio.abc.TaskStatus[None],
    ) -> None:
        kind: Any = self.engine.kind
        options = {"pulse_seconds": 0.2, "idle_seconds": 1.0, **options}
        try:
            with stop:
                async with Engine(kind, self.engine.url) as http:
                    facts = await http.facts()
                    check(kind, facts, facts.sources)
                    config = AdapterConfig(node="a", address=http.url, **options)
                    client = await self.fleet.connect("attach")
                    self.adapter = Adapter(client, self.fleet.name, http, facts, facts.sources[0], config)
                    await self.adapter.run(task_status=task_status)
        except BaseExceptionGroup as group:
            matched, rest = group.split(EngineUnfit)
            if rest is not None or matched is None:
                raise
            self.failure = matched.exceptions[0]
        finally:
            gone.set()

    async def detach(self) -> None:
        """Stop the adapter."""
        self._stop.cancel()
        await self.ended(self._gone)

    async def ended(self, gone: anyio.Event) -> None:
        with anyio.fail_after(15):
            await gone.wait()

    @property
    def epoch(self) -> int:
        return self.coordinator.state.nodes["a"].epoch

    def held(self) -> set[int]:
        node = self.coordinator.state.nodes["a"]
        return (
            set(self.coordinator.state.caches.index(node.model).held(node.slots["gpu"])) if node.lost is None else set()
        )

    async def settled(self, seconds: float = 15) -> None:
        """Wait until the fleet knows what the engine holds."""
        try:
            await until(lambda: self.held() == self.engine.cache.held(), seconds)
        except TimeoutError:
            assert self.held() == self.engine.cache.held()

    async def traffic(self, *prompts: int, lost: bool = False) -> None:
        for prompt in prompts:
            self.engine.cache.request([prompt] * 3 * self.engine.cache.size)
            await self.engine.publish(lost=lost)

    async def one_by_one(self, *prompts: int) -> None:
        """Traffic that even a small replay buffer keeps up with: who connects misses what comes before the engine knows it."""
        for prompt in prompts:
            await self.traffic(prompt)
            await self.settled()


@asynccontextmanager
async def scene(fleet: Fleet, **options: Any) -> AsyncIterator[Scene]:
    coordinator = await fleet.coordinator()
    async with running(FakeEngine(**options)) as engine, anyio.create_task_group() as tasks:
        yield Scene(fleet, engine, coordinator, tasks)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("kind", "dialect", "names"), [("vllm", "maps", "int"), ("vllm", "arrays", "bytes"), ("sglang", "sglang", "int")]
)
async def test_an_engine_becomes_a_node(fleet: Fleet, kind: str, dialect: str, names: str) -> None:
    async with scene(fleet, kind=kind, dialect=dialect, names=names) as on:
        if kind == "sglang":
            on.engine.topic = b""
        await on.traffic(1, 2)
        await on.attach()
        await on.settled()
        await on.traffic(3, 4, 5, 6)
        await on.settled()
        node = on.coordinator.state.nodes["a"].registered
        assert (node.models, node.block_size, node.capacity_blocks) == (["m", "ad"], 4, {"gpu": 12})
        assert node.engine == ("vllm 0.32.0" if kind == "vllm" else "sglang 0.9")
        await until(
            lambda: "a" in on.coordinator.liveness.heartbeats and on.coordinator.liveness.heartbeats["a"].active
        )
        heartbeat = on.coordinator.liveness.heartbeats["a"]
        assert (heartbeat.active, heartbeat.waiting) == (3, 1)
        hashes = block_hashes([6] * 12, 4)
        answer = await fleet.ask("coordinator.cache.lookup", _lookup(hashes))
        assert answer["matches"] == {"a": 3}


def _lookup(hashes: bytes) -> Any:
    from kvplane.services.protocol.messages import LookupRequest  # noqa: PLC0415

    return LookupRequest(model="m", hashes=hashes)


async def test_an_engine_that_connects_is_bound_for(fleet: Fleet) -> None:
    FakeEngine.connect_to = f"tcp://127.0.0.1:{free_port()}"
    try:
        async with scene(fleet) as on:
            await on.attach()
            await until(lambda: on.adapter.published.connections)
            await on.traffic(1, 2)
            await on.settled()
            await on.engine.restart()
            await on.traffic(3)
            await on.settled()
    finally:
        FakeEngine.connect_to = ""


async def test_lost_batches_are_replayed(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        await on.attach()
        await on.traffic(1)
        await on.traffic(2, 3, lost=True)
        await on.traffic(4)
        await on.settled()
        # The last one is lost, and nothing comes after it.
        await on.traffic(5, lost=True)
        await on.settled()
        assert on.adapter.track.gaps == 0
        assert on.adapter.repeated_reports == 0


async def test_replays_that_lose_batches_and_their_end_are_asked_again(
    fleet: Fleet,
) -> None:
    async with scene(fleet) as on:
        await on.traffic(*range(12))
        on.engine.drops = 2
        await on.attach(replay_seconds=0.3)
        await on.settled()
        assert on.engine.replay_requests > 2
        assert on.adapter.track.gaps == 0
        assert on.adapter.track.position == 11


async def test_what_left_the_replay_buffer_is_forgotten_and_learned_anew(fleet: Fleet) -> None:
    async with scene(fleet, buffer=2) as on:
        await on.attach()
        await on.traffic(1)
        await on.settled()
        await on.traffic(2, 3, 4, lost=True)
        await on.traffic(5)
        await until(lambda: on.adapter.track.gaps)
        await until(lambda: on.held() == set(_blocks(4, 5)))
        assert on.held() < on.engine.cache.held()
        # What is used again comes back.
        on.engine.cache.reset()
        await on.traffic(1, 2)
        await on.settled()
        assert on.epoch == on.adapter.epoch


def _blocks(*prompts: int) -> list[int]:
    from kvplane.events.hashing import unpack_hashes  # noqa: PLC0415

    return [block for prompt in prompts for block in unpack_hashes(block_hashes([prompt] * 12, 4))]


@pytest.mark.parametrize("missed", [0, 2, 5])
@pytest.mark.parametrize("has_start_time", [True, False])
async def test_an_engine_that_restarts_begins_a_new_epoch(fleet: Fleet, missed: int, has_start_time: bool) -> None:
    """Also when its new life has said as much as the old one, or more, before anyone listened."""
    async with scene(fleet, has_start_time=has_start_time) as on:
        await on.attach()
        await on.traffic(1, 2)
        await on.settled()
        epoch = on.epoch
        await on.engine.restart(missed=missed)
        await until(lambda: on.epoch > epoch)
        await on.settled()
        await on.traffic(3)
        await on.settled()


async def test_an_engine_that_publishes_before_it_serves_is_no_node_yet(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        await on.attach()
        await on.traffic(1, 2)
        await on.settled()
        epoch = on.epoch
        await on.engine.restart(missed=2, loading=True)
        await until(lambda: on.coordinator.state.nodes["a"].lost)
        assert on.epoch == epoch
        on.engine.loading = False
        await until(lambda: on.epoch > epoch)
        await on.settled()


async def test_without_a_replay_endpoint_a_restart_and_a_loss_empty_the_node(fleet: Fleet) -> None:
    async with scene(fleet, replays=False) as on:
        await on.attach()
        await until(lambda: on.adapter.published.connections)
        await anyio.sleep(0.2)
        await on.traffic(1)
        await until(lambda: on.held() == set(_blocks(1)))
        await on.traffic(2, lost=True)
        await on.traffic(3)
        await until(lambda: on.adapter.track.gaps)
        await until(lambda: on.held() <= set(_blocks(3)))
        epoch = on.epoch
        await on.engine.restart()
        await until(lambda: on.epoch > epoch and not on.held())


async def test_an_adapter_that_restarts_takes_its_map_from_the_log(fleet: Fleet) -> None:
    async with scene(fleet, buffer=3) as on:
        await on.attach()
        await on.one_by_one(1, 2, 3)
        await on.detach()
        # The buffer no longer reaches the beginning, but what was said meanwhile.
        await on.traffic(4, 5)
        await on.attach()
        await on.settled()
        assert on.adapter.track.gaps == 0
        # The engine's names are known again: removals are understood.
        await on.one_by_one(6, 7, 8)
        assert on.adapter.track.translator.counts["unknown_removed"] == 0


async def test_an_adapter_that_was_away_for_too_long_begins_anew(fleet: Fleet) -> None:
    async with scene(fleet, buffer=2) as on:
        await on.attach()
        await on.traffic(1)
        await on.settled()
        await on.detach()
        await on.traffic(2, 3, 4)
        await on.attach()
        await until(lambda: on.held() == set(_blocks(3, 4)))


@pytest.mark.parametrize("has_start_time", [True, False])
async def test_an_engine_that_restarted_while_the_adapter_was_away(fleet: Fleet, has_start_time: bool) -> None:
    """Its new life has said more than the old one; what the buffer still holds looks like a continuation."""
    async with scene(fleet, has_start_time=has_start_time, buffer=3) as on:
        await on.attach()
        await on.one_by_one(1, 2, 3, 4)
        await on.detach()
        await on.engine.restart(missed=5)
        epoch = on.epoch
        await on.attach()
        await until(lambda: on.epoch > epoch)
        await on.settled()


async def test_a_log_that_is_away_is_told_when_it_is_back(fleet: Fleet, server: Any) -> None:
    async with scene(fleet) as on:
        await on.attach(buffer_events=3)
        await on.traffic(1)
        await on.settled()
        await server.stop()
        await on.traffic(2, 3, 4, 5, 6, 7, 8)
        await until(lambda: on.adapter.outbox.behind)
        from kvplane.services.embedded.server import start_server  # noqa: PLC0415

        again = await start_server(server.log.parent, port=int(server.url.rpartition(":")[2]))
        try:
            await on.settled(30)
            assert on.adapter.repeated_reports + (on.epoch > 1) > 0
        finally:
            await on.detach()
            await again.stop()


async def test_a_node_that_was_concluded_lost_is_told_anew(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        await on.attach(pulse_seconds=0.2)
        await on.traffic(1, 2)
        await on.settled()
        await on.engine.kill()
        await until(lambda: on.coordinator.state.nodes["a"].lost)
        on.engine.life += 1
        await on.engine.start(on.tasks)
        await until(lambda: on.coordinator.state.nodes["a"].lost is None)
        await on.settled()


async def test_an_engine_that_was_not_well_for_a_while_is_told_anew(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        await on.attach()
        await on.traffic(1, 2)
        await on.settled()
        on.engine.loading = True
        await until(lambda: on.coordinator.state.nodes["a"].lost)
        await on.traffic(3)
        on.engine.loading = False
        await until(lambda: on.coordinator.state.nodes["a"].lost is None)
        await on.settled()


async def test_two_adapters_of_one_node_are_one_too_many(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        await on.attach()
        first, gone = on.adapter, on._gone
        await on.attach()
        await on.ended(gone)
        assert on.adapter is not first
        assert "registered by someone else" in str(on.failure)
        await on.traffic(1)
        await on.settled()


async def test_a_removed_node_ends_its_adapter(fleet: Fleet) -> None:
    from kvplane.services.protocol.messages import NodeRequest  # noqa: PLC0415

    async with scene(fleet) as on:
        await on.attach()
        await fleet.ask("coordinator.node.remove", NodeRequest(node="a"))
        await on.ended(on._gone)
        assert "removed from the fleet" in str(on.failure)


class Gate:
    """A way to a server that can be shut."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.opened = anyio.Event()
        self.opened.set()
        self.through: list[anyio.CancelScope] = []

    def close(self) -> None:
        self.opened = anyio.Event()
        for scope in self.through:
            scope.cancel()

    async def run(self, *, task_status: anyio.abc.TaskStatus[int]) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listener:
            task_status.started(listener.extra(anyio.abc.SocketAttribute.local_port))
            await listener.serve(self._handle)

    async def _handle(self, near: anyio.abc.SocketStream) -> None:
        async with near:
            await self.opened.wait()
            async with await anyio.connect_tcp("127.0.0.1", self.port) as far, anyio.create_task_group() as both:
                self.through.append(both.cancel_scope)
                both.start_soon(self._pump, near, far)
                await self._pump(far, near)
                both.cancel_scope.cancel()

    async def _pump(self, here: anyio.abc.SocketStream, there: anyio.abc.SocketStream) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                await there.send(await here.receive())


@pytest.mark.parametrize("removed", [True, False])
async def test_what_became_of_a_node_while_its_adapter_was_cut_off_is_asked(fleet: Fleet, removed: bool) -> None:
    from kvplane.services.protocol.messages import NodeRequest  # noqa: PLC0415

    async with scene(fleet) as on:
        gate = Gate(int(fleet.url.rpartition(":")[2]))
        url, fleet.url = fleet.url, f"nats://127.0.0.1:{await on.tasks.start(gate.run)}"
        await on.attach()
        fleet.url = url
        await on.traffic(1, 2)
        await on.settled()
        gate.close()
        if removed:
            await fleet.ask("coordinator.node.remove", NodeRequest(node="a"))
        else:
            await until(lambda: on.coordinator.state.nodes["a"].lost)
        await until(lambda: not on.adapter.client.is_connected)
        gate.opened.set()
        if removed:
            await on.ended(on._gone)
            assert "removed from the fleet" in str(on.failure)
        else:
            await on.settled()


async def test_what_keeps_an_engine_from_being_a_node_is_said(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        async with Engine("vllm", f"http://127.0.0.1:{free_port()}") as http:
            with pytest.raises(EngineUnfit, match="--engine"):
                await http.facts()
        async with Engine("vllm", on.engine.url) as http:
            facts = await http.facts()
            with pytest.raises(EngineUnfit, match="--kv-events-config"):
                check("vllm", facts, [])


async def test_blocks_of_another_size_than_the_engine_said_end_the_adapter(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        await on.engine.kill()
        on.engine.block_size = 2
        await on.engine.start(on.tasks)
        await on.attach()
        await on.traffic(1)
        await on.ended(on._gone)
        assert "--block-size 4" in str(on.failure)
