"""A server that asks for credentials, services on it, and strangers who try what they may not.

`Stranger` is a bare client logged in as some role; `refused_*` try one thing and demand the server's refusal of it.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from nats.aio.client import Client as Nats

from kvplane.events.log.connection import connected
from kvplane.events.log.credentials import read_seed, trust
from kvplane.services.auth.folder import FIRST, AuthFolder
from kvplane.services.embedded.server import Server, start_server
from kvplane.services.history.historian import Historian
from kvplane.services.replication.checkpoints import SCHEDULE
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.simulation.simnode import NodeConfig, run_nodes
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.services.auth.roles import Role

NAME = "f"
OTHER = "g"
NODES = ("node-a", "node-b")


class Tried:
    """How many forbidden things were tried, and how many of them the server refused."""

    def __init__(self) -> None:
        self.publications = 0
        self.subscriptions = 0
        self.withstood = 0
        """Not refused by the server, and without effect."""

    @property
    def refused(self) -> int:
        return self.publications + self.subscriptions

    def __str__(self) -> str:
        return (
            f"{self.refused + self.withstood} forbidden things tried: {self.publications} publications and "
            f"{self.subscriptions} subscriptions refused by the server, {self.withstood} without effect"
        )


TRIED = Tried()


def folder_of(path: Path) -> AuthFolder:
    """Credentials of two fleets, one of them with nodes."""
    held = AuthFolder(path)
    held.set_servers([])
    for fleet in (NAME, OTHER):
        for role in FIRST:
            held.add(fleet, role)
    for node in NODES:
        held.add(NAME, "node", node)
    held.save()
    return held


class Stranger:
    """A client with some role's credentials and the worst intentions."""

    def __init__(self, client: Client, label: str, key: str) -> None:
        self.client = client
        self.label = label
        self.key = key
        self.errors: list[str] = []

    async def error(self, error: Exception) -> None:
        self.errors.append(str(error))

    async def settle(self) -> None:
        """Wait for the server's word on all that was sent. The client's first ping may overtake what it sent before."""
        await self.client.flush()
        await self.client.flush()

    async def refused_publish(self, *subjects: str, body: bytes = b"[]", reply: str = "", **headers: str) -> None:
        for subject in subjects:
            self.errors.clear()
            await self.client.publish(subject, body, reply=reply, headers=headers or None)
            await self.settle()
            refusal = f'permissions violation for publish to "{subject.lower()}"'
            assert any(refusal in error.lower() for error in self.errors), f"{self.label} may publish to {subject}"
            TRIED.publications += 1

    async def refused_subscribe(self, *subjects: str, queue: str = "") -> None:
        for subject in subjects:
            self.errors.clear()
            subscription = await self.client.subscribe(subject, queue=queue)
            await self.settle()
            refusal = f'permissions violation for subscription to "{subject.lower()}"'
            assert any(refusal in error.lower() for error in self.errors), f"{self.label} may subscribe to {subject}"
            TRIED.subscriptions += 1
            await subscription.unsubscribe()

    async def sent(self, subject: str, body: bytes, *, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Publish what the server does not refuse."""
        self.errors.clear()
        await self.client.publish(subject, body, reply=reply, headers=headers)
        await self.settle()
        assert not self.errors, self.errors


class Guarded:
    """A fleet under credentials."""

    def __init__(self, server: Server, held: AuthFolder, group: anyio.abc.TaskGroup, stack: AsyncExitStack) -> None:
        self.server = server
        self.held = held
        self.url = server.url
        self.group = group
        self.schedule = SCHEDULE
        """When replicas that start compare their digests."""
        self._stack = stack

    async def connect(self, role: Role, name: str = "", fleet: str = NAME) -> Client:
        seed = self.held.seed_file(fleet, role, name)
        context = connected([self.url], name or role, credentials=seed, ca=self.held.ca, refused_seconds=1)
        return await self._stack.enter_async_context(context)

    async def stranger(self, role: Role, name: str = "", fleet: str = NAME) -> Stranger:
        seed = read_seed(self.held.seed_file(fleet, role, name))
        stranger = Stranger(Nats(), f"{role} {name}".strip(), seed.public)
        await stranger.client.connect(
            [self.url], nkeys_seed_str=seed.text, tls=trust(self.held.ca), error_cb=stranger.error,
            inbox_prefix=f"_INBOX.{seed.public}.stranger", allow_reconnect=False,
        )  # fmt: skip
        self._stack.push_async_callback(stranger.client.close)
        return stranger

    async def coordinator(self, **options: Any) -> Coordinator:
        options = {"schedule": self.schedule, **options}
        service = Coordinator(await self.connect("coordinator"), NAME, **options)
        await self.group.start(service.run)
        return service

    async def router(self) -> Router:
        service = Router(await self.connect("router"), NAME, schedule=self.schedule)
        await self.group.start(service.run)
        return service

    async def historian(self, folder: Path) -> Historian:
        service = Historian(
            await self.connect("historian"), NAME, folder, servers=[self.url], ca=self.held.ca,
            credentials=self.held.seed_file(NAME, "historian"),
        )  # fmt: skip
        await self.group.start(service.run)
        return service

    async def node(self, name: str, **config: Any) -> None:
        client = await self.connect("node", name)
        await self.group.start(run_nodes, client, NAME, [NodeConfig(name=name, **config)])


@asynccontextmanager
async def guarded(path: Path) -> AsyncIterator[Guarded]:
    """A server with credentials of `folder_of`."""
    held = folder_of(path / "auth")
    server = await start_server(path / "data", port=free_port(), include=held.place_alone())
    try:
        async with AsyncExitStack() as stack, anyio.create_task_group() as group:
            yield Guarded(server, held, group, stack)
            group.cancel_scope.cancel()
    finally:
        await server.stop()


async def last_sequence(client: Client, stream: str = f"KV_{NAME}") -> int:
    """Where the log ends, asked by one who may."""
    last: int = (await client.jetstream().stream_info(stream)).state.last_seq
    return last


def subjects_of(fleet: str, names: Iterable[str]) -> list[str]:
    return [f"kv.{fleet}.{name}" for name in names]
