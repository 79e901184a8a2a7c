"""Wrong addresses of NATS servers: what is wrong is said within seconds, and what may still come is waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from structlog.testing import capture_logs

from kvplane.events.errors import BadServer, KvplaneError, LogUnavailable, ServerTooOld, WrongServer
from kvplane.events.log.connection import connected
from kvplane.services.auth.folder import AuthFolder
from kvplane.services.embedded.server import server_binary, start_server
from kvplane.services.process import logs
from tests.support.listeners import listening
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

SECONDS = 10.0
"""Within what a loaded machine must know; the connection's own time is 3 s at the most, and was 20 s and more before."""


@asynccontextmanager
async def nats(config: Path) -> AsyncIterator[None]:
    """A server of this configuration."""
    process = await anyio.open_process([server_binary(), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        with anyio.CancelScope(shield=True):
            await process.wait()


async def refused(servers: list[str], kind: type[KvplaneError], **options: Any) -> str:
    """What is said of servers that can't be connected to, and that it is said soon."""
    options = {"connect_seconds": float("inf"), **options}
    with anyio.fail_after(SECONDS), pytest.raises(kind) as caught:
        async with connected(servers, "x", **options):
            pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("listener", "kind", "says"),
    [
        ("http", WrongServer, "an HTTP server answers at 127.0.0.1:{port}; name yours with --server"),
        ("https", WrongServer, "something at 127.0.0.1:{port} speaks TLS from the first byte"),
        ("ssh", WrongServer, "something else answers at 127.0.0.1:{port}: 'SSH-2.0"),
        ("nats 2.9.25", ServerTooOld, "the server at 127.0.0.1:{port} is NATS 2.9.25; kvplane needs 2.10 or newer"),
    ],
)
async def test_what_can_never_work_ends_also_for_those_who_wait_for_ever(
    tmp_path: Path, listener: str, kind: type[KvplaneError], says: str
) -> None:
    async with listening(listener, tmp_path) as port:
        assert says.format(port=port) in await refused([f"nats://127.0.0.1:{port}"], kind)


async def test_a_server_of_the_least_version_is_not_too_old(tmp_path: Path) -> None:
    # It says nothing after its greeting, so nobody gets further than that.
    async with listening("nats 2.10.0", tmp_path) as port:
        message = await refused([f"nats://u:secret@127.0.0.1:{port}"], LogUnavailable, connect_seconds=1)
    assert f"a NATS server 2.10.0 answers at 127.0.0.1:{port}, and the connection did not come about" in message
    assert "secret" not in message


async def test_silence_and_absence_end_for_those_who_ask(tmp_path: Path) -> None:
    async with listening("silent", tmp_path) as port:
        message = await refused([f"nats://127.0.0.1:{port}"], LogUnavailable, connect_seconds=1)
        assert f"127.0.0.1:{port} takes connections and says nothing" in message
    port = free_port()
    message = await refused([f"nats://127.0.0.1:{port}", "nats://no.such.invalid"], LogUnavailable, connect_seconds=1)
    assert f"nobody listens at 127.0.0.1:{port} (connection refused)" in message
    assert "no address is known for the name 'no.such.invalid'" in message


@pytest.mark.parametrize(
    "url", ["http://u:secret@127.0.0.1:4222", "ws://u:secret@127.0.0.1:4222", "nats://127.0.0.1:99999", "nats://", ""]
)
async def test_what_is_no_address_is_said_without_its_login(url: str) -> None:
    message = await refused([url], BadServer)
    assert "write nats://HOST:PORT" in message
    assert "secret" not in message


async def test_other_ports_of_a_nats_server_are_not_for_clients(tmp_path: Path) -> None:
    port, routes, leafs = free_port(), free_port(), free_port()
    config = tmp_path / "nats.conf"
    config.write_text(
        f'port: {port}\ncluster {{ name: c, listen: "127.0.0.1:{routes}" }}\nleafnodes {{ listen: "127.0.0.1:{leafs}" }}\n'
    )
    async with nats(config):
        async with connected([f"nats://127.0.0.1:{port}"], "x"):
            pass
        for other in (routes, leafs):
            message = await refused([f"nats://127.0.0.1:{other}"], WrongServer)
            assert "port, which is not for clients" in message


async def test_a_server_that_speaks_tls_first_is_told_from_one_that_is_none(tmp_path: Path) -> None:
    held = AuthFolder(tmp_path / "auth")
    held.set_servers([])
    held.add("f", "client")
    held.save()
    held.place_alone()
    place, port = held.server_folder("server"), free_port()
    config = tmp_path / "nats.conf"
    files = f'cert_file: "{place / "server.pem"}", key_file: "{place / "server.key"}"'
    config.write_text(f"port: {port}\ntls {{ {files}, handshake_first: true }}\n")
    async with nats(config):
        message = await refused([f"nats://127.0.0.1:{port}"], WrongServer, ca=held.ca)
        assert f"a NATS server at 127.0.0.1:{port} speaks TLS from the first byte" in message
        assert "has `handshake_first` on" in message


async def test_who_may_wait_says_for_what_and_connects_when_it_comes(tmp_path: Path) -> None:
    port = free_port()
    got_in = anyio.Event()

    async def wait() -> None:
        async with connected([f"nats://127.0.0.1:{port}"], "patient", connect_seconds=float("inf")):
            got_in.set()

    logs.configure("warning")
    with capture_logs() as lines:
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await until(lambda: any(line["event"] == "nats_waited_for" for line in lines))
            server = await start_server(tmp_path / "data", port=port)
            with anyio.fail_after(20):
                await got_in.wait()
    await server.stop()
    entry = next(line for line in lines if line["event"] == "nats_waited_for")
    assert entry["reason"] == f"nobody listens at 127.0.0.1:{port} (connection refused)"
    assert entry["client"] == "patient"


@pytest.mark.parametrize(
    "command",
    [["node", "list"], ["router"], ["historian", "--history", "h"], ["sql", "SELECT 1"], ["complete", "m", "hello"]],
    ids=lambda command: command[0],
)
async def test_commands_and_services_end_with_the_sentence(tmp_path: Path, command: list[str]) -> None:
    async with listening("http", tmp_path) as port:
        begin = time.monotonic()
        arguments = [sys.executable, "-m", "kvplane", *command, "--server", f"nats://127.0.0.1:{port}"]
        with anyio.fail_after(40):
            done = await anyio.run_process(arguments, check=False, cwd=tmp_path)
        took = time.monotonic() - begin
    assert done.returncode == 1
    sentence = done.stderr.decode().splitlines()[-1]
    assert sentence.startswith(f"kvplane: no NATS server is there: an HTTP server answers at 127.0.0.1:{port}")
    assert sentence.endswith("[wrong_server]")
    # Most of it is the start of a process; before, it took 45 s.
    assert took < 30
