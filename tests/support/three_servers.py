"""Three real NATS servers on this machine, from the configuration that a deployment uses, to be killed, stopped and paused.

Nothing here knows pytest: programs that run for minutes use it as well.
"""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio

from kvplane.events.subjects import stream_name
from kvplane.services.embedded.server import server_binary
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from anyio.abc import Process

CONFIGURATION = Path(__file__).resolve().parents[2] / "compose" / "nats" / "cluster.conf"
NAMES = ("nats-1", "nats-2", "nats-3")
WAIT_SECONDS = 30.0
"""How long servers may take to be what they are waited for to be."""
STOP_SECONDS = 60.0
"""A lame duck leaves after its grace period and when it has closed its clients."""


class Member:
    """One server: its ports, its folder, and its process while it runs."""

    def __init__(self, name: str, folder: Path, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.folder = folder
        self.host = host
        self.prefix = list(prefix)
        """What comes before the server's command, such as `ip netns exec`."""
        self.port, self.cluster_port, self.monitor_port = free_port(), free_port(), free_port()
        self.process: Process | None = None
        self.paused = False

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://{self.host}:{self.port}"

    @property
    def log(self) -> Path:
        """What the server says, all lives of it."""
        return self.folder / "nats-server.log"

    @property
    def runs(self) -> bool:
        """Whether there is a process that is not paused."""
        return self.process is not None and self.process.returncode is None and not self.paused

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing when the process is gone."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class Cluster:
    """Servers that keep one log together. All that they write lies in `folder`.

    `auth` names for each server the folder that is its `auth/`, made by `kvplane auth init`; without it anybody may
    do anything.
    """

    def __init__(self, folder: Path, *, auth: Mapping[str, Path] | None = None) -> None:
        self.members = {name: Member(name, folder / name) for name in NAMES}
        self._auth = auth or {}

    @property
    def urls(self) -> list[str]:
        """URLs of all servers, of those as well that don't run."""
        return [member.url for member in self.members.values()]

    @property
    def running(self) -> list[Member]:
        """Servers that run and are not paused."""
        return [member for member in self.members.values() if member.runs]

    async def start(self, *names: str) -> None:
        """Start servers, all when none is named, on what they had stored; return when they have a leader and are current."""
        for name in names or NAMES:
            await self._open(self.members[name])
        await self.settled()

    async def _open(self, member: Member) -> None:
        auth = member.folder / "auth"
        if not auth.exists():
            member.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(CONFIGURATION, member.folder)
            if member.name in self._auth:
                shutil.copytree(self._auth[member.name], auth)
            else:
                auth.mkdir()
                for empty in ("client.conf", "cluster.conf", "monitor.conf"):
                    (auth / empty).touch()
        routes = ", ".join(self.route(member, each) for each in self.members.values())
        environment = {
            **os.environ,
            "NATS_NAME": member.name,
            "NATS_HOST": member.host,
            "NATS_PORT": str(member.port),
            "NATS_ADVERTISE": f"{member.host}:{member.port}",
            "NATS_CLUSTER_PORT": str(member.cluster_port),
            "NATS_ROUTES": f"[{routes}]",
            "NATS_DATA": str(member.folder / "data"),
            "NATS_MONITOR": f"{member.host}:{member.monitor_port}",
        }
        with member.log.open("ab") as log:
            member.process = await anyio.open_process(
                [*member.prefix, server_binary(), "-c", CONFIGURATION.name], cwd=member.folder, env=environment, stdin=DEVNULL,
                stdout=log, stderr=STDOUT, start_new_session=True,
            )  # fmt: skip
        member.paused = False

    def route(self, source: Member, target: Member) -> str:  # noqa: ARG002 - where proxies are between, it matters
        """Where one server connects to another."""
        return f"nats://{target.host}:{target.cluster_port}"

    async def settled(self) -> None:
        """Wait until the cluster has a leader and every server that runs has caught up with it. Raises `TimeoutError`."""

        async def holds() -> bool:
            if await self.meta_leader() is None:
                return False
            return all([(await monitor(each, "healthz")).get("status") == "ok" for each in self.running])

        await until(holds, WAIT_SECONDS, every=0.05)

    async def meta_leader(self) -> str | None:
        """Server that leads the cluster, as far as one that runs knows."""
        for member in self.running:
            leader = (await monitor(member, "jsz")).get("meta_cluster", {}).get("leader")
            if leader in self.members and self.members[leader].runs:
                return str(leader)
        return None

    async def leader(self, fleet: str) -> str | None:
        """Server that leads a fleet's stream, said by itself: others may not have heard yet of a change."""
        for member in self.running:
            for account in (await monitor(member, "jsz?streams=true")).get("account_details", []):
                for stream in account.get("stream_detail", []):
                    leads = stream.get("cluster", {}).get("leader") == member.name
                    if stream["name"] == stream_name(fleet) and leads:
                        return member.name
        return None

    async def kill(self, *names: str) -> None:
        """SIGKILL, and wait until they are gone."""
        await self._end(signal.SIGKILL, *names)

    async def terminate(self, *names: str) -> None:
        """SIGTERM: they close their files and leave at once."""
        await self._end(signal.SIGTERM, *names)

    async def lame_duck(self, *names: str) -> None:
        """SIGUSR2: they give up what they lead, take nobody any more, close their clients one by one, and leave."""
        await self._end(signal.SIGUSR2, *names)

    async def _end(self, number: signal.Signals, *names: str) -> None:
        members = [self.members[name] for name in names]
        for member in members:
            member.send(number)
        with anyio.fail_after(STOP_SECONDS):
            for member in members:
                if member.process is not None:
                    await member.process.wait()
                member.process, member.paused = None, False

    def pause(self, name: str) -> None:
        """SIGSTOP: its connections stay open and nothing answers on them."""
        self.members[name].send(signal.SIGSTOP)
        self.members[name].paused = True

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self.members[name].send(signal.SIGCONT)
        self.members[name].paused = False

    async def stop(self) -> None:
        """Kill all that still runs."""
        with anyio.CancelScope(shield=True):
            await self.kill(*self.members)


async def monitor(member: Member, what: str) -> Any:
    """A page of the server's monitoring, under its secret path if it has one; nothing when it does not answer."""
    file = member.folder / "auth" / "monitor.conf"
    secret = [*(file.read_text().split('"') if file.exists() else []), "", ""][1]
    with suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as session:
            answer = await session.get(f"http://{member.host}:{member.monitor_port}{secret}/{what}")
            return await answer.json(content_type=None)
    return {}


@asynccontextmanager
async def cluster_in(folder: Path, *, auth: Mapping[str, Path] | None = None) -> AsyncIterator[Cluster]:
    """Three servers for the length of a block."""
    cluster = Cluster(folder, auth=auth)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
