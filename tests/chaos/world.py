"""The fleet under attack: servers, coordinators, routers, gateways, a historian, simulated nodes, all of the command line."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import asynccontextmanager, suppress
from functools import partial
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING

import anyio

from kvplane.events.log.connection import connected
from kvplane.services.auth.folder import FIRST, AuthFolder
from kvplane.services.embedded.server import server_binary
from tests.chaos.faults import Ground
from tests.chaos.network import network
from tests.chaos.processes import Service
from tests.support.ports import free_port
from tests.support.three_servers import CONFIGURATION, NAMES, Cluster, Member, monitor
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from anyio.abc import TaskGroup
    from nats.aio.client import Client

    from kvplane.services.auth.roles import Role
    from tests.chaos.ledger import Ledger
    from tests.chaos.network import Network

FLEET = "chaos"
MODEL, MANAGED = "sim", "simm"
"""Models of the simulated nodes that report their caches, and of those that are managed."""
ROUTERS, COORDINATORS = 2, 2
GATEWAYS = ("gateway-1", "gateway-2")
"""Each is a router as well."""
SNAPSHOT_COMMITS = 3000
READY_SECONDS = 90.0
STUTTER = (0.05, 0.15)
"""Seconds that a stuttering process runs and stands still."""

COMMANDS: dict[str, list[str]] = {
    **{f"coordinator-{n + 1}": ["coordinator", "--snapshot-commits", str(SNAPSHOT_COMMITS)] for n in range(COORDINATORS)},
    **{f"router-{n + 1}": ["router"] for n in range(ROUTERS)},
    **{name: ["gateway", "--listen", "{host}:{port}"] for name in GATEWAYS},
    "historian": ["historian"],
    "nodes": ["simnode", "sim-a", "sim-b", "--model", MODEL, "--decode-speed", "400", "--host", "{host}"],
    "more-nodes": ["simnode", "sim-c", "--model", MODEL, "--decode-speed", "400", "--host", "{host}"],
    "managed": [
        "simnode", "man-a", "man-b", "--model", MANAGED, "--cache-mode", "managed", "--capacity-blocks", "200",
        "--decode-speed", "400", "--host", "{host}",
    ],
}  # fmt: skip
"""What each is started with; `{host}` is where it listens, `{port}` a gateway's port."""


class Servers(Cluster):
    """The servers of a world, each where the network puts it."""

    def __init__(
        self, folder: Path, net: Network, names: tuple[str, ...], settings: Callable[[str], str] = str,
        held: AuthFolder | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, auth=None)
        self._held = held
        self._settings = settings
        """What becomes of the configuration's text before it is used."""
        self.members = {name: Member(name, folder / name, net.host(name), net.prefix(name)) for name in names}
        self._net = net

    def route(self, source: Member, target: Member) -> str:
        """Through the network."""
        host, port = self._net.way(source.name, target.name, target.host, target.cluster_port)
        return f"nats://{host}:{port}"

    async def _open(self, member: Member) -> None:
        if len(self.members) > 1:
            auth = member.folder / "auth"
            if not auth.exists():
                member.folder.mkdir(parents=True, exist_ok=True)
                (member.folder / CONFIGURATION.name).write_text(self._settings(CONFIGURATION.read_text()))
                if self._held is not None:
                    shutil.copytree(self._held.server_folder(member.name), auth)
                    await super()._open(member)
                    return
                auth.mkdir()
                (auth / "client.conf").touch()
                (auth / "monitor.conf").touch()
                # Otherwise servers tell clients and each other of ways around the proxies; nobody listens on port 1.
                direct = 'no_advertise: true\nadvertise: "127.0.0.1:1"\n' if self._net.kind == "proxy" else ""
                (auth / "cluster.conf").write_text(direct)
            await super()._open(member)
            return
        member.folder.mkdir(parents=True, exist_ok=True)
        single = member.folder / "single.conf"
        text = self._settings(CONFIGURATION.with_name("single.conf").read_text())
        if self._held is not None:
            shutil.copytree(self._held.server_folder(member.name), member.folder / "auth", dirs_exist_ok=True)
            included = 'include "auth/client.conf"\ninclude "auth/monitor.conf"'
            text = text.replace('# include "auth/client.conf"', included)
        # A server whose name is given as an option can't read its configuration again.
        single.write_text(f"server_name: {member.name}\n{text}")
        command = [server_binary(), "-c", str(single), "-a", member.host, "-p", str(member.port)]
        command += ["-m", str(member.monitor_port)]
        with member.log.open("ab") as log:
            member.process = await anyio.open_process(
                [*member.prefix, *command], cwd=member.folder, env=dict(os.environ), stdin=DEVNULL, stdout=log, stderr=STDOUT,
                start_new_session=True,
            )  # fmt: skip
        member.paused = False

    def reload(self) -> None:
        """Give the servers that run what the credentials' folder says now."""
        assert self._held is not None
        for member in self.members.values():
            shutil.copytree(self._held.server_folder(member.name), member.folder / "auth", dirs_exist_ok=True)
            member.send(signal.SIGHUP)

    async def settled(self) -> None:
        """Wait until the servers are what they should be."""
        if len(self.members) > 1:
            await super().settled()
            return

        async def healthy() -> bool:
            return all([(await monitor(each, "healthz")).get("status") == "ok" for each in self.running])

        await until(healthy)

    async def begin(self, *names: str) -> None:
        """Start servers that don't run, and don't wait for them."""
        for name in names:
            member = self.members[name]
            if member.process is None or member.process.returncode is not None:
                await self._open(member)


class World:
    """All processes by name."""

    def __init__(
        self, folder: Path, net: Network, ledger: Ledger, *, servers: int = 3, guarded: bool = False
    ) -> None:  # fmt: skip
        self.folder = folder
        self.net = net
        self.ledger = ledger
        self.names = NAMES[:servers]
        self.fleet = FLEET
        self.services: dict[str, Service] = {}
        self.held = AuthFolder(folder / "auth") if guarded else None
        """Credentials, when everybody must have some; then each simulated node is a process of its own."""
        self.ports = {name: free_port() for name in GATEWAYS}
        self.servers: Servers

    @property
    def ground(self) -> Ground:
        """What there is to be attacked."""
        return Ground(self.names, tuple(COMMANDS), self.net.kind != "none")

    def urls(self, name: str) -> list[str]:
        """Where a process finds the servers."""
        found = []
        for member in self.servers.members.values():
            host, port = self.net.way(name, member.name, member.host, member.port)
            found.append(f"nats://{host}:{port}")
        return found

    def client(self, name: str, *urls: str) -> AbstractAsyncContextManager[Client]:
        """A client of the harness, who may do anything; by all servers, unless some are named."""
        at = urls or self.urls("harness")
        if self.held is None:
            return connected(at, name, connect_seconds=60)
        seed = self.held.seed_file(self.fleet, "admin")
        return connected(at, name, connect_seconds=60, credentials=seed, ca=self.held.ca)

    def _make_credentials(self) -> None:
        held = self.held
        if held is None:
            return
        # On one machine a server has no name but its addresses; what it reads, it finds beside its configuration.
        held.set_servers(list(self.names), also=[self.net.host(name) for name in self.names], seen="auth")
        for role in FIRST:
            held.add(self.fleet, role)
        for node in (node for command in COMMANDS.values() for node in _nodes(command)):
            held.add(self.fleet, "node", node)
        held.save()

    def let_in(self, role: Role, name: str) -> Path:
        """Let another user in; the seed's file."""
        assert self.held is not None
        self.held.add(self.fleet, role, name)
        self.held.save()
        self.servers.reload()
        return self.held.seed_file(self.fleet, role, name)

    def _own_options(self, name: str, command: list[str]) -> list[str]:
        own = ["--history", str(self.folder / "history")] if name == "historian" else []
        if self.held is not None:
            # A gateway has the router inside.
            role: Role = {"simnode": "node", "gateway": "router"}.get(command[0], command[0])  # type: ignore[assignment]
            seed = self.held.seed_file(self.fleet, role, command[1] if role == "node" else "")
            own += ["--credentials", str(seed), "--ca", str(self.held.ca)]
        return own

    def gateway(self, name: str) -> str:
        """URL of a gateway."""
        return f"http://{self.net.host(name)}:{self.ports[name]}"

    async def open(self, group: TaskGroup) -> None:
        """Start everything and wait until it is ready."""
        await self.net.open(self.names, list(COMMANDS), group)
        self._make_credentials()
        self.servers = Servers(self.folder / "servers", self.net, self.names, held=self.held)
        await self.servers.start(*self.names)
        for name, command in COMMANDS.items():
            if self.held is not None and (more := _nodes(command)[1:]):
                # Credentials are of one node.
                command = [word for word in command if word not in more]  # noqa: PLW2901 - the same, with fewer words
            filled = [part.format(host=self.net.host(name), port=self.ports.get(name)) for part in command]
            self.services[name] = Service(
                name, [*filled, *self._own_options(name, command), "--fleet", self.fleet, "--log-format", "json"],
                partial(self.urls, name), self.folder, self.ledger, self.net.prefix(name),
            )  # fmt: skip
            group.start_soon(self.services[name].watch)
        for name, service in self.services.items():
            await service.start()
            # The first coordinator makes the log; nobody else starts without one.
            if name == "coordinator-1":
                await self.ready(name)
        await self.ready()

    async def ready(self, *names: str) -> None:
        """Wait until services have said that they are ready, all of them when none is named. Raises `TimeoutError`."""

        async def ready() -> bool:
            return all(self.services[name].up for name in names or self.services)

        await until(ready, READY_SECONDS)

    async def restore(self) -> None:
        """End all faults: mend the network, resume and start everything, and wait until it is ready."""
        await self.net.mend()
        for member in self.servers.members.values():
            if member.paused:
                self.servers.resume(member.name)
        await self.servers.begin(*self.names)
        await self.servers.settled()
        for service in self.services.values():
            service.resume()
            await service.start()
        await self.ready()

    async def leader(self) -> str:
        """Server that leads the log; any that runs when nobody knows."""
        if len(self.names) > 1:
            with anyio.move_on_after(3):
                found = await self.servers.leader(self.fleet)
                if found is not None:
                    return found
        return next((member.name for member in self.servers.running), self.names[0])

    async def close(self) -> None:
        """Stop the services in good order, kill the servers, and take the network away."""
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for service in self.services.values():
                    group.start_soon(service.end, signal.SIGTERM)
            with suppress(AttributeError):
                await self.servers.kill(*self.names)
            await self.net.close()


def _nodes(command: list[str]) -> list[str]:
    """Nodes that a command simulates."""
    return [word for word in command[1:4] if "-" in word.strip("-")] if command[0] == "simnode" else []


@asynccontextmanager
async def world_in(
    folder: Path, ledger: Ledger, *, servers: int = 3, cuts: str = "auto", guarded: bool = False
) -> AsyncIterator[World]:
    """A world for the length of a block."""
    folder.mkdir(parents=True, exist_ok=True)
    async with anyio.create_task_group() as group:
        world = World(folder, await network(cuts), ledger, servers=servers, guarded=guarded)
        try:
            await world.open(group)
            yield world
        finally:
            await world.close()
            group.cancel_scope.cancel()
