"""A gateway on a fleet, a client of it, and what the log says in the end."""

from __future__ import annotations

import json
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import openai

from kvplane.events import codec
from kvplane.events.errors import BadCommit
from kvplane.events.log.follow import replay
from kvplane.events.types import RequestCompleted, RequestRouted
from kvplane.services.gateway.guard import Guarded
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.scripted_engine import MODEL, ScriptedEngine, engines, whole
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from anyio.abc import SocketStream, TaskGroup

    from kvplane.events.codec import Message
    from tests.support.fleet import Fleet


OPEN = Guarded()
FAST = {"prefill_speed": 20_000.0, "decode_speed": 1e4, "http": "127.0.0.1"}
ANSWER = json.dumps(
    {
        "id": "x",
        "object": "text_completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "text": "hello", "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 1,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
).encode()
PROMPT = {"model": MODEL, "prompt": list(range(9))}
WORD = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'


async def recorded(fleet: Fleet) -> tuple[list[RequestRouted], list[RequestCompleted]]:
    """Decisions and completions that are on a fleet's log now."""
    found: list[Message] = []
    await replay(fleet.client, fleet.name, found.append)
    routed: list[RequestRouted] = []
    completed: list[RequestCompleted] = []
    for message in found:
        try:
            events = codec.decode(fleet.name, message).events
        except BadCommit:
            continue
        routed += [event for event in events if isinstance(event, RequestRouted)]
        completed += [event for event in events if isinstance(event, RequestCompleted)]
    return routed, completed


class Scene:
    """A gateway, and an HTTP client that knows where it is."""

    def __init__(self, fleet: Fleet, gateway: Gateway, http: httpx.AsyncClient) -> None:
        self.fleet = fleet
        self.gateway = gateway
        self.http = http

    @property
    def url(self) -> str:
        host, port = self.gateway.address
        return f"http://{host}:{port}"

    async def recorded(self) -> tuple[list[RequestRouted], list[RequestCompleted]]:
        """Decisions and completions on the log, when everything decided so far is there."""
        await self.gateway.router.writers.flush()
        return await recorded(self.fleet)

    async def idle(self) -> None:
        """Wait until nothing is on its way."""
        await until(lambda: self.gateway.server.open == 0)


@asynccontextmanager
async def gateway_on(fleet: Fleet, group: TaskGroup, ca: Path | None = None, **options: Any) -> AsyncIterator[Scene]:
    """A gateway in this process, at a free port; with `ca` it is spoken to over TLS."""
    gateway = Gateway(await fleet.connect("gateway"), fleet.name, bound("127.0.0.1", 0), **options)
    await group.start(gateway.run)
    host, port = gateway.address
    verify = True if ca is None else ssl.create_default_context(cafile=ca)
    scheme = "http" if ca is None else "https"
    async with httpx.AsyncClient(base_url=f"{scheme}://{host}:{port}", timeout=30, verify=verify) as http:
        yield Scene(fleet, gateway, http)


def made(**options: Any) -> Any:
    """A client whose many overloads no checker shall read."""
    return openai.AsyncOpenAI(**options)


async def answers(stream: SocketStream) -> None:
    await stream.send(whole(ANSWER))


@asynccontextmanager
async def on_engines(fleet: Fleet, *all_engines: ScriptedEngine, guarded: Guarded = OPEN) -> AsyncIterator[Scene]:
    await fleet.coordinator()
    async with engines(fleet, *all_engines), anyio.create_task_group() as group:
        async with gateway_on(fleet, group, guarded=guarded) as scene:
            yield scene
        group.cancel_scope.cancel()


@asynccontextmanager
async def on_simulated(fleet: Fleet, count: int = 2, **config: object) -> AsyncIterator[Scene]:
    await fleet.coordinator()
    await fleet.nodes(*(NodeConfig(name=f"sim-{at}", **{**FAST, **config}) for at in range(count)))  # type: ignore[arg-type]
    async with anyio.create_task_group() as group:
        async with gateway_on(fleet, group) as scene:
            yield scene
        group.cancel_scope.cancel()
