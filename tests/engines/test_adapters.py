"""The adapter as a service: what it tells Prometheus is what the engine said and the log has, and it says what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events import codec, types
from kvplane.services.engines.adapters import Adapters
from kvplane.services.engines.attachment import Attachment
from kvplane.services.engines.facts import Engine
from kvplane.services.protocol.errors import EngineUnfit
from tests.support.commands import run
from tests.support.deaf_client import break_read_loop, deaf
from tests.support.fake_engine import FakeEngine, running
from tests.support.fake_ranks import ranks
from tests.support.historians import messages_of
from tests.support.http_of_services import Http, observed
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def attached(fleet: Fleet, url: str, **wanted: Any) -> AsyncIterator[tuple[Adapters, Http]]:
    """The service as the command runs it, observed."""
    wanted = {"node": "a", "pulse_seconds": 0.2, **wanted}
    async with Engine("vllm", url) as engine, anyio.create_task_group() as group:
        service = Adapters(await fleet.connect("attach"), fleet.name, engine, Attachment(**wanted))
        group.start_soon(service.run)
        async with observed(service) as http:
            yield service, http
        group.cancel_scope.cancel()


async def publish(engine: FakeEngine, *prompts: int, lost: bool = False) -> None:
    for prompt in prompts:
        engine.cache.request([prompt] * 3 * engine.cache.size)
        await engine.publish(lost=lost)


async def ready(http: Http, reason: str = "") -> dict[str, Any]:
    """Wait until `/readyz` gives this reason, or says ready."""
    body: dict[str, Any] = {}
    try:
        with anyio.fail_after(30):
            while body.get("reason") != reason:
                await anyio.sleep(0.05)
                status, body = await http.state("/readyz")
    except TimeoutError:
        assert body.get("reason") == reason
    assert status == (503 if reason else 200)
    return body


async def test_what_is_counted_is_what_the_engine_said_and_the_log_has(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    async with ranks(2) as engine, attached(fleet, engine[0].url) as (service, http):
        first, second = engine
        await ready(http)
        tracks = [adapter.track for adapter in service.adapters]
        await publish(first, 1, 2, 3, 4, 5)
        # One is lost, and asked for again when the next one comes.
        await publish(first, 6, lost=True)
        await publish(first, 7)
        first.cache.queue += [{"type": "BlockPinned"}, {"type": "BlockPinned"}]
        orphan = {
            "type": "BlockStored", "block_hashes": [99], "parent_block_hash": 98, "token_ids": [1] * 4, "block_size": 4,
            "medium": "GPU",
        }  # fmt: skip
        first.cache.queue.append(orphan)
        await publish(first, 8)
        await first._pub.send_multipart([b"nothing", b"of the kind"])
        await publish(second, 50)
        second.cache.reset()
        await second.publish()
        await until(lambda: [track.position for track in tracks] == [first.cache.sequence - 1, 1])
        await until(lambda: service.adapters[0].published.malformed)
        for adapter in service.adapters:
            await adapter._log.flush()
        metrics = await http.metrics()
        log = await messages_of(fleet.client)
        await until(lambda: coordinator.state.sequence >= log[-1].sequence)
        # The nodes leave with the adapter.
        held = {name: coordinator.state.caches.held(node) for name, node in coordinator.state.nodes.items()}
    batches = {"a-dp0": 8, "a-dp1": 2}
    assert metrics.by("kvplane_adapter_batches_total", "node") == batches
    assert metrics.by("kvplane_adapter_last_batch", "node") == {node: count - 1 for node, count in batches.items()}
    assert metrics.by("kvplane_adapter_engine_well", "node") == dict.fromkeys(batches, 1)
    assert metrics.by("kvplane_adapter_registrations_total", "node") == dict.fromkeys(batches, 1)
    # Eight prompts of three blocks, in a cache of twelve.
    assert metrics.by("kvplane_adapter_copies_total", "change", node="a-dp0") == {"stored": 25, "removed": 12}
    assert metrics.by("kvplane_adapter_blocks", "tier", node="a-dp0") == {"gpu": 12}
    assert metrics.by("kvplane_adapter_clears_total", "node") == {"a-dp1": 1}
    assert metrics("kvplane_adapter_blocks", node="a-dp1") == 0
    assert metrics.by("kvplane_adapter_not_followed_total", "reason") == {"lost_parent": 1}
    assert metrics.by("kvplane_adapter_unknown_events_total", "type") == {"BlockPinned": 2}
    assert metrics.by("kvplane_adapter_malformed_messages_total", "node") == {"a-dp0": 1}
    replays = metrics.by("kvplane_adapter_replays_total", "node")
    assert (first.replay_requests, second.replay_requests) == (replays["a-dp0"], replays["a-dp1"])
    for never in ("gaps", "told_anew", "overflows"):
        assert metrics.by(f"kvplane_adapter_{never}_total", "node") == {}
    # The log.
    commits = [message for message in log if message.subject.startswith(f"kv.{fleet.name}.cache.")]
    events = [event for message in commits for event in codec.decode_body("cache", message.body)]
    assert metrics("kvplane_log_appended_commits_total", service="adapter") == len(commits)
    assert metrics("kvplane_log_append_seconds_count", service="adapter") == len(commits)
    assert metrics("kvplane_log_appended_events_total", service="adapter") == len(events)
    stored = [event for event in events if isinstance(event, types.BlocksStored)]
    assert sum(len(event.hashes) // 8 for event in stored if event.node == "a-dp0") == 24
    assert held == {"a-dp0": 12, "a-dp1": 0}


async def test_gaps_and_what_is_told_anew_are_counted(fleet: Fleet) -> None:
    await fleet.coordinator()
    async with running(FakeEngine(buffer=2)) as engine, attached(fleet, engine.url) as (_, http):
        await ready(http)
        await publish(engine, 1)
        await publish(engine, 2, 3, 4, lost=True)
        await publish(engine, 5)
        with anyio.fail_after(20):
            while (await http.metrics())("kvplane_adapter_told_anew_total") != 1:
                await anyio.sleep(0.05)
        metrics = await http.metrics()
        assert metrics("kvplane_adapter_gaps_total") == 1
        assert metrics("kvplane_adapter_blocks", node="a", tier="gpu") == 6
        await engine.restart()
        with anyio.fail_after(20):
            while (await http.metrics())("kvplane_adapter_registrations_total") != 2:
                await anyio.sleep(0.05)


async def test_who_is_not_ready_says_why(fleet: Fleet, server: Server) -> None:
    engine = FakeEngine()
    engine.loading = True
    async with running(engine), attached(fleet, engine.url) as (service, http):
        # Nothing is known of the engine yet, so there are no nodes.
        body = await ready(
            http, f"adapter: the engine at {engine.url} is not well yet: {engine.url}/health answers 503"
        )
        assert body["services"]["adapter"]["nodes"] == 0
        assert (await http.state("/healthz"))[0] == 200
        assert (await http.metrics())("kvplane_ready", service="adapter") == 0
        engine.loading = False
        await ready(http, "adapter: node a: it is not registered")
        coordinator = await fleet.coordinator()
        await ready(http)
        assert (await http.metrics())("kvplane_ready", service="adapter") == 1
        engine.loading = True
        await ready(http, "adapter: node a: the engine is not well")
        assert (await http.metrics())("kvplane_adapter_engine_well", node="a") == 0
        await until(lambda: coordinator.state.nodes["a"].lost is not None)
        engine.loading = False
        await ready(http)
        assert service.adapters[0].member.registrations == 2
        os.kill(server.pid, signal.SIGSTOP)
        try:
            await publish(engine, 1)
            await ready(http, "adapter: node a: the log is away")
            metrics = await http.metrics()
            assert (await http.state("/healthz"))[0] == 200
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert metrics("kvplane_log_available", service="adapter") == 0
        assert metrics("kvplane_log_waiting_events", service="adapter") == 1
        await ready(http)


async def test_an_adapter_whose_read_loop_ended_is_mended_and_goes_on(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    async with running(FakeEngine()) as engine, attached(fleet, engine.url) as (service, http):
        await ready(http)
        break_read_loop(service.client)
        await until(lambda: deaf(service.client))
        # What it says still arrives, and it never learns so.
        await publish(engine, 1, 2)
        with anyio.fail_after(30):
            while (await http.metrics())("kvplane_nats_read_loop_failures_total", service="adapter") != 1:
                await anyio.sleep(0.05)
        node = coordinator.state.nodes["a"]
        await until(
            lambda: coordinator.state.caches.held(node) == 6 and not service.adapters[0].outbox.writer.waiting, 30
        )
        # It hears again what becomes of its node.
        engine.loading = True
        await until(lambda: coordinator.state.nodes["a"].lost is not None)
        engine.loading = False
        await until(lambda: service.adapters[0].member.registrations == 2)
        await ready(http)
        assert (await http.state("/healthz"))[0] == 200


async def test_the_command_serves_http_and_an_engine_that_never_comes_ends_it(server: Server) -> None:
    address, url = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "kvplane", "attach", "vllm", "--server", server.url, "--engine", url, "--node", "a",
        "--wait", "6", "--http", address,
    ]  # fmt: skip
    process = await anyio.open_process(command, stderr=subprocess.PIPE)
    try:
        nobody = f"nobody listens at {url.removeprefix('http://')} (connection refused)"
        await ready(Http(address), f"adapter: the engine at {url} is not well yet: {nobody}")
        assert process.stderr is not None
        stderr = b"".join([part async for part in process.stderr])
        assert await process.wait() == 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert f"no engine is well at {url} after 6 s".encode() in stderr


async def test_an_engine_that_can_not_be_attached_ends_the_service(fleet: Fleet) -> None:
    async with ranks(2) as engine, Engine("vllm", engine[0].url) as http:
        wanted = Attachment(node="a", one_login=True)
        with anyio.fail_after(10), pytest.raises(EngineUnfit, match="one adapter a rank"):
            await Adapters(fleet.client, fleet.name, http, wanted).run()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "127.0.0.1:8000"], "--engine is '127.0.0.1:8000'; give a URL"),
        (["--engine", "http://"], "give a URL"),
        (["--engine", "http://a:99999"], "give a URL"),
        (["--engine", "http://a", "--address", "a:8000"], "--address is 'a:8000'; give a URL"),
        (["--engine", "http://me:secret@a"], "--engine holds a login"),
        (["--engine", "http://a", "--address", "https://me@a"], "--address holds a login"),
        (["--engine", "http://a", "--rank", "-1"], "numbered from 0"),
    ],
)
def test_addresses_that_clients_can_not_use_are_refused(options: list[str], says: str) -> None:
    done = run("attach", "vllm", "--node", "a", *options)
    stderr = " ".join(done.stderr.split())
    assert done.returncode == 1
    assert says in stderr
    assert "secret" not in stderr
