"""Health and readiness: who can't work says so and why, who is deaf is mended or ends, and nobody else is disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.events.errors import first_known
from kvplane.events.log.append import ACK_SECONDS, Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.services.observability import lifeline
from kvplane.services.observability.lifeline import Lifeline
from kvplane.services.observability.web import observing
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ConnectionBroken
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.deaf_client import break_read_loop, deaf
from tests.support.http_of_services import Http, observed
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@pytest.fixture
async def router(fleet: Fleet) -> Router:
    await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="node-1"))
    started = await fleet.router()
    await until(lambda: not started.degraded)
    return started


async def test_a_read_loop_that_ended_is_mended_and_the_router_goes_on(router: Router, fleet: Fleet) -> None:
    request = messages.RouteRequest(model="sim", tokens=list(range(40)))
    async with observed(router) as http:
        await fleet.ask("route", request)
        break_read_loop(router.client)
        await until(lambda: deaf(router.client))
        # This is why it is looked at: the client says that all is well.
        assert router.client.is_connected
        status, body = await http.state("/healthz")
        assert (status, body["reason"]) == (503, "router: the connection's read loop has ended")
        with anyio.fail_after(20):
            while (await http.state("/healthz"))[0] != 200:
                await anyio.sleep(0.05)
        answer = await fleet.ask("route", request, messages.RouteAnswer)
        flushed = await fleet.ask(f"router.{router.writer}.flush", messages.StatusRequest())
        metrics = await http.metrics()
    assert answer.node == "node-1"
    assert flushed["recorded"] >= 2
    assert metrics("kvplane_nats_read_loop_failures_total") == 1
    assert metrics("kvplane_nats_reconnects_total") == 1


async def test_a_connection_that_has_gone_this_moment_is_no_defect(server: Server) -> None:
    async with connected([server.url], "test") as client:
        transport: Any = client._transport
        transport._io_writer.transport.abort()
        await until(lambda: "closed=True" in repr(transport._io_writer.transport))
        # uvloop says RuntimeError, which a watch that pings would end with.
        with pytest.raises(ConnectionResetError):
            transport.write(b"PING\r\n")
        with pytest.raises(ConnectionResetError):
            transport.writelines([b"PING\r\n"])


async def test_without_the_watch_a_deaf_client_stays_deaf(server: Server) -> None:
    """By when another one has been mended three times over."""
    async with (
        connected([server.url], "deaf") as client,
        connected([server.url], "watched") as other,
        anyio.create_task_group() as group,
    ):
        watch = Lifeline(other, "test")
        group.start_soon(watch.run)
        break_read_loop(client)
        for failures in range(1, 4):
            break_read_loop(other)
            await until(lambda failures=failures: watch.failures == failures)  # type: ignore[misc]
            await until(lambda: other.is_connected and not watch.deaf)
        assert deaf(client)
        group.cancel_scope.cancel()


async def test_a_connection_that_breaks_again_and_again_ends_the_service(
    client: Client,
) -> None:
    watch = Lifeline(client, "router", look_seconds=0.05)
    async with anyio.create_task_group() as group:
        group.start_soon(_breaking, watch)
        with pytest.raises(ConnectionBroken, match="ended 4 times in 60 s"):
            await watch.run()
        group.cancel_scope.cancel()
    assert watch.failures == lifeline.MENDED + 1


async def _breaking(watch: Lifeline) -> None:
    for failures in range(1, 9):
        break_read_loop(watch.client)
        await until(lambda failures=failures: watch.failures == failures)  # type: ignore[misc]
        await until(lambda: watch.client.is_connected and not watch.deaf)


async def test_a_client_that_was_sent_away_for_good_ends_its_service(server: Server) -> None:
    async with connected([server.url], "gone") as client:
        with anyio.fail_after(20), pytest.raises(ExceptionGroup) as caught:
            async with observing(None, Router(client, "default")):
                # As the server says it when credentials are taken back.
                await client._process_err("'User Authentication Revoked'")
                await anyio.sleep_forever()
    error = first_known(caught.value)
    assert isinstance(error, ConnectionBroken)
    assert "User Authentication Revoked" in str(error)


async def test_a_frozen_server_is_no_reason_to_start_a_router_again(router: Router, server: Server) -> None:
    async with observed(router) as http:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with anyio.fail_after(30):
                while (await http.metrics())("kvplane_router_degraded") != 1:
                    await anyio.sleep(0.1)
            alive, _ = await http.state("/healthz")
            ready, body = await http.state("/readyz")
        finally:
            os.kill(server.pid, signal.SIGCONT)
    assert (alive, ready) == (200, 200)
    assert body["services"]["router"]["degraded"] is True


async def test_a_coordinator_without_the_log_is_not_ready_and_is_again(fleet: Fleet, server: Server) -> None:
    coordinator = await fleet.coordinator()
    async with observed(coordinator) as http:
        await until(lambda: coordinator.replica.follower.healthy)
        assert (await http.state("/readyz"))[0] == 200
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with anyio.fail_after(30):
                while (await http.state("/readyz"))[0] != 503:
                    await anyio.sleep(0.1)
            _, body = await http.state("/readyz")
            assert body["reason"] == "coordinator: the log is away: nothing can be committed"
            assert (await http.state("/healthz"))[0] == 200
        finally:
            os.kill(server.pid, signal.SIGCONT)
        with anyio.fail_after(30):
            while (await http.state("/readyz"))[0] != 200:
                await anyio.sleep(0.1)


async def write_log(client: Client, commits: int) -> None:
    await open_stream(client.jetstream(), "default", create=True)
    body = codec.encode([types.PolicyChanged("ttft", {})] * 4000)
    for _ in range(commits):
        await client.publish(subject("default", "control"), body)
    await client.flush()


async def test_not_ready_while_the_log_is_read(server: Server, client: Client) -> None:
    await write_log(client, 300)
    with anyio.fail_after(20):
        while (await open_stream(client.jetstream(), "default")).last_seq < 300:
            await anyio.sleep(0.02)
    address = f"127.0.0.1:{free_port()}"
    http = Http(address)
    seen: dict[int, dict[str, Any]] = {}
    command = [sys.executable, "-m", "kvplane", "router", "--server", server.url, "--http", address]
    process = await anyio.open_process(command, stderr=subprocess.DEVNULL)
    try:
        with anyio.fail_after(60):
            while 200 not in seen:
                status, body = await http.state("/readyz")
                seen.setdefault(status, body)
                assert process.returncode is None
        assert seen[503]["services"]["router"]["reason"].startswith("the log is still being read: ")
        assert seen[503]["services"]["router"]["applied"] < 300
        assert seen[200]["services"]["router"]["applied"] == 300
        # It answers as it said.
        fault = await client.request("kv.default.route", b'{"model": "m", "tokens": [1]}')
        assert (fault.headers or {})["Nats-Service-Error-Code"] == "404"
    finally:
        process.terminate()
        await process.wait()


async def test_a_node_without_a_coordinator_is_not_ready(server: Server) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "kvplane", "simnode", "a", "b", "--server", server.url, "--http", address]
    process = await anyio.open_process(command, stderr=subprocess.DEVNULL)
    try:
        with anyio.fail_after(30):
            while (await Http(address).state("/readyz"))[0] == 0:
                await anyio.sleep(0.05)
        status, body = await Http(address).state("/readyz")
    finally:
        process.terminate()
        await process.wait()
    assert status == 503
    assert body["reason"] == "simnode: 2 of 2 nodes are not registered, such as a"


async def test_dropped_decisions_are_counted_and_said(fleet: Fleet, server: Server, router: Router) -> None:
    router._access._limit = 3
    async with observed(router) as http:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            await until(lambda: router.degraded, 30)
            with capture_logs() as logged:
                for number in range(20):
                    router.route(messages.RouteRequest(model="sim", tokens=[1], request=f"r{number}"))
                router.record_pending()
            metrics = await http.metrics()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert metrics("kvplane_router_degraded") == 1
        dropped = metrics("kvplane_log_dropped_events_total", service="router")
        assert dropped == 20 - metrics("kvplane_log_waiting_events", service="router") >= 16
        assert metrics("kvplane_router_decisions_total") == 20
        assert [line["dropped"] for line in logged if line["event"] == "events_dropped"] == [1, 2, 4, 8, 16]
        # What was not dropped is on the log in the end.
        await until(lambda: not any(writer.waiting for writer in router.writers), 30)
        status: dict[str, int] = await ask(
            fleet.client, f"kv.default.router.{router.writer}.status", messages.StatusRequest()
        )
    assert status["recorded"] + dropped == 20


async def test_retries_are_counted(fleet: Fleet, server: Server) -> None:
    await fleet.coordinator()
    appender = Appender(fleet.client, fleet.name, new_writer("test"))
    async with anyio.create_task_group() as group:
        os.kill(server.pid, signal.SIGSTOP)
        group.start_soon(appender.append, subject(fleet.name, "control"), [types.PolicyChanged("ttft", {})])
        try:
            await until(lambda: appender.retries > 0, 30)
        finally:
            os.kill(server.pid, signal.SIGCONT)
    assert appender.commits == 1
    # However often it was tried, it took as long as all of it.
    assert appender.seconds.total > ACK_SECONDS
