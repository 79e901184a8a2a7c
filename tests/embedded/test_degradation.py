"""What kvplane does while something it stands on is gone: the log's disk, the server, the time to read the log."""

from __future__ import annotations

import signal
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.events.log.group import GroupWriter
from kvplane.events.subjects import subject
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.demo.fleet import Fleet as Processes
from kvplane.services.embedded.keeper import kept
from kvplane.services.embedded.server import start_server
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask
from tests.support.disks import filled
from tests.support.fleet import fleet_on
from tests.support.fork_server import open_program
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

REGISTER = messages.RegisterRequest(
    node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 1 << 20}
)


def _request(number: int) -> messages.RouteRequest:
    """A request whose decision takes some 16 kB on the log."""
    return messages.RouteRequest(model="m", hashes=pack_hashes(range(number * 2000, number * 2000 + 2000)))


async def _routed(url: str, fleet: str) -> list[str]:
    """Requests whose decisions are on the log, in its order."""
    found: list[str] = []

    def collect(message: codec.Message) -> None:
        found.extend(
            event.request for event in codec.decode(fleet, message).events if isinstance(event, types.RequestRouted)
        )

    async with connected([url], "reader") as client:
        await replay(client, fleet, collect)
    return found


async def test_a_full_disk_under_the_log_costs_no_answer_and_nothing_acknowledged(small: Path) -> None:
    logs.configure("warning")
    start = partial(start_server, small / "data", port=free_port())
    with capture_logs() as logged:
        async with (
            kept(start, look_seconds=0.1) as keeping,
            connected([keeping.server.url], "test") as client,
        ):
            async with fleet_on(keeping.server.url, client) as fleet:
                await fleet.coordinator(answer_seconds=1.0)
                router = await fleet.router()
                await fleet.ask("coordinator.node.register", REGISTER)
                await until(lambda: "a" in router.state.nodes)
                answered: list[str] = []

                async def route(count: int) -> None:
                    for _ in range(count):
                        answer = await fleet.ask("route", _request(len(answered)), messages.RouteAnswer)
                        answered.append(answer.request)

                await route(20)
                await until(lambda: not router._access.waiting)
                with filled(small):
                    await route(100)
                    await until(lambda: router.degraded)
                    await route(1)
                    with pytest.raises(ServiceFault) as refused:
                        await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))
                    assert refused.value.code == "log_unavailable"
                    await until(lambda: keeping.full)
                    stored = router._access.acknowledged
                    assert stored < len(answered)
                await until(lambda: keeping.restarts == 1)
                await until(lambda: not router._access.waiting)
                await route(1)
                await until(lambda: not router.degraded)
                await fleet.ask("coordinator.node.uncordon", messages.NodeRequest(node="a"))
            assert await _routed(keeping.server.url, "default") == answered
    events = [entry["event"] for entry in logged]
    assert [name for name in events if name in {"disk_full", "disk_has_room"}] == ["disk_full", "disk_has_room"]
    away = next(entry for entry in logged if entry["event"] == "log_is_away")
    assert "TimeoutError" in away["error"]


async def test_a_server_that_dies_under_up_is_started_again(tmp_path: Path) -> None:
    start = partial(start_server, tmp_path / "data", port=free_port())
    async with (
        kept(start) as keeping, connected([keeping.server.url], "test") as client,
        fleet_on(keeping.server.url, client) as fleet,
    ):  # fmt: skip
        await fleet.coordinator()
        await fleet.ask("coordinator.node.register", REGISTER)
        first = keeping.server.pid
        keeping.server.kill()
        await until(lambda: keeping.restarts == 1)
        await until(lambda: client.is_connected)
        await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))
        assert keeping.server.pid != first


async def test_a_router_that_stood_still_reads_what_it_missed(tmp_path: Path) -> None:
    """Long enough for the server to give its consumer up, and with more on the log than it may have on its way."""
    fleet = Processes(tmp_path, free_port(), "slow", open_process=open_program)
    await fleet.start_server()
    try:
        async with connected([fleet.url], "test") as client:
            await fleet.start("coordinator", "coordinator")
            await fleet.coordinators(client, 1)
            await fleet.start("router", "router")
            (writer,) = await fleet.routers(client, 1)
            epochs: dict[str, int] = {}
            for node in "abc":
                register = replace(REGISTER, node=node)
                epochs[node] = (await ask(client, "kv.slow.coordinator.node.register", register))["epoch"]
            fleet.signal("router", signal.SIGSTOP)
            # Three of them, since one may not write so much.
            appender = Appender(client, "slow", new_writer("test"))
            groups = {node: GroupWriter(appender, subject("slow", "cache", node)) for node in epochs}
            async with anyio.create_task_group() as tasks:
                for group in groups.values():
                    tasks.start_soon(group.run)
                for batch in range(30_000):
                    node = "abc"[batch % 3]
                    stored = pack_hashes(range(batch * 8, batch * 8 + 8))
                    await groups[node].send(types.BlocksStored(node, epochs[node], batch, stored))
                for group in groups.values():
                    await group.flush()
                await anyio.sleep(5)
                tasks.cancel_scope.cancel()
            fleet.signal("router", signal.SIGCONT)
            state = FleetState("slow")
            last = await replay(client, "slow", state.apply)
            status: dict[str, Any] = {"sequence": 0}
            with anyio.fail_after(30):
                while status["sequence"] < last:
                    with suppress(ServiceFault):
                        status = await ask(
                            client, f"kv.slow.router.{writer}.status", messages.StatusRequest(digest=True)
                        )
            assert (status["sequence"], status["digest"]) == (last, digest(state))
            assert status["memberships"] == 240_000
    finally:
        await fleet.stop()
