"""A node that is stopped in good order is gone at once, by its own word; one that is killed is lost by its silence."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from structlog.testing import capture_logs

from kvplane.events import types
from kvplane.events.log.connection import connected
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.rpc.client import ask
from kvplane.services.simulation.simnode import NodeConfig, SimNodes
from tests.support.fake_engine import FakeEngine, running
from tests.support.historians import last_word
from tests.support.waiting import until
from tests.support.with_credentials import NAME, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.msg import Msg

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def started(log: Path, *command: str) -> AsyncIterator[anyio.abc.Process]:
    with log.open("ab") as output:
        process = await anyio.open_process(
            [sys.executable, "-m", "kvplane", *command],
            stdout=output,
            stderr=output,
            env={**os.environ, "NO_COLOR": "1"},
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()


async def ended(process: anyio.abc.Process, ending: signal.Signals) -> None:
    process.send_signal(ending)
    with anyio.fail_after(20):
        await process.wait()


def holds(coordinator: Coordinator, engine: FakeEngine) -> bool:
    node = coordinator.state.nodes.get("a")
    if node is None or node.lost is not None:
        return False
    return set(coordinator.state.caches.index(node.model).held(node.slots["gpu"])) == engine.cache.held()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_a_stopped_adapter_leaves_and_a_new_one_knows_what_it_knew(
    fleet: Fleet, server: Server, tmp_path: Path, ending: signal.Signals
) -> None:
    # Liveness may not help: a node that promises an hour is lost after four of them.
    coordinator = await fleet.coordinator()
    log = tmp_path / "attach.log"
    async with running(FakeEngine(buffer=1)) as engine:
        command = (
            "attach",
            "vllm",
            "--engine",
            engine.url,
            "--node",
            "a",
            "--server",
            server.url,
            "--pulse-seconds",
            "900",
        )
        async with started(log, *command) as process:
            await until(lambda: "a" in coordinator.state.nodes, 40)
            for prompt in range(3):
                engine.cache.request([prompt] * 3 * engine.cache.size)
                await engine.publish()
                await until(lambda: holds(coordinator, engine), 20)
            await ended(process, ending)
        assert process.returncode == 0
        await until(lambda: "a" not in coordinator.state.nodes, 5)
        assert await last_word(fleet.client, "a") == types.NodeRemoved("a", "its adapter was stopped")
        assert coordinator.conclusions["lost"] == 0
        async with started(log, *command) as process:
            # The engine's own buffer has one batch only: the rest is from the log.
            await until(lambda: holds(coordinator, engine), 40)
            await ended(process, signal.SIGKILL)
    assert b"remembered" in log.read_bytes()
    assert b"learned_anew" not in log.read_bytes().partition(b"remembered")[2]
    assert isinstance(await last_word(fleet.client, "a"), types.NodeRegistered)


async def test_a_killed_adapter_is_lost_by_its_silence(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    coordinator = await fleet.coordinator()
    async with running(FakeEngine()) as engine:
        command = (
            "attach",
            "vllm",
            "--engine",
            engine.url,
            "--node",
            "a",
            "--server",
            server.url,
            "--pulse-seconds",
            "0.2",
        )
        async with started(tmp_path / "log", *command) as process:
            await until(lambda: "a" in coordinator.liveness.heartbeats, 40)
            await ended(process, signal.SIGKILL)
        await until(lambda: coordinator.state.nodes["a"].lost is not None, 20)
    assert isinstance(await last_word(fleet.client, "a"), types.NodeLost)


async def test_stopped_simulated_nodes_leave(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    coordinator = await fleet.coordinator()
    async with started(tmp_path / "log", "simnode", "a", "b", "--server", server.url) as process:
        await until(lambda: len(coordinator.state.nodes) == 2, 40)
        await ended(process, signal.SIGTERM)
    await until(lambda: not coordinator.state.nodes, 5)
    assert await last_word(fleet.client, "b") == types.NodeRemoved("b", "it was stopped")


async def test_nodes_that_nobody_answers_leave_all_the_same(fleet: Fleet) -> None:
    nodes = SimNodes([await fleet.connect("nodes")], fleet.name, [NodeConfig(name="a")], leave_seconds=0.3)
    asked: list[str] = []

    async def mute(message: Msg) -> None:
        asked.append(message.subject)

    logs.configure("warning")
    with capture_logs() as logged:
        async with anyio.create_task_group() as group:
            async with connected([fleet.url], "coordinator") as client, anyio.create_task_group() as coordinating:
                await coordinating.start(Coordinator(client, fleet.name).run)
                await group.start(nodes.run)
                coordinating.cancel_scope.cancel()
            # Where the coordinator was, somebody listens who never answers.
            await fleet.client.subscribe("kv.default.coordinator.node.leave.a", cb=mute)
            await fleet.client.flush()
            group.cancel_scope.cancel()
    (entry,) = [entry for entry in logged if entry["event"] == "leave_not_told"]
    assert (entry["node"], asked) == ("a", ["kv.default.coordinator.node.leave.a"])
    assert "in 0.3 s" in entry["error"]
    assert isinstance(await last_word(fleet.client, "a"), types.NodeRegistered)


async def test_credentials_of_a_node_let_it_leave_and_no_other(tmp_path: Path) -> None:
    async with guarded(tmp_path) as fleet, running(FakeEngine()) as engine:
        coordinator = await fleet.coordinator()
        await fleet.node("node-b")
        command = (
            "attach", "vllm", "--engine", engine.url, "--node", "node-a", "--server", fleet.url, "--fleet", NAME,
            "--ca", str(fleet.held.ca), "--credentials", str(fleet.held.seed_file(NAME, "node", "node-a")),
        )  # fmt: skip
        async with started(tmp_path / "log", *command) as process:
            await until(lambda: "node-a" in coordinator.state.nodes, 40)
            await ended(process, signal.SIGTERM)
        await until(lambda: list(coordinator.state.nodes) == ["node-b"], 5)
        node = await fleet.connect("node", "node-a")
        other = messages.LeaveRequest(node="node-b", epoch=coordinator.state.nodes["node-b"].epoch)
        with pytest.raises(ServiceFault, match="the subject is of node 'node-a', the request of 'node-b'"):
            await ask(node, f"kv.{NAME}.coordinator.node.leave.node-a", other)
        assert "node-b" in coordinator.state.nodes


async def test_only_the_present_life_leaves_and_a_cordoned_node_stays_so(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    node = messages.RegisterRequest(
        node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 4}, replace=True
    )

    async def leaves(epoch: int) -> Any:
        answer = await fleet.ask(
            "coordinator.node.leave.a", messages.LeaveRequest(node="a", epoch=epoch, reason="stop")
        )
        return answer["changed"]

    first = (await fleet.ask("coordinator.node.register", node))["epoch"]
    second = (await fleet.ask("coordinator.node.register", node))["epoch"]
    assert await leaves(first) is False
    assert coordinator.state.nodes["a"].epoch == second
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))
    assert (await leaves(second), await leaves(second)) == (True, False)
    assert (coordinator.state.nodes["a"].lost, coordinator.state.nodes["a"].cordoned) == ("stop", True)
    third = (await fleet.ask("coordinator.node.register", node))["epoch"]
    assert coordinator.state.nodes["a"].cordoned
    await fleet.ask("coordinator.node.uncordon", messages.NodeRequest(node="a"))
    assert await leaves(third) is True
    assert "a" not in coordinator.state.nodes
    assert await leaves(third) is False
