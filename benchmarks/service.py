"""The router as a service, beside an echo: how much a durable, explained decision adds to a bare request-reply.

A real server with fsynced storage, the router and the echo in processes of their own, the client here; both get the same
bytes, in turn. Every decision is committed behind its reply; the benchmark fails unless all of them were.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec
from nats.micro import add_service

from benchmarks.common import Limit, Row, Worker, quiet, row, serve_until_closed
from benchmarks.decision import BLOCK_SIZE, holdings, requests
from benchmarks.workload import CHAIN, NODES
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.events.types import BlocksStored, NodeRegistered, RequestCompleted
from kvplane.services.embedded.server import embedded_server, free_port
from kvplane.services.protocol import messages
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.micro.request import Request

FLEET = "bench"
ECHO = "bench.echo"
ROUTE = f"kv.{FLEET}.route"
IN_FLIGHT = 64
LATENCY = Limit(most_ratio=2)
TAIL = Limit(most_ratio=5)
RATE = Limit(least_ratio=0.25)
COMMIT_EVENTS = 4096


async def register(appender: Appender, names: Sequence[str]) -> list[int]:
    """Register nodes on the log; their epochs."""
    epochs = []
    for name in names:
        event = NodeRegistered(
            node=name, address=f"kv.{FLEET}.serve.{name}", models=["m"], block_size=BLOCK_SIZE,
            capacity_blocks={"gpu": 1 << 20},
        )  # fmt: skip
        epochs.append(await appender.append(subject(FLEET, "node", name), [event]))
    return epochs


async def fill(client: Client) -> None:
    """A log with 64 nodes that hold the chains of `benchmarks.decision`."""
    await open_stream(client.jetstream(), FLEET, create=True)
    appender = Appender(client, FLEET, new_writer("bench"))
    names = [f"n{node}" for node in range(NODES)]
    epochs = await register(appender, names)
    stored: dict[int, list[BlocksStored]] = defaultdict(list)
    for node, packed in holdings(NODES):
        stored[node].append(BlocksStored(names[node], epochs[node], len(stored[node]) + 1, packed))
    for node, events in stored.items():
        await appender.append(subject(FLEET, "cache", names[node]), events)


class Asker:
    """Sends requests and keeps the answers for later."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.answers: list[Msg] = []

    async def one_by_one(self, to: str, bodies: Sequence[bytes]) -> list[float]:
        """Microseconds of each request."""
        clock, times = time.perf_counter_ns, []
        for body in bodies:
            begin = clock()
            answer = await self._client.request(to, body, timeout=5)
            times.append((clock() - begin) / 1e3)
            self.answers.append(answer)
        return times

    async def together(self, to: str, bodies: Sequence[bytes]) -> float:
        """Requests a second with many in flight."""
        waiting = iter(bodies)

        async def work() -> None:
            for body in waiting:
                self.answers.append(await self._client.request(to, body, timeout=5))

        begin = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(IN_FLIGHT):
                group.start_soon(work)
        return len(bodies) / (time.perf_counter() - begin)


async def complete(appender: Appender, answers: Sequence[Msg]) -> int:
    """Check the answers, and put on the log that the requests are over, so that load does not pile up."""
    over = []
    for message in answers:
        if message.headers:
            raise RuntimeError(f"the router refused: {message.headers}")
        answer = msgspec.msgpack.decode(message.data, type=messages.RouteAnswer)
        if answer.degraded:
            raise RuntimeError("the router could not record a decision")
        over.append(RequestCompleted(request=answer.request, node=answer.node))
    for at in range(0, len(over), COMMIT_EVENTS):
        await appender.append(subject(FLEET, "access", appender.writer), over[at : at + COMMIT_EVENTS])
    return len(over)


async def measure(*, quick: bool) -> list[Row]:
    times: dict[str, list[list[float]]] = {ECHO: [], ROUTE: []}
    rates: dict[str, list[float]] = {ECHO: [], ROUTE: []}
    sequential, parallel, rounds = (500, 2000, 2) if quick else (1500, 6000, 5)
    bodies = [
        msgspec.msgpack.encode(messages.RouteRequest(model="m", hashes=packed, tokens_count=CHAIN * BLOCK_SIZE + 1))
        for packed in requests(23, parallel)
    ]
    with tempfile.TemporaryDirectory() as folder:
        async with (
            embedded_server(Path(folder), port=free_port()) as server,
            connected([server.url], "bench") as client,
        ):
            await fill(client)
            with (
                Worker("service", arguments=["echo", server.url]),
                Worker("service", arguments=["router", server.url]) as router,
            ):
                asker = Asker(client)
                appender = Appender(client, FLEET, new_writer("bench"))
                flush = f"kv.{FLEET}.router.{router.hello['writer']}.flush"
                routed = 0
                for turn in range(rounds + 1):
                    for to in (ECHO, ROUTE):
                        # The first turn warms up and isn't counted.
                        taken = await asker.one_by_one(to, bodies[:sequential])
                        rate = await asker.together(to, bodies)
                        if turn:
                            times[to].append(taken)
                            rates[to].append(rate)
                        if to == ROUTE:
                            routed += await complete(appender, asker.answers)
                            status = await ask(client, flush, messages.StatusRequest(), dict[str, object])
                            if status["recorded"] != routed or status["unrecorded"]:
                                raise RuntimeError(f"{routed} decisions, but the router says {status}")
                        asker.answers.clear()
    return _rows(times, rates, routed)


def _rows(times: dict[str, list[list[float]]], rates: dict[str, list[float]], routed: int) -> list[Row]:
    medians = {to: statistics.median(map(statistics.median, taken)) for to, taken in times.items()}
    tails = {
        to: statistics.quantiles([one for part in taken for one in part], n=100)[98] for to, taken in times.items()
    }
    title = "route 256 blocks, 64 nodes"
    return [
        row(
            f"{title}, median", medians[ROUTE], "us", limit=LATENCY, beside="echo", other=medians[ECHO],
            note=f"all {routed:,} decisions on disk",
        ),
        row(
            f"{title}, p99", tails[ROUTE], "us", limit=TAIL, beside="its median", other=medians[ROUTE],
            note=f"p99 of the echo: {tails[ECHO]:.0f} us",
        ),
        row(
            f"{title}, {IN_FLIGHT} in flight", statistics.median(rates[ROUTE]), "1/s", limit=RATE, beside="echo",
            other=statistics.median(rates[ECHO]),
        ),
    ]  # fmt: skip


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    rows: list[Row] = anyio.run(lambda: measure(quick=quick), backend_options={"use_uvloop": True})
    return rows


async def echo(url: str) -> None:
    """Worker: answers with what it was sent."""

    async def handle(request: Request) -> None:
        await request.respond(request.data)

    async with connected([url], "echo") as client:
        service = await add_service(client, name="echo", version="1.0.0")
        await service.add_endpoint(name="echo", subject=ECHO, handler=handle)
        await client.flush()
        await serve_until_closed({"ready": True})


async def route(url: str) -> None:
    """Worker: a router."""
    async with connected([url], "router") as client, anyio.create_task_group() as group:
        router = Router(client, FLEET)
        await group.start(router.run)
        await client.flush()
        await serve_until_closed({"writer": router.writer})
        group.cancel_scope.cancel()


def main() -> None:
    quiet()
    role, url = sys.argv[1:]
    anyio.run({"echo": echo, "router": route}[role], url, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
