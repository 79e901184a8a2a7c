"""The log: blocks a second from an adapter's append to a router's replica, and from the log into a fresh fold.

The adapter and the router are processes of their own, the server syncs every write to disk. An adapter for 8 nodes hands
events of 64 blocks to its writers as they come and counts until the last block is visible in the router.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from benchmarks.common import Limit, Row, Worker, quiet, row, serve_until_closed
from benchmarks.service import FLEET, register
from benchmarks.workload import CHAIN, chains, pieces
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.events.log.group import GroupWriter
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.events.types import BlocksStored
from kvplane.projections.fleet import FleetState
from kvplane.services.embedded.server import embedded_server, free_port
from kvplane.services.process import hugepages
from kvplane.services.roles.router import Router

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

ADAPTER = "bench.adapter"
REACHED = "bench.reached"
NODES = 8
EVENT_BLOCKS = 64
BURST = 16
"""Events that an adapter hands over before it looks for more from its engines."""
WAITING = 8192
"""Most events that wait in a writer."""
TARGET = Limit(least=1)
_SECONDS = 60.0
T = TypeVar("T")


class Order(msgspec.Struct):
    """What an adapter is to append."""

    seed: int
    chains: int


class Done(msgspec.Struct):
    """When it began and ended (monotonic nanoseconds), the last sequence, and the commits that it took."""

    began: int
    ended: int
    sequence: int
    commits: int


class Reached(msgspec.Struct):
    """When a replica had applied a sequence (monotonic nanoseconds), and how many memberships it has."""

    time: int
    memberships: int


async def _ask(client: Client, to: str, question: object, form: type[T]) -> T:
    answer = await client.request(to, msgspec.msgpack.encode(question), timeout=_SECONDS)
    decoded: T = msgspec.msgpack.decode(answer.data, type=form)
    return decoded


async def measure(*, quick: bool) -> list[Row]:
    count, rounds = (1 << 18 if quick else 1 << 20) // CHAIN, 2 if quick else 3
    rates, appends, rebuilds, commits = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        async with (
            embedded_server(Path(folder), port=free_port()) as server,
            connected([server.url], "bench") as client,
        ):
            await open_stream(client.jetstream(), FLEET, create=True)
            with (
                Worker("throughput", arguments=["adapter", server.url]),
                Worker("throughput", arguments=["router", server.url]),
            ):
                for turn in range(rounds):
                    done = await _ask(client, ADAPTER, Order(turn, count), Done)
                    reached = await _ask(client, REACHED, done.sequence, Reached)
                    if reached.memberships != (turn + 1) * count * CHAIN:
                        raise RuntimeError(f"{reached.memberships} memberships of {(turn + 1) * count * CHAIN}")
                    rates.append(count * CHAIN / (reached.time - done.began) * 1e3)
                    appends.append(count * CHAIN / (done.ended - done.began) * 1e3)
                    commits += done.commits
            for _ in range(rounds):
                with Worker("throughput", arguments=["rebuild", server.url]) as worker:
                    if worker.hello["memberships"] != rounds * count * CHAIN:
                        raise RuntimeError(f"rebuilt {worker.hello['memberships']} memberships")
                    rebuilds.append(worker.hello["memberships"] / worker.hello["seconds"] / 1e6)
    size = rounds * count * CHAIN // commits
    return [
        row(
            "append until visible in a router", statistics.median(rates), "M/s", limit=TARGET,
            note=f"64-block events, {size} blocks a commit; on disk at {statistics.median(appends):.2f} M/s",
        ),
        row(
            "rebuild a fold from the log", statistics.median(rebuilds), "M/s", limit=TARGET,
            note=f"{rounds * count * CHAIN:,} blocks",
        ),
    ]  # fmt: skip


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark, in millions of blocks a second."""
    rows: list[Row] = anyio.run(lambda: measure(quick=quick), backend_options={"use_uvloop": True})
    return rows


async def adapter(url: str) -> None:
    """Worker: appends what requests name, for several nodes."""
    names = [f"n{node}" for node in range(NODES)]
    batches = [0] * NODES
    async with connected([url], "adapter") as client, anyio.create_task_group() as group:
        appender = Appender(client, FLEET, new_writer("bench"))
        epochs = await register(appender, names)
        writers = [GroupWriter(appender, subject(FLEET, "cache", name), limit=WAITING) for name in names]
        for writer in writers:
            group.start_soon(writer.run)

        async def append(order: Order) -> Done:
            events = []
            for position, chain in enumerate(chains(order.seed, order.chains)):
                node = position % NODES
                for piece, parent in pieces(chain, EVENT_BLOCKS):
                    batches[node] += 1
                    event = BlocksStored(names[node], epochs[node], batches[node], piece, parent)
                    events.append((writers[node], event))
            sequence = max(writer.last_sequence for writer in writers) or max(epochs)
            began = time.monotonic_ns()
            for number, (writer, event) in enumerate(events):
                await writer.send(event)
                if not number % BURST:
                    await anyio.lowlevel.checkpoint()
            for writer in writers:
                await writer.flush()
            ended = time.monotonic_ns()
            last = max(writer.last_sequence for writer in writers)
            return Done(began, ended, last, last - sequence)

        async def handle(message: Msg) -> None:
            order = msgspec.msgpack.decode(message.data, type=Order)
            await message.respond(msgspec.msgpack.encode(await append(order)))

        await client.subscribe(ADAPTER, cb=handle)
        await client.flush()
        await serve_until_closed({"ready": True})
        group.cancel_scope.cancel()


async def follow(url: str) -> None:
    """Worker: a router, which tells when it has applied a sequence."""
    async with connected([url], "router") as client, anyio.create_task_group() as group:
        router = Router(client, FLEET)
        await group.start(router.run)

        async def handle(message: Msg) -> None:
            await router.replica.reached(msgspec.msgpack.decode(message.data, type=int), seconds=_SECONDS)
            at = time.monotonic_ns()
            memberships = sum(index.block_copies for index in router.state.caches.by_model.values())
            await message.respond(msgspec.msgpack.encode(Reached(at, memberships)))

        await client.subscribe(REACHED, cb=handle)
        await client.flush()
        await serve_until_closed({"ready": True})
        group.cancel_scope.cancel()


async def rebuild(url: str) -> None:
    """Worker: folds the log once."""
    async with connected([url], "rebuild") as client:
        state = FleetState(FLEET)
        begin = time.perf_counter()
        await replay(client, FLEET, state.apply)
        seconds = time.perf_counter() - begin
        memberships = sum(index.block_copies for index in state.caches.by_model.values())
        await serve_until_closed({"seconds": seconds, "memberships": memberships})


def main() -> None:
    hugepages.from_the_start()  # as services do
    quiet()
    role, url = sys.argv[1:]
    anyio.run(
        {"adapter": adapter, "router": follow, "rebuild": rebuild}[role], url, backend_options={"use_uvloop": True}
    )


if __name__ == "__main__":
    main()
