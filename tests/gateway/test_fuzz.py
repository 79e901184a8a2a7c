"""The gateway's HTTP, and that beside every service: whatever comes is answered, and nothing of it is a defect."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

from kvplane.services.observability.web import observing
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.gateways import gateway_on
from tests.support.hostile import TEXTS, Hostile, Schema, bodies
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

ROUNDS = 25
"""Requests a path."""
SIDE_BY_SIDE = 8
DEFECTS = {"500", "501"}
_TEXT: Schema = {"type": "string"}
_MESSAGES: Schema = {"type": "array", "items": {"type": "object"}}
_SETTINGS: Schema = {
    "model": _TEXT, "stream": {"type": "boolean"}, "stream_options": {"type": "object"}, "user": _TEXT,
    "max_tokens": {"type": "integer"}, "metadata": {"type": "object"},
    "prompt_cache_key": _TEXT, "conversation": _TEXT, "cache_salt": _TEXT,
    "truncate_prompt_tokens": {"type": "integer"}, "truncation_side": _TEXT,
}  # fmt: skip
_PROMPT: Schema = {"anyOf": [_TEXT, {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1 << 32}}]}
KNOWN = {"model": "sim", "prompt": list(range(40)), "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
PATHS: dict[str, Schema] = {
    "/v1/chat/completions": {"messages": _MESSAGES},
    "/v1/completions": {"prompt": _PROMPT},
    "/v1/responses": {"input": _PROMPT},
    "/v1/messages": {"messages": _MESSAGES, "system": _PROMPT},
    "/v1/messages/count_tokens": {"messages": _MESSAGES},
    "/v1/embeddings": {"input": _PROMPT},
    "/tokenize": {"prompt": _PROMPT},
}
HEADERS = (
    "x-request-id",
    "x-request-timeout",
    "traceparent",
    "x-kvplane-explain",
    "authorization",
    "x-session-id",
    "accept",
)


def headers_of(rng: random.Random) -> dict[str, str]:
    """A few headers that are looked at, with what may be in one at all."""
    texts = [text for text in (*TEXTS, "1e999", "nan", "-1", "0", "1e-300") if text.isascii() and text.isprintable()]
    return {rng.choice(HEADERS): rng.choice(texts)[:4000].strip() for _ in range(rng.choice([0, 0, 1, 2]))}


async def ask_all(url: str, asked: Sequence[tuple[str, str, bytes, dict[str, str]]]) -> tuple[Counter[str], list[Any]]:
    """Ask everything, several at a time: statuses, and what was a defect."""
    waiting, found, defects = list(asked), Counter[str](), []
    async with httpx.AsyncClient(base_url=url, timeout=30) as http, anyio.create_task_group() as group:

        async def some() -> None:
            while waiting:
                method, path, body, headers = waiting.pop()
                answer = await http.request(method, path, content=body, headers=headers)
                found[f"{answer.status_code}"] += 1
                if str(answer.status_code) in DEFECTS:
                    defects.append((method, path, body[:200], headers, answer.text[:300]))

        for _ in range(SIDE_BY_SIDE):
            group.start_soon(some)
    return found, defects


async def test_no_request_is_a_defect_of_the_gateway(fleet: Fleet) -> None:
    await fleet.coordinator()
    fast: dict[str, Any] = {"prefill_speed": 1e12, "decode_speed": 1e12}
    await fleet.nodes(NodeConfig(name="a", http="127.0.0.1", **fast))
    hostile = Hostile(random.Random(7))
    asked = []
    for path, fields in PATHS.items():
        schema: Schema = {"type": "object", "properties": {**_SETTINGS, **fields}, "required": ["model", *fields]}
        for _ in range(ROUNDS):
            body = next(bodies(hostile.request(schema, KNOWN)))
            asked.append(("POST", path, body, headers_of(hostile.rng)))
    for _ in range(2 * ROUNDS):
        request = hostile.request("RouteRequest", {"model": "sim", "tokens": [1, 2], "session": "s"})
        asked += [("POST", "/route", body, headers_of(hostile.rng)) for body in bodies(request)]
    async with anyio.create_task_group() as group:
        async with gateway_on(fleet, group) as scene:
            found, defects = await ask_all(scene.url, asked)
            assert defects == []
            # Some went all the way to the engine and back.
            assert found["200"] > ROUNDS, found
            await scene.idle()
            answer = await scene.http.post("/v1/completions", content=json.dumps({**KNOWN, "prompt": [1, 2]}))
            assert answer.status_code == 200
            assert scene.gateway.readiness().reason == ""
        group.cancel_scope.cancel()


async def test_no_request_is_a_defect_of_the_port_for_health(fleet: Fleet) -> None:
    await fleet.coordinator()
    router, port, rng = await fleet.router(), free_port(), random.Random(7)
    paths = [
        "/metrics",
        "/healthz",
        "/readyz",
        "/",
        "/../x",
        "/metrics?name[]=" + "x" * 2000,
        "/metrics?name[]=%ff%00&name[]=",
    ]
    accepted = [
        "application/openmetrics-text; version=" + "9" * 500,
        "application/openmetrics-text;version=1.0.0",
        ";;,,=",
        "*/*",
    ]
    asked = []
    for path in paths:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
            headers = {
                **headers_of(rng),
                "accept": rng.choice(accepted),
                "accept-encoding": rng.choice(["gzip", ";", "x" * 999]),
            }
            asked.append((method, path, b"{" * 3000 if method == "POST" else b"", headers))
    async with observing(f"127.0.0.1:{port}", router):
        found, defects = await ask_all(f"http://127.0.0.1:{port}", asked)
    assert defects == []
    assert {"200", "404", "405"} <= found.keys() <= {"200", "404", "405"}
