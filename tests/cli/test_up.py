"""`kvplane up` from within: where it serves metrics, and how it ends."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events import types
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.services.cli import up
from kvplane.services.cli.common import Common
from kvplane.services.embedded.server import embedded_server
from kvplane.services.gateway.guard import Guarded
from kvplane.services.protocol.messages import StatusRequest
from kvplane.services.protocol.status import CoordinatorStatus
from kvplane.services.rpc.client import ask
from tests.support.eventful_fleet import write_commits
from tests.support.historians import historian, last_word
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

NOWHERE = up._up_http("off")


@asynccontextmanager
async def up_in(
    data: Path,
    port: int,
    capfd: pytest.CaptureFixture[str],
    *,
    simulate: int = 0,
    http: up._Http = NOWHERE,
    history: bool = False,
) -> AsyncIterator[str]:
    """What `up` runs, in this event loop, without gateway; what it wrote at its start. It is stopped at the end."""
    output = ""

    def written() -> str:
        nonlocal output
        output += capfd.readouterr().err
        return output

    async with anyio.create_task_group() as group:
        group.start_soon(
            partial(
                up._up, data, host="127.0.0.1", port=port, simulate=simulate, traffic=False, bare=False, history=history,
                gateway=None, http=http, inside=up._Inside(Common(), None), guarded=Guarded(),
            )
        )  # fmt: skip
        await until(lambda: "Ctrl-C stops it." in written(), 30)
        yield output
        group.cancel_scope.cancel()


async def test_a_port_that_somebody_took_is_gone_on_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        # After `up` has chosen it, and before it listens there.
        chosen = up._up_http(None)._replace(own=where)
        taken.listen()
        async with up_in(tmp_path, free_port(), capfd, http=chosen) as output:
            assert "kvplane node list" in output
            assert "curl" not in output
    async with up_in(tmp_path, free_port(), capfd, http=chosen) as output:
        assert f"curl http://{where}/metrics" in output


async def test_simulated_nodes_of_an_up_that_is_stopped_are_gone_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not lost some seconds after the next start, when they are missed there."""
    port = free_port()
    async with up_in(tmp_path, port, capfd, simulate=2):
        pass
    async with embedded_server(tmp_path, port=port) as server, connected([server.url], "test") as client:
        assert [await last_word(client, f"sim-{number}") for number in (1, 2)] == [
            types.NodeRemoved("sim-1", "it was stopped"), types.NodeRemoved("sim-2", "it was stopped"),
        ]  # fmt: skip


async def test_an_up_whose_log_was_purged_whole_begins_with_its_own_history(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    async with embedded_server(tmp_path, port=port) as server, connected([server.url], "test") as client:
        await open_stream(client.jetstream(), "default", create=True)
        await write_commits(client, 20)
        async with historian(server.url, tmp_path / "history"):
            pass
        await client.jetstream().purge_stream("KV_default")
    async with up_in(tmp_path, port, capfd, history=True), connected([f"nats://127.0.0.1:{port}"], "test") as client:
        status = await ask(client, "kv.default.coordinator.status", StatusRequest(), CoordinatorStatus)
        assert status.began == 20
