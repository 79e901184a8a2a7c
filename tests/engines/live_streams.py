"""Streams of real vLLM engines that die at a random token: at temperature 0 the client's text is that without a death.

`make test-engine` runs it: three engines with equal weights behind relays. Over many seeds the connections of the one that
answers are cut, and in the end two engines are killed in one answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx

from kvplane.events.log.connection import connected
from kvplane.services.cli.common import run_async
from kvplane.services.embedded.server import start_server
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.roles.coordinator import Coordinator
from tests.engines.live import READY_SECONDS, Live, installed, make_adapters, model_folder, say
from tests.support.ports import free_port

SEEDS = int(os.environ.get("KVPLANE_SEEDS", "50"))
"""Answers that are broken off."""
LENGTH = 240
PLAIN = list(range(64, 90))
"""Letters: an answer of any bytes is mostly no text."""
KINDS = ("chat", "text", "ids", "LoRA")


class Told(NamedTuple):
    """What the client had."""

    text: str
    finish: list[str]
    usage: dict[str, Any]
    errors: list[str]
    roles: int
    ids: int


class Relay:
    """Stands between a gateway and an engine; `deaths` are shared by all: after so many events of a stream it is cut off."""

    def __init__(self, engine: int, deaths: list[int]) -> None:
        self._engine, self._deaths = engine, deaths
        self.port = self.cuts = 0

    async def listen(self) -> None:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            back, forth = await asyncio.open_connection("127.0.0.1", self._engine)
            try:
                await asyncio.gather(self._pass(reader, forth, cuts=False), self._pass(back, writer, cuts=True))
            finally:
                for each in (writer, forth):
                    each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cuts: bool) -> None:
        events = 0
        while data := await reader.read(1 << 16):
            count = data.count(b"data: {") if cuts else 0
            if count and self._deaths and events + count > self._deaths[0]:
                for _ in range(self._deaths.pop(0) - events):
                    writer.write(data[: data.index(b"data: {") + 7])
                    data = data[data.index(b"data: {") + 7 :]
                await writer.drain()
                self.cuts += 1
                break
            events += count
            writer.write(data)
            await writer.drain()
        # What was written arrives, and then the end.
        writer.close()
        raise ConnectionResetError


class Streams:
    """Three engines, and a client that asks twice: undisturbed, and with a kill."""

    def __init__(self, gateway: Gateway, engines: list[Live], coordinator: Coordinator) -> None:
        self.http = httpx.AsyncClient(base_url="http://{}:{}".format(*gateway.address), timeout=120)
        self.gateway, self.engines, self.coordinator = gateway, {each.name: each for each in engines}, coordinator
        self.relays: dict[str, Relay] = {}
        self.pending: list[int] = []
        self.really = False
        """Engines are killed; else only their connections are cut, which needs no engine to be started again."""
        self.random = random.Random(11)
        self.kills = self.rounds = 0
        self.wrong: list[str] = []

    @property
    def deaths(self) -> int:
        """How often an engine died in a stream."""
        return self.kills + sum(relay.cuts for relay in self.relays.values())

    async def until_up(self, count: int) -> None:
        """Wait until so many are there."""
        begin = time.monotonic()
        while sum(node.available for node in self.coordinator.state.nodes.values()) < count:
            if time.monotonic() - begin > READY_SECONDS:
                raise SystemExit("the engines are not nodes in time")
            await anyio.sleep(0.3)

    def body(self, kind: str) -> tuple[str, dict[str, Any]]:
        """A request of a kind, about something new."""
        drawn = [self.random.choice(PLAIN) for _ in range(40)]
        body: dict[str, Any] = {
            "model": "adapter-x" if kind == "LoRA" else "tiny", "temperature": 0, "max_tokens": LENGTH, "ignore_eos": True,
            "allowed_token_ids": PLAIN, "stream": True, "stream_options": {"include_usage": True},
            # Penalises what was said, in the prompt as well: without it a model of random weights repeats itself.
            "repetition_penalty": 1.3,
        }  # fmt: skip
        words = "".join(chr(33 + token) for token in drawn)
        if kind == "chat":
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": words}]}
        return "/v1/completions", {**body, "prompt": words if kind == "text" else drawn}

    async def ask(self, path: str, body: dict[str, Any], kills: list[int]) -> Told:
        """Read a stream, killing the engine that makes it after so many chunks, each counted from the kill before."""
        text, roles, seen = "", 0, 0
        finish: list[str] = []
        errors: list[str] = []
        usage: dict[str, Any] = {}
        ids: set[str] = set()
        request = f"r{self.random.randrange(1 << 60):x}"
        async with self.http.stream("POST", path, json=body, headers={"x-request-id": request}) as answer:
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                errors += [str(chunk["error"])] if "error" in chunk else []
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    delta = choice.get("delta") or {}
                    ids.add(chunk["id"])
                    roles += "role" in delta
                    text += delta.get("content") or choice.get("text") or ""
                    finish += [choice["finish_reason"]] if choice.get("finish_reason") else []
                seen += 1
                if self.really and kills and seen >= kills[0]:
                    seen, kills = 0, kills[1:]
                    self.kill(request)
        return Told(text, finish, usage, errors, roles, len(ids))

    def kill(self, request: str) -> None:
        """End the engine's part in the last leg of a request, if it is still at it."""
        legs = {
            name: leg for name, leg in self.gateway.router.state.load.running.items() if name.split(".")[0] == request
        }
        if not legs:
            return
        node = legs[max(legs)].node
        self.kills += 1
        self.engines[node].kill_engine()

    async def round(self, kind: str, kills: int) -> None:
        """One answer, undisturbed and then broken off."""
        path, body = self.body(kind)
        whole = await self.ask(path, body, [])
        if len(whole.text) < LENGTH or whole.errors:
            raise SystemExit(f"an undisturbed answer is {whole}")
        before = self.deaths
        drawn = [self.random.randrange(1, LENGTH // kills) for _ in range(kills)]
        self.pending[:] = [] if self.really else drawn
        told = await self.ask(path, body, drawn)
        self.rounds += 1
        counted = [told.usage.get(name) == whole.usage[name] for name in ("prompt_tokens", "completion_tokens")]
        same = told._replace(usage={}) == whole._replace(usage={}) and all(counted)
        say(f"{kind:6} {self.deaths - before} of {kills} kills: {'same' if same else 'DIFFERENT'}")
        if not same:
            self.wrong.append(f"{kind}: {told} instead of {whole}")


async def live() -> None:
    python = installed()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_adapters(python, folder)
        server = await start_server(folder / "data", port=free_port())
        stack.push_async_callback(server.stop)
        first = await stack.enter_async_context(connected([server.url], "one"))
        second = await stack.enter_async_context(connected([server.url], "two"))
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        coordinator = Coordinator(first, "default")
        await group.start(coordinator.run)
        gateway = Gateway(second, "default", bound("127.0.0.1", 0))
        await group.start(gateway.run)
        # Of rounded weights the order of additions decides, and that differs between a prompt and an answer.
        engines = [Live(name, python, server.url, folder, arguments="--dtype float32 --seed 0") for name in "abc"]
        for each in engines:
            stack.callback(each.kill_engine)
            stack.callback(each.kill_adapter)
            each.start_engine()
        streams = Streams(gateway, engines, coordinator)
        for each in engines:
            relay = streams.relays[each.name] = Relay(each.http, streams.pending)
            await relay.listen()
            each.address = f"http://127.0.0.1:{relay.port}"
            each.start_adapter()
        await streams.until_up(len(engines))
        for seed in range(SEEDS):
            await streams.round(KINDS[seed % len(KINDS)], 2 if seed % 3 == 2 else 1)
        streams.really = True
        await streams.round("chat", 2)
        await streams.http.aclose()
        legs = gateway.measured.legs
    say(f"{streams.rounds} streams, {streams.deaths} deaths in them, legs: {legs}")
    if streams.wrong:
        raise SystemExit(f"{len(streams.wrong)} of {streams.rounds} differ: " + "; ".join(streams.wrong))
    if streams.deaths < streams.rounds:
        raise SystemExit("too few engines were killed in the middle of a stream")


if __name__ == "__main__":
    if not model_folder().exists():
        raise SystemExit("no model: give KVPLANE_TINY_MODEL the folder of a small one that fits blocks of 32 tokens")
    run_async(live)
