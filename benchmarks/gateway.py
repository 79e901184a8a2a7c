"""The gateway beside a bare forward: what tokens, a decision, its record and usage add to passing bytes on.

Engine, gateway and bare forward are processes of their own; the gateway and the forward share a core, the engine and the
clients have the other. CPU time of the process that forwards is what counts, since machines are noisy.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import anyio

from benchmarks.common import Limit, Row, Worker, pin, quiet, row, serve_until_closed
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.events.types import NodeRegistered
from kvplane.services.embedded.server import embedded_server, free_port
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.http.pool import Pool, origin
from kvplane.services.http.server import Exchange, Server
from kvplane.services.process.descriptors import raise_limit, spared

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient

FLEET = "bench"
NODES = 8
IN_FLIGHT = 64
CHUNKS = 200
OPEN = 10_000
ONE = Limit(most=0.15)
STREAM = Limit(most=3)
ADDED = Limit(most=300)
HELD = Limit(most=50)
BODY = json.dumps({"model": "m", "prompt": list(range(1000, 1256)), "max_tokens": 16}).encode()
STREAMED = json.dumps({"model": "m", "prompt": list(range(1000, 1256)), "stream": True}).encode()
ANSWER = json.dumps({
    "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "text": "hello " * 16, "finish_reason": "stop", "logprobs": None}],
    "usage": {
        "prompt_tokens": 256, "completion_tokens": 16, "total_tokens": 272, "prompt_tokens_details": {"cached_tokens": 240},
    },
}).encode()  # fmt: skip
CHUNK = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
EVENT = (
    b"data: %b\n\n" % json.dumps({**CHUNK, "choices": [{"index": 0, "text": " hello", "finish_reason": None}]}).encode()
)
USAGE = {"prompt_tokens": 256, "completion_tokens": 200, "prompt_tokens_details": {"cached_tokens": 240}}
LAST = b"data: %b\n\n" % json.dumps({**CHUNK, "choices": [], "usage": USAGE}).encode()
GAP_SECONDS = 0.01
_STREAMS = re.compile(rb'"stream":\s*true').search
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream")]


def posted(body: bytes, path: str = "/v1/completions") -> bytes:
    """A request as it travels."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client(asyncio.Protocol):
    """One connection, with one request at a time. An answer ends where `end` is found."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._done: asyncio.Future[bytes] | None = None
        self._end = b""
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """For the loop."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """For the loop."""
        self._data += data
        if self._done is not None and not self._done.done() and self._data.endswith(self._end):
            self._done.set_result(bytes(self._data))

    def connection_lost(self, _: Exception | None) -> None:
        """For the loop."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(f"closed after {bytes(self._data[-200:])!r}"))

    async def send(self, request: bytes, end: bytes) -> bytes:
        """The answer to a request."""
        self._data.clear()
        self._end = end
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        answer = await self._done
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the answer is {answer[:500]!r}")
        return answer

    def close(self) -> None:
        """Leave."""
        self._transport.abort()


async def client(port: int) -> Client:
    """A connection to a port of this machine."""
    _, made = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return made


async def many(port: int, request: bytes, end: bytes, count: int) -> None:
    """Send so many, `IN_FLIGHT` at once."""
    left = iter(range(count))

    async def work() -> None:
        one = await client(port)
        for _ in left:
            await one.send(request, end)
        one.close()

    async with anyio.create_task_group() as group:
        for _ in range(IN_FLIGHT):
            group.start_soon(work)


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def mock_engine(exchange: Exchange) -> None:
    """An answer of a few bytes, or a stream."""
    if not _STREAMS(exchange.request.body):
        exchange.send(200, _JSON, ANSWER)
        return
    exchange.begin(200, _EVENTS)
    hold = exchange.request.header(b"x-hold") != b""
    for number in range(CHUNKS):
        exchange.write(EVENT)
        await anyio.sleep(3600 if hold and number == 1 else GAP_SECONDS)
    exchange.write(LAST)
    exchange.write(b"data: [DONE]\n\n")
    exchange.end()


def _refusal(_: Exception) -> bytes:
    return b"{}"


async def _serve_engine() -> None:
    pin(1)
    async with Server(mock_engine, _refusal).listening(bound("127.0.0.1", 0)) as (_, port):
        await serve_until_closed({"port": port, "pid": os.getpid()})


async def _serve_forward(upstream: int) -> None:
    """Passes bytes on and nothing else."""
    pin(0)
    pool = Pool()
    where = origin(f"http://127.0.0.1:{upstream}")

    async def handle(exchange: Exchange) -> None:
        body = exchange.request.body
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (exchange.request.target, len(body))
        call = await pool.send(where, head, body, patience=60)
        headers = [pair for pair in call.headers if pair[0] not in {b"content-length", b"transfer-encoding"}]
        if any(name == b"content-length" for name, _ in call.headers):
            exchange.send(call.status, headers, await call.read(1 << 20))
        else:
            exchange.begin(call.status, headers)
            call.relay(exchange.write)
            await call.done()
            exchange.end()
        call.release()

    async with Server(handle, _refusal).listening(bound("127.0.0.1", 0)) as (_, port):
        await serve_until_closed({"port": port, "pid": os.getpid()})


async def _serve_gateway(url: str) -> None:
    pin(0)
    async with connected([url], "gateway") as nats, anyio.create_task_group() as group:
        gateway = Gateway(nats, FLEET, bound("127.0.0.1", 0))
        await group.start(gateway.run)
        await serve_until_closed({"port": gateway.address[1], "pid": os.getpid()})
        group.cancel_scope.cancel()


async def latencies(port: int, count: int) -> list[float]:
    """Microseconds of requests one by one."""
    one = await client(port)
    request, times = posted(BODY), []
    for _ in range(count):
        begin = time.perf_counter_ns()
        await one.send(request, ANSWER)
        times.append((time.perf_counter_ns() - begin) / 1e3)
    one.close()
    return times


async def held(port: int, pid: int, count: int) -> float:
    """Kilobytes of a process an open stream."""
    before = _resident(pid)
    request = posted(STREAMED).replace(b"host: bench\r\n", b"host: bench\r\nx-hold: 1\r\n")
    opened = []
    loop = asyncio.get_running_loop()
    async with anyio.create_task_group() as group:
        for at in range(count):
            one = await client(port)
            opened.append(one)
            group.start_soon(one.send, request, EVENT + b"\r\n")
            if at % 50 == 0:
                await asyncio.sleep(0.02)
        begin = loop.time()
        while any(not one._data for one in opened) and loop.time() - begin < 60:
            await anyio.sleep(0.2)
        missing = sum(not one._data for one in opened)
        grown = _resident(pid) - before
        group.cancel_scope.cancel()
    for one in opened:
        one.close()
    if missing:
        raise RuntimeError(f"{missing} of {count} streams did not begin")
    return grown / count / 1024


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def measure(*, quick: bool) -> list[Row]:
    """The rows."""
    requests, streams, rounds, sequential, opened = (1500, 64, 2, 200, 500) if quick else (6000, 256, 4, 1000, OPEN)
    # As many as fit into this process's descriptors: the gateway counts three for each.
    opened = spared(opened, 3)
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with embedded_server(Path(folder), port=free_port()) as server, connected([server.url], "bench") as nats:
            with Worker("gateway", arguments=["engine"]) as engine:
                await _fill(nats, engine.hello["port"])
                with (
                    Worker("gateway", arguments=["forward", str(engine.hello["port"])]) as forward,
                    Worker("gateway", arguments=["gateway", server.url]) as gateway,
                ):
                    pin(1)
                    everyone = {"forward": forward.hello, "gateway": gateway.hello}
                    for turn in range(rounds + 1):
                        for name, hello in everyone.items():
                            kept = figures.setdefault(name, {"one": [], "stream": [], "latency": []})
                            kept["one"].append(await _cpu_of(hello, posted(BODY), ANSWER, requests))
                            kept["stream"].append(await _cpu_of(hello, posted(STREAMED), b"0\r\n\r\n", streams))
                            kept["latency"].append(statistics.median(await latencies(hello["port"], sequential)))
                        if not turn:
                            # The first turn warms up and isn't counted.
                            figures = {}
                    direct = statistics.median(await latencies(engine.hello["port"], sequential))
                    memory = await held(gateway.hello["port"], gateway.hello["pid"], opened)
    middle = {
        name: {what: statistics.median(values) for what, values in kept.items()} for name, kept in figures.items()
    }
    bare, full = middle["forward"], middle["gateway"]
    return [
        row("gateway: CPU of a request, 64 in flight", full["one"], "ms", limit=ONE, beside="bare forward", other=bare["one"],
            note="256 token ids, decided and recorded"),
        row(f"gateway: CPU of a stream of {CHUNKS} chunks", full["stream"], "ms", limit=STREAM, beside="bare forward",
            other=bare["stream"]),
        row("gateway: added to a direct call, one in flight", full["latency"] - direct, "us", limit=ADDED,
            beside="bare forward", other=bare["latency"] - direct, note=f"direct: {direct:.0f} us"),
        row(f"gateway: memory of an open stream, {opened:,} open", memory, "KB", limit=HELD),
    ]  # fmt: skip


async def _cpu_of(hello: dict[str, int], request: bytes, end: bytes, count: int) -> float:
    before = cpu(hello["pid"])
    await many(hello["port"], request, end, count)
    return (cpu(hello["pid"]) - before) / count * 1000


async def _fill(nats: NatsClient, port: int) -> None:
    await open_stream(nats.jetstream(), FLEET, create=True)
    appender = Appender(nats, FLEET, new_writer("bench"))
    for name in [f"n{at}" for at in range(NODES)]:
        event = NodeRegistered(
            node=name, address=f"http://127.0.0.1:{port}", models=["m"], block_size=16, capacity_blocks={"gpu": 1 << 16}
        )
        await appender.append(subject(FLEET, "node", name), [event])


def run(*, quick: bool) -> list[Row]:
    """Run it."""
    raise_limit()
    return anyio.run(lambda: measure(quick=quick), backend_options={"use_uvloop": True})


if __name__ == "__main__":
    quiet()
    match sys.argv[1:]:
        case ["engine"]:
            anyio.run(_serve_engine, backend_options={"use_uvloop": True})
        case ["forward", upstream]:
            anyio.run(_serve_forward, int(upstream), backend_options={"use_uvloop": True})
        case ["gateway", url]:
            anyio.run(_serve_gateway, url, backend_options={"use_uvloop": True})
