"""Snapshots of a large fleet: start-up with one and without, its size, and how long taking one stops those who answer.

Server, coordinator and router are processes. The log is written without fsync, for speed; what is measured reads. As a
module of its own it is a service that measures the gaps in its event loop.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from benchmarks.common import Limit, Row, Worker, quiet, resident_bytes, row
from benchmarks.decision import BLOCK_SIZE
from benchmarks.past import unsafe_server
from benchmarks.service import FLEET, ROUTE, register
from benchmarks.workload import CHAIN, NODES, pieces
from kvplane.events import codec
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.events.types import BlocksStored
from kvplane.services.process import hugepages
from kvplane.services.protocol import messages
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

START = Limit(most=10)
SIZE = Limit(most=12)
PAUSE = Limit(most=50)
TICK_SECONDS = 0.001
ASKED = 500
"""Chains that requests ask for."""
ANSWER_SECONDS = 300.0


async def write(client: Client, memberships: int) -> list[bytes]:
    """A log with so many memberships in commits of 256 blocks, each block on one node; some of the chains."""
    await open_stream(client.jetstream(), FLEET, create=True)
    names = [f"n{number}" for number in range(NODES)]
    epochs = await register(Appender(client, FLEET, new_writer("bench")), names)
    draw = random.Random(5)
    chains = []
    for number in range(memberships // CHAIN):
        chain = draw.randbytes(CHAIN * 8)
        if number % (memberships // CHAIN // ASKED + 1) == 0:
            chains.append(chain)
        node = number % NODES
        events = [
            BlocksStored(names[node], epochs[node], number + 1, part, parent) for part, parent in pieces(chain, 64)
        ]
        await client.publish(subject(FLEET, "cache", names[node]), codec.encode(events))
        if number % 500 == 0:
            await client.flush(timeout=60)
    last = NODES + memberships // CHAIN
    with anyio.fail_after(ANSWER_SECONDS):
        while (await open_stream(client.jetstream(), FLEET)).last_seq < last:
            await anyio.sleep(0.1)
    return chains


async def load(client: Client, chains: list[bytes]) -> None:
    """Ask for decisions, one after the other, and have nodes store what others hold, until cancelled.

    New blocks would make the index grow, and a dictionary that grows stands still for a moment of its own.
    """
    bodies = [
        msgspec.msgpack.encode(
            messages.RouteRequest(model="m", hashes=chain, tokens_count=CHAIN * BLOCK_SIZE + 1, dry_run=True)
        )
        for chain in chains
    ]
    for number in count():
        node, at = number // len(chains) % NODES, number % len(chains)
        await client.request(ROUTE, bodies[at], timeout=30)
        event = BlocksStored(f"n{node}", node + 1, 0, chains[at][: 64 * 8])
        await client.publish(subject(FLEET, "cache", f"n{node}"), codec.encode([event]))


def started(role: str, url: str) -> tuple[Worker, float]:
    """A service, and how long it took from its process's start until it answers."""
    begin = time.perf_counter()
    worker = Worker("snapshots", arguments=[role, url])
    return worker, time.perf_counter() - begin


async def measure(*, quick: bool) -> list[Row]:
    memberships = 200_000 if quick else 10_000_000
    rest = 1.0 if quick else 5.0
    with tempfile.TemporaryDirectory() as folder:
        async with unsafe_server(Path(folder) / "data") as url, connected([url], "bench") as client:
            chains = await write(client, memberships)
            router, fold_seconds = started("router", url)
            with router:
                folded, fold_cpu = router.ask("memory"), router.hello["cpu"]
            coordinator, _ = started("coordinator", url)
            with coordinator:
                taken: dict[str, Any] = await ask(
                    client, f"kv.{FLEET}.coordinator.snapshot", messages.StatusRequest(), seconds=ANSWER_SECONDS
                )
                router, start_seconds = started("router", url)
                with router:
                    loaded = router.ask("memory")
                    if router.hello["began"] != taken["sequence"] or router.hello["memberships"] < memberships - CHAIN:
                        raise RuntimeError(f"the router did not begin with the snapshot: {router.hello}")
                    async with anyio.create_task_group() as group:
                        group.start_soon(load, client, chains)
                        await anyio.sleep(1)
                        gaps = await _gaps(client, router, coordinator, rest)
                        group.cancel_scope.cancel()
    size = taken["bytes"] / router.hello["memberships"]
    title = f"{memberships / 1e6:g} M memberships"
    work = {
        what: f"worst gap of its event loop; {gaps[what][1]:.0f} ms when it had the core"
        for what in ("snapshot", "digest")
    }
    return [
        row(f"start of a router, {title}, with a snapshot", start_seconds, "s", limit=START,
            note=f"from its process's start; {router.hello['cpu']:.1f} s of them computing; {loaded / 1e6:,.0f} MB then"),
        row(f"start of a router, {title}, without", fold_seconds, "s",
            note=f"{fold_cpu:.1f} s of them computing; {folded / 1e6:,.0f} MB then"),
        row("snapshot, bytes a membership", size, "B", limit=SIZE,
            note=f"{taken['bytes'] / 1e6:,.0f} MB in {taken['seconds']:.1f} s"),
        row("pause of a coordinator that takes a snapshot", gaps["snapshot"][0], "ms", limit=PAUSE, beside="none taken",
            other=gaps["coordinator at rest"][0], note=f"{work['snapshot']}; the fork took {gaps['fork']:.0f} ms"),
        row("pause of a router that notes a checkpoint", gaps["digest"][0], "ms", limit=PAUSE, beside="none noted",
            other=gaps["router at rest"][0], note=f"{work['digest']}; it decides and reads the log"),
        row("digest at a checkpoint", gaps["digest seconds"], "s", note="in a forked copy, beside the service"),
    ]  # fmt: skip


async def _gaps(client: Client, router: Worker, coordinator: Worker, rest: float) -> dict[str, Any]:
    """Worst gaps in milliseconds: of services that answer, at rest and while a copy of them is at work and after."""
    found: dict[str, Any] = {}

    async def gap(worker: Worker) -> tuple[float, float]:
        wall, work = await anyio.to_thread.run_sync(worker.ask, "gap")
        return wall, work

    for worker in (router, coordinator):
        await gap(worker)
    await anyio.sleep(rest)
    found["router at rest"], found["coordinator at rest"] = await gap(router), await gap(coordinator)
    begin = time.perf_counter()
    status = f"kv.{FLEET}.router.{router.hello['writer']}.status"
    await ask(client, status, messages.StatusRequest(digest=True), seconds=ANSWER_SECONDS)
    found["digest seconds"] = time.perf_counter() - begin
    # What is written afterwards is copied page by page.
    await anyio.sleep(rest)
    found["digest"] = await gap(router)
    await gap(coordinator)
    taken: dict[str, Any] = await ask(
        client, f"kv.{FLEET}.coordinator.snapshot", messages.StatusRequest(), seconds=ANSWER_SECONDS
    )
    await anyio.sleep(rest)
    found["snapshot"], found["fork"] = await gap(coordinator), 1e3 * taken["pause"]
    return found


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    quiet()
    rows: list[Row] = anyio.run(lambda: measure(quick=quick), backend_options={"use_uvloop": True})
    return rows


class Ticker:
    """The longest time for which the event loop did nothing for others, and how long it computed meanwhile.

    The first includes what other processes took of the core.
    """

    def __init__(self) -> None:
        self._worst = (0.0, 0.0)

    async def run(self) -> None:
        """Tick until cancelled."""
        last, busy = time.perf_counter(), time.thread_time()
        while True:
            await anyio.sleep(TICK_SECONDS)
            now, worked = time.perf_counter(), time.thread_time()
            wall, work = self._worst
            self._worst = max(wall, now - last - TICK_SECONDS), max(work, worked - busy)
            last, busy = now, worked

    def gap(self) -> tuple[float, float]:
        """The worst since it was asked last, in milliseconds."""
        (wall, work), self._worst = self._worst, (0.0, 0.0)
        return 1e3 * wall, 1e3 * work


async def service(role: str, url: str) -> None:
    """Worker: a router or a coordinator that tells its gaps and its memory."""
    ticker = Ticker()
    commands: dict[str, Callable[[], object]] = {"gap": ticker.gap, "memory": lambda: resident_bytes() or 0}
    async with connected([url], role) as client, anyio.create_task_group() as group:
        # What others decided in the last minute matters to nobody here.
        kind = Router if role == "router" else Coordinator
        one = kind(client, FLEET, recent_seconds=0)
        await group.start(one.run)
        await client.flush()
        group.start_soon(ticker.run)
        index = one.state.caches.by_model["m"]
        hello = {
            "writer": one.writer,
            "began": one.replica.began,
            "memberships": index.block_copies,
            "cpu": time.process_time(),
        }
        print(msgspec.json.encode(hello).decode(), flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(msgspec.json.encode(commands[msgspec.json.decode(line)["do"]]()).decode(), flush=True)
        group.cancel_scope.cancel()


def main() -> None:
    hugepages.from_the_start()  # as services do
    quiet()
    role, url = sys.argv[1:]
    anyio.run(service, role, url, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
