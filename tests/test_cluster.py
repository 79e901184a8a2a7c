"""A log that three servers keep: stopped one by one, killed, paused, two at once. Nothing acknowledged is lost and routers go on."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from events import types
from events.errors import LogUnavailable
from events.log.append import Appender, new_writer
from events.log.connection import connected
from services import api
from services.client import ask
from services.demo.fleet import Fleet
from tests.cluster import NAMES, Cluster, cluster_in, until
from tests.ledger import MODEL, Ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

pytestmark = pytest.mark.anyio

NAME = "three"
CLIENTS = 4


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_in(tmp_path) as running:
        yield running


@pytest.fixture
async def fleet(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two coordinators and two routers, in processes of their own, that know all servers."""
    running = Fleet(tmp_path, 0, NAME)
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
    """Two writers and four clients of the routers for the length of a block, each with a connection of its own."""
    stop = anyio.Event()

    async def work(what: Any, name: str) -> None:
        async with connected(cluster.urls, name) as client:
            await what(client, stop, name=name)

    async with connected(cluster.urls, "test") as client:
        await ledger.register(client, "node-a", "node-b")
        async with anyio.create_task_group() as group:
            for number in range(2):
                group.start_soon(work, ledger.write, f"writer-{number}")
            for number in range(CLIENTS):
                group.start_soon(work, ledger.route, f"client-{number}")
            await anyio.sleep(0.5)
            yield client
            await anyio.sleep(0.5)
            stop.set()


def tell(what: str, ledger: Ledger) -> None:
    stalls = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sorted(ledger.stalls.items()))
    print(
        f"\n{what}: {len(ledger.committed):,} commits, longest waits {stalls}; {len(ledger.routed):,} routes, "
        f"longest wait {ledger.slowest:.2f} s, {ledger.degraded:,} degraded"
    )


async def test_all_servers_restart_one_by_one_and_no_request_fails(cluster: Cluster, fleet: Fleet) -> None:
    ledger = Ledger(NAME)
    async with load(cluster, ledger) as client:
        for name in NAMES:
            await cluster.lame_duck(name)
            await cluster.start(name)
    tell("rolling restart", ledger)
    assert ledger.failed == []
    async with connected(cluster.urls, "test") as client:
        await ledger.check(client, routers=2, coordinators=2)


async def test_the_leader_is_killed_and_routers_go_on(cluster: Cluster, fleet: Fleet) -> None:
    ledger = Ledger(NAME)
    async with load(cluster, ledger) as client:
        leader = await cluster.leader(NAME)
        assert leader is not None
        await cluster.kill(leader)
        before = len(ledger.committed)
        await until(partial(_more, ledger, before + 50))
        await cluster.start(leader)
    tell("leader killed", ledger)
    assert ledger.failed == []
    # Longer than the first wait of `ask`: a request was asked again, and again no answer came.
    assert ledger.slowest < 1.0
    async with connected(cluster.urls, "test") as client:
        await ledger.check(client, routers=2, coordinators=2)


async def _more(ledger: Ledger, count: int) -> bool:
    return len(ledger.committed) > count


async def test_one_server_alone_acknowledges_nothing_and_routers_say_so(cluster: Cluster, fleet: Fleet) -> None:
    ledger = Ledger(NAME)
    request = api.RouteRequest(model=MODEL, tokens=list(range(40)))

    async def degraded(client: Client, *, expected: bool) -> bool:
        answers = [await ask(client, f"kv.{NAME}.route", request, api.RouteAnswer) for _ in range(10)]
        return all(answer.degraded is expected for answer in answers)

    async with load(cluster, ledger) as client:
        await until(partial(degraded, client, expected=False))
        await cluster.kill(*NAMES[:2])
        acknowledged = len(ledger.committed)
        await until(partial(degraded, client, expected=True))
        with pytest.raises(LogUnavailable):
            appender = Appender(client, NAME, new_writer("test"))
            await appender.append(f"kv.{NAME}.control", [types.PolicyChanged("ttft")], give_up=1)
        # What was on its way when the second was killed may have been acknowledged.
        assert len(ledger.committed) <= acknowledged + 2
        await cluster.start(*NAMES[:2])
        await until(partial(_more, ledger, acknowledged + 50))
        await until(partial(degraded, client, expected=False))
    tell("two of three killed", ledger)
    assert ledger.failed == []
    async with connected(cluster.urls, "test") as client:
        await ledger.check(client, routers=2, coordinators=2)
