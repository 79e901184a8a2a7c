"""Who hears whom: a network namespace for every process as root, own TCP proxies elsewhere, or nothing that can be cut.

A cut is one-way: what `source` sends to `target` gets lost without a word, as behind a dead switch.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Protocol

import anyio

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import SocketStream, TaskGroup

NOWHERE = "02:00:00:00:00:01"
"""A hardware address that nobody has."""
HARNESS = "harness"
CHUNK = 1 << 16


class Network(Protocol):
    """What a world asks of a network."""

    kind: str

    async def open(self, servers: Sequence[str], others: Sequence[str], group: TaskGroup) -> None:
        """Make it ready for these names; proxies run in `group`."""

    def host(self, name: str) -> str:
        """Address on which a process listens."""

    def prefix(self, name: str) -> list[str]:
        """What comes before a process's command."""

    def way(self, source: str, target: str, host: str, port: int) -> tuple[str, int]:
        """Where `source` connects to reach a port of server `target`."""

    async def cut(self, source: str, target: str) -> None:
        """Lose what `source` sends to `target`."""

    async def mend(self) -> None:
        """Undo all cuts."""

    async def restore(self, source: str, target: str) -> None:
        """Undo one cut."""

    async def close(self) -> None:
        """Leave nothing behind."""


class Plain:
    """The loopback interface; nothing can be cut."""

    kind = "none"

    async def open(self, servers: Sequence[str], others: Sequence[str], group: TaskGroup) -> None:
        """Nothing to do."""

    def host(self, name: str) -> str:  # noqa: ARG002 - the same for all
        """Loopback."""
        return "127.0.0.1"

    def prefix(self, name: str) -> list[str]:  # noqa: ARG002 - the same for all
        """Nothing."""
        return []

    def way(self, source: str, target: str, host: str, port: int) -> tuple[str, int]:  # noqa: ARG002 - straight on
        """Straight on."""
        return host, port

    async def cut(self, source: str, target: str) -> None:
        """Can't be."""
        raise NotImplementedError(f"{source} can't be cut from {target} without namespaces or proxies")

    async def restore(self, source: str, target: str) -> None:
        """Nothing to do."""

    async def mend(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""


async def _ip(*arguments: str) -> None:
    await anyio.run_process(["ip", *arguments])


class Namespaces(Plain):
    """A namespace a process on a bridge of its own. A cut is a neighbour entry that leads nowhere."""

    kind = "netns"

    def __init__(self) -> None:
        number = os.getpid()
        self._tag = f"kv{number}"
        self._subnet = f"10.{64 + (number >> 8) % 64}.{number % 256}"
        self._hosts: dict[str, str] = {}
        self._cuts: set[tuple[str, str]] = set()

    async def open(self, servers: Sequence[str], others: Sequence[str], group: TaskGroup) -> None:  # noqa: ARG002
        """Make the bridge and the namespaces."""
        await _sweep()
        bridge = f"{self._tag}b"
        await _ip("link", "add", bridge, "type", "bridge")
        await _ip("addr", "add", f"{self._subnet}.254/24", "dev", bridge)
        await _ip("link", "set", bridge, "up")
        for number, name in enumerate([*servers, *others], 1):
            space, wire = self._space(name), f"{self._tag}v{number}"
            self._hosts[name] = f"{self._subnet}.{number}"
            await _ip("netns", "add", space)
            await _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", space)
            await _ip("link", "set", wire, "master", bridge, "up")
            await _ip("-n", space, "link", "set", "lo", "up")
            await _ip("-n", space, "addr", "add", f"{self._hosts[name]}/24", "dev", "eth0")
            await _ip("-n", space, "link", "set", "eth0", "up")

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def host(self, name: str) -> str:
        """Address in the namespace."""
        return self._hosts[name]

    def prefix(self, name: str) -> list[str]:
        """Run it there; the process id stays that of the command."""
        return ["ip", "netns", "exec", self._space(name)]

    async def cut(self, source: str, target: str) -> None:
        """Lose what `source` sends to `target`."""
        self._cuts.add((source, target))
        where = ("lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")
        await _ip("-n", self._space(source), "neigh", "replace", self._hosts[target], *where)

    async def restore(self, source: str, target: str) -> None:
        """Undo one cut."""
        self._cuts.discard((source, target))
        with suppress(CalledProcessError):
            await _ip("-n", self._space(source), "neigh", "del", self._hosts[target], "dev", "eth0")

    async def mend(self) -> None:
        """Undo all cuts."""
        for source, target in list(self._cuts):
            await self.restore(source, target)

    async def close(self) -> None:
        """Remove the namespaces and the bridge."""
        with anyio.CancelScope(shield=True):
            await _remove(self._tag)


async def _sweep() -> None:
    """Remove what runs left behind that were killed."""
    found = (await anyio.run_process(["ip", "-o", "link", "show", "type", "bridge"])).stdout.decode()
    for line in found.splitlines():
        name = line.split(":")[1].strip()
        if name.startswith("kv") and name[2:-1].isdigit() and not Path(f"/proc/{name[2:-1]}").exists():
            await _remove(name[:-1])


async def _remove(tag: str) -> None:
    spaces = (await anyio.run_process(["ip", "netns", "list"])).stdout.decode().split("\n")
    for line in spaces:
        if line.startswith(f"{tag}-"):
            await _ip("netns", "del", line.split()[0])
    with suppress(CalledProcessError):
        await _ip("link", "del", f"{tag}b")


class Proxies(Plain):
    """A TCP proxy for every pair of a process and a server. A cut stops one direction of the pair's connections."""

    kind = "proxy"

    def __init__(self) -> None:
        self._ways: dict[tuple[str, str, int], int] = {}
        self._cuts: set[tuple[str, str]] = set()
        self._changed = anyio.Event()
        self._group: TaskGroup | None = None

    async def open(self, servers: Sequence[str], others: Sequence[str], group: TaskGroup) -> None:  # noqa: ARG002
        """Proxies are made when a way is asked for."""
        self._group = group

    def way(self, source: str, target: str, host: str, port: int) -> tuple[str, int]:
        """A proxy's port."""
        key = (source, target, port)
        if key not in self._ways:
            self._ways[key] = free_port()
            if self._group is None:
                raise RuntimeError("the network is not open")
            self._group.start_soon(self._serve, source, target, host, port, self._ways[key])
        return "127.0.0.1", self._ways[key]

    async def _serve(self, source: str, target: str, host: str, port: int, own: int) -> None:
        async def handle(near: SocketStream) -> None:
            async with near:
                while (source, target) in self._cuts or (target, source) in self._cuts:
                    await self._changed.wait()
                try:
                    far = await anyio.connect_tcp(host, port)
                except OSError:
                    return
                async with far, anyio.create_task_group() as both:
                    both.start_soon(self._pump, near, far, (source, target))
                    await self._pump(far, near, (target, source))
                    both.cancel_scope.cancel()

        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=own)
        async with listener:
            await listener.serve(handle)

    async def _pump(self, here: SocketStream, there: SocketStream, pair: tuple[str, str]) -> None:
        broken = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)
        try:
            while True:
                data = await here.receive(CHUNK)
                while pair in self._cuts:
                    await self._changed.wait()
                await there.send(data)
        except broken:
            with suppress(*broken):
                await there.aclose()

    async def cut(self, source: str, target: str) -> None:
        """Hold what `source` sends to `target`."""
        self._cuts.add((source, target))

    async def restore(self, source: str, target: str) -> None:
        """Let go what was held."""
        self._cuts.discard((source, target))
        self._changed.set()
        self._changed = anyio.Event()

    async def mend(self) -> None:
        """Undo all cuts."""
        for source, target in list(self._cuts):
            await self.restore(source, target)


async def can_cut_namespaces() -> bool:
    """Whether namespaces can be made here: root, `ip`, and a kernel that lets it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"kv{os.getpid()}t"
    try:
        await _ip("netns", "add", name)
        try:
            await _ip("link", "add", f"{name}b", "type", "bridge")
            await _ip("link", "del", f"{name}b")
        finally:
            await _ip("netns", "del", name)
    except (CalledProcessError, OSError):
        return False
    return True


async def network(kind: str) -> Network:
    """The network of this name; `auto` is the best that can be had here."""
    if kind == "auto":
        kind = "netns" if await can_cut_namespaces() else "proxy"
    return {"netns": Namespaces, "proxy": Proxies, "none": Plain}[kind]()
