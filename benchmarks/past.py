"""A historian at work: what it costs the router, how far it lags behind, and how long questions about the past take.

Everything is a process of its own. The log of a million commits is written without fsync, for speed; what is measured reads.
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import msgspec

from benchmarks.common import Limit, Row, Worker, quiet, row
from benchmarks.decision import BLOCK_SIZE, requests
from benchmarks.service import FLEET, IN_FLIGHT, ROUTE, Asker, complete, fill, register
from benchmarks.workload import CHAIN
from kvplane.events import codec, types
from kvplane.events.codec import WRITER
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.group import GroupWriter
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.services.embedded.server import configuration, embedded_server, free_port, server_binary
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nats.aio.client import Client

RATIO = Limit(least_ratio=0.95)
LAG = Limit(most=1)
MOMENT = Limit(most=10)
EXPLAIN = Limit(most=2)
EVENTS_A_SECOND = 10_000
RATE = 200
"""Requests per second of eight busy nodes."""
READY_SECONDS = 300.0
BLOCKS = 16
_QUESTION_SECONDS = 120.0


@contextmanager
def historian(url: str, folder: Path) -> Iterator[None]:
    """A historian's process."""
    command = [sys.executable, "-m", "kvplane", "historian", "--history", str(folder), "--server", url]
    process = subprocess.Popen([*command, "--fleet", FLEET, "--log-level", "error"], start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


async def status(client: Client) -> dict[str, Any]:
    """What the historian says of itself; nothing stored while there is none."""
    try:
        found: dict[str, Any] = await ask(client, f"kv.{FLEET}.history.status", messages.StatusRequest(), seconds=5)
    except ServiceFault:
        return {"stored": 0}
    return found


async def at_rest(client: Client) -> float:
    """Seconds until the historian has stored what is on the log now."""
    begin = time.perf_counter()
    last = (await open_stream(client.jetstream(), FLEET)).last_seq
    with anyio.fail_after(READY_SECONDS):
        while (await status(client))["stored"] < last:
            await anyio.sleep(0.05)
    return time.perf_counter() - begin


async def beside_a_router(*, quick: bool) -> Row:
    """Requests a second of a router with a historian, and without."""
    count, rounds = (2000, 2) if quick else (6000, 6)
    bodies = [
        msgspec.msgpack.encode(messages.RouteRequest(model="m", hashes=packed, tokens_count=CHAIN * BLOCK_SIZE + 1))
        for packed in requests(23, count)
    ]
    rates: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            embedded_server(Path(folder) / "data", port=free_port()) as server,
            connected([server.url], "bench") as client,
        ):
            await fill(client)
            appender = Appender(client, FLEET, new_writer("bench"))
            asker = Asker(client)

            async def measure() -> float:
                rate = await asker.together(ROUTE, bodies)
                await complete(appender, asker.answers)
                asker.answers.clear()
                return rate

            with Worker("service", arguments=["router", server.url]):
                await measure()
                for _ in range(rounds):
                    rates[False].append(await measure())
                    with historian(server.url, Path(folder) / "history"):
                        await at_rest(client)
                        rates[True].append(await measure())
                        await at_rest(client)
    return row(
        f"history: router, {IN_FLIGHT} in flight, with a historian", statistics.median(rates[True]), "1/s", limit=RATIO,
        beside="without", other=statistics.median(rates[False]), note="server, router, historian and clients share two cores",
    )  # fmt: skip


async def lag(*, quick: bool) -> Row:
    """How old the newest commit is that is not stored yet, while events come."""
    seconds = 3.0 if quick else 10.0
    with tempfile.TemporaryDirectory() as folder:
        async with (
            embedded_server(Path(folder) / "data", port=free_port()) as server,
            connected([server.url], "bench") as client,
        ):
            await open_stream(client.jetstream(), FLEET, create=True)
            appender = Appender(client, FLEET, new_writer("bench"))
            await register(appender, ["n0"])
            with historian(server.url, Path(folder) / "history"):
                await at_rest(client)
                return await _lag(client, appender, seconds)


async def _lag(client: Client, appender: Appender, seconds: float) -> Row:
    draw = random.Random(3)
    writer = GroupWriter(appender, subject(FLEET, "access", appender.writer))
    written: list[tuple[float, int]] = []
    lags: list[float] = []
    over = anyio.Event()

    async def write() -> None:
        begin, number = time.perf_counter(), 0
        while (now := time.perf_counter() - begin) < seconds:
            while number < now * EVENTS_A_SECOND / 2:
                number += 1
                name = f"{number:x}"
                packed = draw.randbytes(BLOCKS * 8)
                writer.put(types.RequestRouted(name, "m", "n0", 0, BLOCKS, BLOCKS * 16 + 1, packed, policy="ttft"))
                writer.put(types.RequestCompleted(name, "n0", "ok", BLOCKS * 16 + 1, 0, 9, 0.1, 0.2))
            written.append((time.perf_counter(), writer.last_sequence))
            await anyio.sleep(0.005)
        await writer.flush()
        over.set()

    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        group.start_soon(write)
        while not over.is_set():
            stored = (await status(client))["stored"]
            now = time.perf_counter()
            waiting = [when for when, sequence in written if sequence > stored]
            lags.append(now - waiting[0] if waiting else 0.0)
            await anyio.sleep(0.05)
        rest = await at_rest(client)
        group.cancel_scope.cancel()
    return row(
        "history: worst lag", max(lags), "s", limit=LAG,
        note=f"{writer.acknowledged / seconds:,.0f} events/s for {seconds:g} s; none {rest:.2f} s after the last",
    )  # fmt: skip


@asynccontextmanager
async def unsafe_server(folder: Path) -> AsyncIterator[str]:
    """A server that does not force what it writes to the disk."""
    port = free_port()
    folder.mkdir()
    config = folder / "server.conf"
    text = configuration(folder, name="bench", host="127.0.0.1", port=port)
    config.write_text(text.replace("sync_interval: always", "sync_interval: 10m"))
    async with await anyio.open_process([server_binary(), "-c", str(config), "-l", str(folder / "log")]) as process:
        try:
            yield f"nats://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()


async def write_log(client: Client, commits: int, *, rate: int = 0) -> list[str]:
    """Commits of one event each: requests that are routed, computed and completed on eight nodes; the requests' ids.

    `rate` is in commits a second; 0 is as fast as can be.
    """
    draw = random.Random(4)
    first = (await open_stream(client.jetstream(), FLEET)).last_seq
    begin = time.perf_counter()
    nodes = [f"n{number}" for number in range(8)]
    epochs = await register(Appender(client, FLEET, new_writer("bench")), nodes)
    router = new_writer("router")
    access = subject(FLEET, "access", router)
    life = uuid4().hex[:8]
    for number in range(commits):
        at, step = divmod(number, 4)
        name = nodes[at % 8]
        hashes = random.Random(at % 20_000).randbytes(BLOCKS * 8)
        event: types.Event
        where, headers = access, {WRITER: router}
        if step == 0:
            session, applied = f"s{draw.randrange(5000)}", first + number + len(nodes)
            event = types.RequestRouted(
                f"{life}.{at:x}", "m", name, 0, BLOCKS, BLOCKS * 16 + 1, hashes, session, "ttft", applied,
                [types.Candidate(name, 0, 0.5)], 0, time.time_ns() // 1000,
            )  # fmt: skip
        elif step == 1:
            event = types.BlocksStored(name, epochs[at % 8], at, hashes)
            where, headers = subject(FLEET, "cache", name), {}
        elif step == 2:
            event = types.RequestCompleted(f"{life}.{at:x}", name, "ok", BLOCKS * 16 + 1, 0, 9, 0.1, 0.2)
        else:
            session = f"s{draw.randrange(5000)}"
            event, where, headers = types.SessionAssigned(session, "m", name, "new"), subject(FLEET, "session", "m"), {}
        await client.publish(where, codec.encode([event]), headers=headers or None)
        if number % 5000 == 0:
            await client.flush(timeout=60)
        if rate and number % 100 == 0:
            await client.flush(timeout=60)
            await anyio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
    await client.flush(timeout=60)
    with anyio.fail_after(READY_SECONDS):
        while (await open_stream(client.jetstream(), FLEET)).last_seq < first + commits + len(nodes):
            await anyio.sleep(0.1)
    return [f"{life}.{at:x}" for at in range(commits // 4)]


async def questions(*, quick: bool) -> list[Row]:
    """How long past states and explanations take."""
    commits, asked, seconds = (20_000, 3, 2) if quick else (1_000_000, 6, 20)
    with tempfile.TemporaryDirectory() as folder:
        async with unsafe_server(Path(folder) / "data") as url, connected([url], "bench") as client:
            await open_stream(client.jetstream(), FLEET, create=True)
            await write_log(client, commits)
            with historian(url, Path(folder) / "history"):
                took = await at_rest(client)
                draw = random.Random(8)
                states = []
                for _ in range(asked):
                    moment = messages.MomentRequest(at=str(draw.randrange(commits)))
                    states.append(await _timed(client, f"kv.{FLEET}.history.state", moment))
                # The million came in seconds. What is explained comes at the rate of a fleet, long enough after them.
                await anyio.sleep(2 if quick else 40)
                decided = await write_log(client, RATE * 4 * seconds, rate=RATE * 4)
                await at_rest(client)
                explained = [
                    await _timed(client, f"kv.{FLEET}.explain", messages.ExplainRequest(request=request))
                    for request in decided[len(decided) // 2 :: len(decided) // 2 // asked]
                ]
                snapshots = (await status(client))["snapshots"]
    return [
        row(
            f"history: state at a point of {commits / 1e6:g} M commits", max(states), "s", limit=MOMENT,
            note=f"median {statistics.median(states):.2f} s; {len(snapshots)} snapshots; "
            f"the history was made at {commits / took:,.0f} commits/s",
        ),
        row(
            "history: explain", statistics.median(explained), "s", limit=EXPLAIN,
            note=f"worst {max(explained):.2f} s, at {RATE:,} requests a second, behind {commits / 1e6:g} M commits",
        ),
    ]  # fmt: skip


async def _timed(client: Client, to: str, question: msgspec.Struct) -> float:
    begin = time.perf_counter()
    await ask(client, to, question, seconds=_QUESTION_SECONDS)
    return time.perf_counter() - begin


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark."""
    quiet()

    async def all_of_it() -> list[Row]:
        return [await beside_a_router(quick=quick), await lag(quick=quick), *await questions(quick=quick)]

    rows: list[Row] = anyio.run(all_of_it, backend_options={"use_uvloop": True})
    return rows
