"""Servers of a log on three are restarted, killed and paused: nothing acknowledged is lost, and routers go on."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events import types
from kvplane.events.errors import LogUnavailable
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import stream_info
from kvplane.projections.digest import digest
from kvplane.services.demo.fleet import Fleet
from kvplane.services.protocol import messages
from kvplane.services.replication.replica import Replica
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.rpc.client import ask
from tests.support.fork_server import open_program
from tests.support.load_ledger import MODEL, Ledger
from tests.support.three_servers import NAMES, WAIT_SECONDS, Cluster, cluster_in
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

pytestmark = [
    pytest.mark.anyio,
    # nats-py forgets a connection on which a stopped server never said a word.
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
]

NAME = "three"
WRITERS, CLIENTS = 2, 2


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_in(tmp_path) as running:
        yield running


@pytest.fixture
async def fleet(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two coordinators and two routers, in processes of their own, that know all servers."""
    running = Fleet(tmp_path, 0, NAME, open_process=open_program)
    running.urls = cluster.urls
    try:
        for name in ("coordinator-1", "coordinator-2"):
            await running.start(name, "coordinator")
        async with connected(cluster.urls, "test") as client:
            await running.coordinators(client, 2)
            for name in ("router-1", "router-2"):
                await running.start(name, "router")
            await running.routers(client, 2)
        yield running
    finally:
        await running.stop()


@asynccontextmanager
async def load(cluster: Cluster, ledger: Ledger) -> AsyncIterator[Client]:
    """Writers and clients of the routers for the length of a block, each with a connection of its own."""
    stop = anyio.Event()

    async def work(what: Any, name: str) -> None:
        async with connected(cluster.urls, name) as client:
            await what(client, stop, name=name)

    async with connected(cluster.urls, "test") as client:
        for node in ("node-a", "node-b"):
            await ledger.register(client, node)
        async with anyio.create_task_group() as group:
            for number in range(WRITERS):
                group.start_soon(work, ledger.write, f"writer-{number}")
            for number in range(CLIENTS):
                group.start_soon(work, ledger.route, f"client-{number}")
            await until(lambda: len(ledger.committed) > 20 and len(ledger.routed) > 20, WAIT_SECONDS)
            yield client
            committed, routed = len(ledger.committed), len(ledger.routed)
            await until(
                lambda: len(ledger.committed) > committed + 20 and len(ledger.routed) > routed + 20, WAIT_SECONDS
            )
            stop.set()


def print_figures(what: str, ledger: Ledger) -> None:
    stalls = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sorted(ledger.stalls.items()))
    print(  # noqa: T201 - figures that are asked for
        f"\n{what}: {len(ledger.committed):,} commits, longest waits {stalls}; {len(ledger.routed):,} routes, "
        f"longest wait {ledger.slowest:.2f} s, {ledger.degraded:,} degraded"
    )


@pytest.mark.usefixtures("fleet")
async def test_all_servers_restart_one_by_one_and_no_request_fails(cluster: Cluster) -> None:
    ledger = Ledger(NAME)
    async with load(cluster, ledger) as client:
        for name in NAMES:
            await cluster.lame_duck(name)
            await cluster.start(name)
    print_figures("rolling restart", ledger)
    assert ledger.failed == []
    async with connected(cluster.urls, "test") as client:
        await ledger.check(client, routers=2, coordinators=2)


@pytest.mark.usefixtures("fleet")
async def test_the_leader_is_killed_then_another_and_routers_go_on(cluster: Cluster) -> None:
    ledger = Ledger(NAME)
    async with load(cluster, ledger) as client:
        first = await cluster.leader(NAME)
        assert first is not None
        await until(partial(_degraded, client, expected=False), WAIT_SECONDS)
        await cluster.kill(first)
        await until(partial(_more, ledger, len(ledger.committed) + 50), WAIT_SECONDS)
        print_figures("leader killed", ledger)

        second = cluster.running[0].name
        await cluster.kill(second)
        acknowledged = len(ledger.committed)
        await until(partial(_degraded, client, expected=True), WAIT_SECONDS)
        with pytest.raises(LogUnavailable):
            appender = Appender(client, NAME, new_writer("test"))
            await appender.append(f"kv.{NAME}.control", [types.PolicyChanged("ttft")], give_up=1)
        # Each writer had one on its way when there were still two, or the one that is left had it on its disk already.
        assert len(ledger.committed) <= acknowledged + WRITERS

        await cluster.start(first, second)
        await until(partial(_more, ledger, acknowledged + 50), WAIT_SECONDS)
        await until(partial(_degraded, client, expected=False), WAIT_SECONDS)
    print_figures("two of three killed", ledger)
    assert ledger.failed == []
    # A commit waits until there is a leader again, or two servers of three. A route waits for neither.
    assert ledger.slowest < min(ledger.stalls.values())
    async with connected(cluster.urls, "test") as client:
        await ledger.check(client, routers=2, coordinators=2)


async def _more(ledger: Ledger, count: int) -> bool:
    return len(ledger.committed) > count


async def _degraded(client: Client, *, expected: bool) -> bool:
    """Whether both routers answer so; which of them does is up to the servers."""
    request = messages.RouteRequest(model=MODEL, tokens=list(range(40)))
    answers = [await ask(client, f"kv.{NAME}.route", request, messages.RouteAnswer) for _ in range(10)]
    return all(answer.degraded is expected for answer in answers)


async def test_followers_go_on_when_the_server_of_one_is_stopped_and_when_it_wakes(cluster: Cluster) -> None:
    """Every connection stays open, but on one server nothing answers; it leads the stream."""
    ledger = Ledger(NAME)
    stop = anyio.Event()
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        client = await stack.enter_async_context(connected(cluster.urls, "test"))
        await group.start(Coordinator(client, NAME).run)
        assert (await stream_info(client.jetstream(), NAME)).config.num_replicas == 3
        # One on each server; of the others each learns from its own.
        replicas = {}
        for member in cluster.members.values():
            replicas[member.name] = Replica(await stack.enter_async_context(connected([member.url], member.name)), NAME)
            group.start_soon(replicas[member.name].run)
        written = anyio.Event()

        async def write() -> None:
            await ledger.write(client, stop)
            written.set()

        group.start_soon(write)
        leader = await cluster.leader(NAME)
        assert leader is not None
        await until(partial(_reach, replicas, ledger, 20), WAIT_SECONDS)
        cluster.pause(leader)
        await until(partial(_reach, replicas, ledger, 50), WAIT_SECONDS)
        cluster.resume(leader)
        await until(partial(_reach, replicas, ledger, 500), WAIT_SECONDS)
        stop.set()
        await written.wait()
        last = max(ledger.committed)
        for replica in replicas.values():
            await replica.reached(last)
        print(  # noqa: T201 - figures that are asked for
            f"\nserver stopped: longest waits {ledger.stalls}, restarts {[r.follower.restarts for r in replicas.values()]}"
        )
        assert len({digest(replica.state) for replica in replicas.values()}) == 1
        assert not any(replica.state.skipped for replica in replicas.values())
        group.cancel_scope.cancel()


async def _reach(replicas: dict[str, Replica], ledger: Ledger, more: int) -> bool:
    """Whether all replicas have read what was acknowledged, and that is `more` than when the server stopped."""
    return len(ledger.committed) >= more and all(
        replica.state.sequence >= max(ledger.committed) - 20 for replica in replicas.values()
    )


async def test_a_log_with_one_copy_gets_three(cluster: Cluster) -> None:
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        client = await stack.enter_async_context(connected(cluster.urls, "test"))
        await group.start(Coordinator(client, NAME, replicas=1).run)
        await Ledger(NAME).register(client, "node-a")
        taken: dict[str, Any] = await ask(client, f"kv.{NAME}.coordinator.snapshot", messages.StatusRequest())

        arguments = ["copies", "3", "--fleet", NAME, *(f"--server={url}" for url in cluster.urls)]
        done = await anyio.run_process([sys.executable, "-m", "kvplane", *arguments], check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"all are current" in done.stdout
        leader = await cluster.leader(NAME)
        assert leader is not None
        await cluster.kill(leader)

        async def snapshots() -> list[int]:
            with suppress(LogUnavailable):
                return await SnapshotStore(client, NAME).sequences()
            return []

        await until(snapshots, WAIT_SECONDS)
        assert await snapshots() == [taken["sequence"]]
        await Ledger(NAME).register(client, "node-b")
        group.cancel_scope.cancel()
