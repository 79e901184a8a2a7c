"""A real server for each test that asks for one, and services on it."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

# Asserts of helpers say as much as those of tests.
pytest.register_assert_rewrite("tests.support")

from hypothesis import settings

from kvplane.events.log.connection import connected
from kvplane.services.embedded.server import Server, start_server
from kvplane.services.process import logs
from tests.support.disks import small_disk
from tests.support.fleet import Fleet, fleet_on
from tests.support.ports import free_port
from tests.support.shared_data import TRACE
from tests.support.turns import turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from nats.aio.client import Client


# Whoever started the tests in the background may have had them ignore it, and the processes that they start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A failure must be repeatable by whoever reads it.
settings.register_profile("kvplane", print_blob=True, deadline=None)
settings.load_profile("kvplane")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVPLANE_")]:
        monkeypatch.delenv(name)
    logs.configure("error")


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with turn(tmp_path_factory.getbasetemp().parent, alone=request.node.get_closest_marker("alone") is not None):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who needs the machine alone comes last: nobody else has to wait for it then."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


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


@pytest.fixture
async def fleet(server: Server, client: Client) -> AsyncIterator[Fleet]:
    async with fleet_on(server.url, client) as running:
        yield running
