"""A real server for each test that asks for one, and services on it."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import pytest
from hypothesis import settings

from kvplane.events.log.connection import connected
from kvplane.services.embedded.server import Server, free_port, start_server
from kvplane.services.process import logs
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask
from kvplane.services.simulation.simnode import NodeConfig, run_nodes
from tests.support.disks import small_disk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import msgspec
    from nats.aio.client import Client

T = TypeVar("T")

# A failure must be repeatable by whoever reads it.
settings.register_profile("kvplane", print_blob=True, deadline=None)
settings.load_profile("kvplane")

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRACE = SHARED / "traces" / "conversation_trace.jsonl"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVPLANE_")]:
        monkeypatch.delenv(name)
    logs.configure("error")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def trace() -> Path:
    if not TRACE.exists():
        pytest.skip("the published trace is not on this machine")
    return TRACE


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of a few megabytes."""
    with small_disk(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    running = await start_server(tmp_path / "data", port=free_port())
    yield running
    await running.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with connected([server.url], "test") as connection:
        yield connection


class Fleet:
    """Services on one server, in this process, each with a connection of its own."""

    def __init__(self, url: str, client: Client, group: anyio.abc.TaskGroup, stack: AsyncExitStack) -> None:
        self.url = url
        self.client = client
        self.name = "default"
        self._group = group
        self._stack = stack

    async def connect(self, name: str) -> Client:
        return await self._stack.enter_async_context(connected([self.url], name))

    async def coordinator(self) -> Coordinator:
        service = Coordinator(await self.connect("coordinator"), self.name)
        await self._group.start(service.run)
        return service

    async def router(self) -> Router:
        service = Router(await self.connect("router"), self.name)
        await self._group.start(service.run)
        return service

    async def nodes(self, *configs: NodeConfig) -> None:
        client = await self.connect("nodes")
        await self._group.start(run_nodes, client, self.name, list(configs))

    async def ask(self, endpoint: str, request: msgspec.Struct, form: type[T] | None = None) -> Any:
        return await ask(self.client, f"kv.{self.name}.{endpoint}", request, form)

    async def refused(self, endpoint: str, request: msgspec.Struct) -> str:
        with pytest.raises(ServiceFault) as caught:
            await self.ask(endpoint, request)
        return caught.value.code


@pytest.fixture
async def fleet(server: Server, client: Client) -> AsyncIterator[Fleet]:
    async with fleet_on(server.url, client) as running:
        yield running


@asynccontextmanager
async def fleet_on(url: str, client: Client) -> AsyncIterator[Fleet]:
    """Services on a server, stopped before their connections are."""
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        yield Fleet(url, client, group, stack)
        group.cancel_scope.cancel()


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached all of a process; until then it may still answer."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def until(holds: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something holds."""
    with anyio.fail_after(seconds):
        while not holds():
            await anyio.sleep(0.01)
