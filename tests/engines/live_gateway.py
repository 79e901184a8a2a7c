"""The gateway in front of real engines: chats with tools and reasoning, LoRAs, salts, several choices, clients that leave."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import httpx

from kvplane.events import codec
from kvplane.events.types import RequestCompleted

if TYPE_CHECKING:
    from kvplane.services.gateway.service import Gateway

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{% if m['reasoning'] %}[{{ m['reasoning'] }}]{% endif %}{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template that shows all that a request may hold."""
TOOLS = [{"type": "function", "function": {"name": "at", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"id": "c1", "type": "function", "function": {"name": "at", "arguments": "{}"}}]
SETTLE_SECONDS = 0.3
LEAVES_SECONDS = 1.0
"""How long an engine may take to count a request no more whose client has left: it looks once a step."""


class Row(NamedTuple):
    """One phase."""

    phase: str
    requests: int
    exact: int


class Through:
    """Requests through one gateway, and what was predicted of each against what was delivered."""

    def __init__(self, gateway: Gateway, engines: dict[str, str]) -> None:
        self.http = httpx.AsyncClient(base_url="http://{}:{}".format(*gateway.address), timeout=60)
        self.engines = engines
        """URLs by node."""
        self.completed: dict[str, RequestCompleted] = {}
        self.rows: list[Row] = []
        self.wrong: list[str] = []

    async def note_completed(self, message: Any) -> None:
        for event in codec.decode_body("access", message.data):
            if isinstance(event, RequestCompleted):
                self.completed[event.request] = event

    async def ask(self, path: str, **body: Any) -> tuple[dict[str, Any], bool]:
        """An answer, and whether as many tokens were cached as the gateway had said."""
        whole = {"model": "tiny", "max_tokens": 8, "temperature": 0, **body}
        answer = await self.http.post(path, json=whole)
        if answer.status_code != 200:
            raise SystemExit(f"{path} answers {answer.status_code}: {answer.text[:500]}")
        await anyio.sleep(SETTLE_SECONDS)
        found = answer.json()
        predicted, tokens = map(int, answer.headers["x-kvplane-match"].split("/"))
        cached, prompt = found["usage"]["prompt_tokens_details"]["cached_tokens"], found["usage"]["prompt_tokens"]
        if tokens != prompt:
            self.wrong.append(f"{path}: {tokens} tokens by the gateway, {prompt} by the engine")
        return found, predicted == cached

    async def phase(self, name: str, path: str, bodies: list[dict[str, Any]]) -> None:
        """Requests one after the other."""
        exact = [(await self.ask(path, **body))[1] for body in bodies]
        self.rows.append(Row(name, len(exact), sum(exact)))

    async def run(self) -> None:
        """All of it."""
        chat, completions = "/v1/chat/completions", "/v1/completions"
        for turns in range(3):
            told = [{"role": "user", "content": f"Where is the ship {turns}? " * 3}]
            plain: list[dict[str, Any]] = list(told)
            tooled: list[dict[str, Any]] = list(told)
            for turn in range(3):
                await self.phase("chat", chat, [{"messages": plain}])
                await self.phase("chat with tools", chat, [{"messages": tooled, "tools": TOOLS}])
                plain += [{"role": "assistant", "content": f"At {turn}."}, {"role": "user", "content": "And now?"}]
                tooled += [
                    {"role": "assistant", "content": None, "tool_calls": CALL, "reasoning_content": f"I look {turn}."},
                    {"role": "tool", "tool_call_id": "c1", "content": f"north {turn}"},
                ]
        prompts = [[(at * 7 + seed) % 256 for at in range(150)] for seed in range(3)]
        for model in ("adapter-x", "adapter-y"):
            await self.phase(
                f"LoRA {model}", completions, [{"model": model, "prompt": prompt} for prompt in prompts * 2]
            )
        for salt in ("one", "two"):
            await self.phase(f"salt {salt}", completions, [{"prompt": prompts[0], "cache_salt": salt}] * 2)
        # Of a new prompt the second choice finds what the first computes, and the engine counts that as cached.
        bodies: list[dict[str, Any]] = [
            {"prompt": prompts[1][:100], "n": count, "temperature": 1} for count in (1, 2, 2, 2)
        ]
        await self.phase("n=2", completions, bodies)
        await self.leaves()
        await self.http.aclose()

    async def leaves(self) -> None:
        """A client that leaves in the middle of a stream: its engine runs the request no more."""
        body = {"model": "tiny", "prompt": [5] * 40, "max_tokens": 900, "ignore_eos": True, "stream": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            node, request = answer.headers["x-kvplane-node"], answer.headers["x-request-id"]
            # Kept by its name: what is dropped after a first piece closes the connection at a time of its own.
            pieces = answer.aiter_bytes()
            await anext(pieces)
            # An engine counts a step's requests when its first answers are on their way already.
            begin = time.monotonic()
            while not await self._running(node):
                if time.monotonic() - begin > LEAVES_SECONDS:
                    raise SystemExit("the engine does not run the request whose stream has begun")
        begin = time.monotonic()
        while await self._running(node):
            if time.monotonic() - begin > LEAVES_SECONDS:
                raise SystemExit(f"the engine still runs a request whose client left {LEAVES_SECONDS:g} s ago")
        self.left = time.monotonic() - begin
        await anyio.sleep(SETTLE_SECONDS)
        if self.completed[request].status != "cancelled":
            raise SystemExit(f"the log says that the request whose client left is {self.completed[request].status!r}")

    async def _running(self, node: str) -> int:
        text = (await self.http.get(f"{self.engines[node]}/metrics")).text
        return int(
            sum(float(count) for count in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE))
        )
