"""What is waited for when a server of three goes: by writers for an acknowledgement, by clients for a router's answer.

Real servers from the configuration of a deployment, a coordinator and two routers in processes of their own. Each time
it is the server that leads the log. The benchmark fails unless all that was acknowledged is on the log afterwards.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import anyio

from benchmarks.common import Limit, Row, row
from kvplane.events.log.connection import connected
from kvplane.services.demo.fleet import Fleet
from tests.support.load_ledger import MODEL, Ledger
from tests.support.three_servers import WAIT_SECONDS, Cluster, cluster_in
from tests.support.waiting import until

FLEET = "bench"
AFTER_SECONDS = 1.0
ROUTES = Limit(most=1.0)
GENTLE = Limit(most=1.0)
KILLED = Limit(most=10.0)


async def one(cluster: Cluster, kind: str) -> Ledger:
    """Load, and in the midst of it the leader goes and comes back; how long everybody waited."""
    ledger = Ledger(FLEET)
    stop = anyio.Event()
    async with connected(cluster.urls, "writer") as writer, connected(cluster.urls, "asker") as asker:
        await ledger.register(asker, "node", [MODEL])
        async with anyio.create_task_group() as group:
            group.start_soon(partial(ledger.write, writer, stop))
            group.start_soon(partial(ledger.route, asker, stop))
            await anyio.sleep(AFTER_SECONDS)
            leader = await cluster.leader(FLEET)
            if leader is None:
                raise RuntimeError("the log has no leader")
            await getattr(cluster, kind)(leader)
            acknowledged = len(ledger.committed)

            async def goes_on() -> bool:
                return len(ledger.committed) > acknowledged + 20

            await until(goes_on, WAIT_SECONDS)
            await cluster.start(leader)
            await anyio.sleep(AFTER_SECONDS)
            stop.set()
        if ledger.failed:
            raise RuntimeError(f"requests were not answered: {ledger.failed[:3]}")
        await ledger.check(asker, routers=2, coordinators=1)
    return ledger


async def measure(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    rounds = 1 if quick else 5
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        async with cluster_in(Path(folder)) as cluster:
            fleet = Fleet(Path(folder), 0, FLEET)
            fleet.urls = cluster.urls
            try:
                async with connected(cluster.urls, "bench") as client:
                    await fleet.start("coordinator", "coordinator")
                    await fleet.coordinators(client, 1)
                    await fleet.start("router-1", "router")
                    await fleet.start("router-2", "router")
                    await fleet.routers(client, 2)
                for kind, title, limit in (
                    ("kill", "leader killed with SIGKILL", KILLED),
                    ("terminate", "leader stopped with SIGTERM", GENTLE),
                    ("lame_duck", "leader stopped as a lame duck", GENTLE),
                ):
                    rows += _rows(title, limit, [await one(cluster, kind) for _ in range(rounds)])
            finally:
                await fleet.stop()
    return rows


def _rows(title: str, limit: Limit, ledgers: list[Ledger]) -> list[Row]:
    stalls = [max(ledger.stalls.values()) for ledger in ledgers]
    slowest = [ledger.slowest for ledger in ledgers]
    committed, routed = sum(len(ledger.committed) for ledger in ledgers), sum(len(ledger.routed) for ledger in ledgers)
    degraded = sum(ledger.degraded for ledger in ledgers)
    return [
        row(
            f"{title}, writers wait", statistics.median(stalls), "s", limit=limit,
            note=f"{min(stalls):.2f} to {max(stalls):.2f} s; {committed:,} commits acknowledged, none lost",
        ),
        row(
            f"{title}, routes wait", max(slowest), "s", limit=ROUTES,
            note=f"the longest of {routed:,}, all answered; {degraded:,} said degraded",
        ),
    ]  # fmt: skip


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    rows: list[Row] = anyio.run(lambda: measure(quick=quick), backend_options={"use_uvloop": True})
    return rows
