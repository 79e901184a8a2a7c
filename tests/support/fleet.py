"""Services on a server, in the process of the tests, each with a connection of its own."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.replication.checkpoints import SCHEDULE
from kvplane.services.replication.replica import RECENT_SECONDS
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask
from kvplane.services.simulation.simnode import NodeConfig, run_nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    import msgspec
    from nats.aio.client import Client


T = TypeVar("T")


class Fleet:
    """Services on one server, in this process, each with a connection of its own."""

    def __init__(self, url: str, client: Client, group: anyio.abc.TaskGroup, stack: AsyncExitStack) -> None:
        self.url = url
        self.client = client
        self.name = "default"
        self.recent_seconds = RECENT_SECONDS
        """What replicas that start read from the log and not from a snapshot."""
        self.schedule = SCHEDULE
        """When replicas that start compare their digests."""
        self._group = group
        self._stack = stack

    async def connect(self, name: str) -> Client:
        return await self._stack.enter_async_context(connected([self.url], name))

    async def coordinator(self, **options: Any) -> Coordinator:
        options = {"recent_seconds": self.recent_seconds, "schedule": self.schedule, **options}
        service = Coordinator(await self.connect("coordinator"), self.name, **options)
        await self._group.start(service.run)
        return service

    async def router(self) -> Router:
        service = Router(
            await self.connect("router"), self.name, recent_seconds=self.recent_seconds, schedule=self.schedule
        )
        await self._group.start(service.run)
        return service

    async def nodes(self, *configs: NodeConfig) -> None:
        client = await self.connect("nodes")
        await self._group.start(run_nodes, client, self.name, list(configs))

    async def start(self, run: Callable[..., Coroutine[Any, Any, None]]) -> None:
        """Have another service run until the fleet ends; started when it says so."""
        await self._group.start(run)

    async def ask(self, endpoint: str, request: msgspec.Struct, form: type[T] | None = None) -> Any:
        return await ask(self.client, f"kv.{self.name}.{endpoint}", request, form)

    async def refused(self, endpoint: str, request: msgspec.Struct) -> str:
        with pytest.raises(ServiceFault) as caught:
            await self.ask(endpoint, request)
        return caught.value.code


@asynccontextmanager
async def fleet_on(url: str, client: Client) -> AsyncIterator[Fleet]:
    """Services on a server, stopped before their connections are."""
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        yield Fleet(url, client, group, stack)
        group.cancel_scope.cancel()
