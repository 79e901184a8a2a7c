"""Strangers at the port for health don't keep a service from its NATS server."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events.errors import KvplaneError
from kvplane.events.log.connection import connected
from kvplane.services.embedded.server import start_server
from kvplane.services.protocol.messages import RegisterRequest, RouteRequest
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.rpc.client import ask
from tests.support.commands import started
from tests.support.http_of_services import Http
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

FEW = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))"
HELD = 200


class Holders:
    """Connections with half a request each, made again when they are closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._held: list[socket.socket] = []

    def hold(self) -> int:
        """See to it that so many are open; how many were new."""
        kept = []
        for each in self._held:
            try:
                each.recv(4096)
            except BlockingIOError:
                kept.append(each)
                continue
            except OSError:
                pass
            each.close()
        new = HELD - len(kept)
        for _ in range(new):
            made = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            made.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
            made.setblocking(False)  # noqa: FBT003 - as sockets have it
            kept.append(made)
        self._held = kept
        return new

    def close(self) -> None:
        for each in self._held:
            each.close()


async def test_half_requests_do_not_keep_a_router_from_its_server(tmp_path: Path) -> None:
    port, http = free_port(), free_port()
    server = await start_server(tmp_path / "data", port=port)
    command = started("router", "--server", server.url, "--http", f"127.0.0.1:{http}", before=FEW)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: ASYNC220 - it starts in no time
    holders = Holders(http)
    health = Http(f"127.0.0.1:{http}")
    try:
        async with connected([server.url], "test") as client, anyio.create_task_group() as group:
            await group.start(Coordinator(client, "default").run)
            node = RegisterRequest(node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 4})
            await ask(client, "kv.default.coordinator.node.register", node)

            async def ready() -> bool:
                return (await health.state("/readyz"))[0] == 200

            await until(ready, seconds=30)
            await anyio.to_thread.run_sync(holders.hold)
            await server.stop()
            server = await start_server(tmp_path / "data", port=port)

            async def routed() -> bool:
                # They try for ever; and so does whoever asks.
                await anyio.to_thread.run_sync(holders.hold)
                try:
                    await ask(client, "kv.default.route", RouteRequest(model="m", tokens=[1]), seconds=1)
                except KvplaneError:
                    return False
                return True

            await until(routed, seconds=30)
            # Who asks for its health is answered as well.
            await until(ready)
            group.cancel_scope.cancel()
    finally:
        holders.close()
        process.kill()
        process.wait()
        await server.stop()
