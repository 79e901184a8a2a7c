"""Attached engines of real sockets, a router, and a client that completes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from kvplane.events import codec
from kvplane.events.types import RequestCompleted
from kvplane.services.dataplane.complete import Completer
from kvplane.services.engines.adapter import Adapter
from kvplane.services.engines.attachment import AdapterConfig
from kvplane.services.engines.facts import Engine
from kvplane.services.protocol import messages
from tests.support.fake_engine import FakeEngine
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nats.aio.msg import Msg

    from kvplane.services.dataplane.complete import Completion
    from kvplane.services.dataplane.openai import Body
    from kvplane.services.roles.router import Router
    from tests.support.fleet import Fleet


class Scene:
    """Attached engines, a router, and a client."""

    def __init__(self, fleet: Fleet, router: Router, completer: Completer, engines: dict[str, FakeEngine]) -> None:
        self.fleet, self.router, self.completer, self.engines = fleet, router, completer, engines
        self.completed: list[RequestCompleted] = []

    async def note(self, message: Msg) -> None:
        events = codec.decode_body("access", message.data)
        self.completed += [event for event in events if isinstance(event, RequestCompleted)]

    async def complete(self, **body: Any) -> Completion:
        return await self.send({"model": "m", **body})

    async def send(self, body: Body, **options: Any) -> Completion:
        """Complete, and wait until the router has applied all that came of it."""
        completion = await self.completer.complete(body, **options)
        await self.rest()
        return completion

    async def rest(self) -> None:
        def holds(name: str) -> set[int]:
            node = self.router.state.nodes[name]
            return (
                set(self.router.state.caches.index(node.model).held(node.slots["gpu"]))
                if "gpu" in node.slots
                else set()
            )

        await until(lambda: all(holds(name) == engine.cache.held() for name, engine in self.engines.items()))
        # What has ended is no load any more, but may not be on the log yet.
        await self.router.writers.flush()
        written = max(writer.last_sequence for writer in self.router.writers)
        await until(lambda: self.router.state.sequence >= written)
        await until(lambda: not self.router.state.load.running and not self.router.overlay.pending)


@asynccontextmanager
async def scene(fleet: Fleet, *names: str, **options: Any) -> AsyncIterator[Scene]:
    await fleet.coordinator()
    router = await fleet.router()
    # Whoever has the prefix gets the request, whatever else it has to do.
    await fleet.ask("coordinator.policy.set", messages.PolicyRequest(policy="cascade"))
    client = await fleet.connect("complete")
    async with (
        anyio.create_task_group() as tasks,
        Completer(client, fleet.name) as completer,
    ):
        engines = {}
        for name in names or ("a", "b"):
            engine = engines[name] = FakeEngine(**{"capacity": 400, **options})
            await engine.start(tasks)
            await tasks.start(_attached, fleet, engine, name)
        on = Scene(fleet, router, completer, engines)
        await fleet.client.subscribe(f"kv.{fleet.name}.access.>", cb=on.note)
        await fleet.client.flush()
        await until(lambda: len(router.state.nodes) == len(engines))
        yield on
        tasks.cancel_scope.cancel()


async def _attached(fleet: Fleet, engine: FakeEngine, name: str, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    kind: Any = engine.kind
    async with Engine(kind, engine.url) as http:
        facts = await http.facts()
        config = AdapterConfig(node=name, address=http.url, pulse_seconds=0.2)
        client = await fleet.connect("attach")
        await Adapter(client, fleet.name, http, facts, facts.sources[0], config).run(task_status=task_status)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]
