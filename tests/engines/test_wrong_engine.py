"""Wrong addresses of engines: `attach` and `complete` say within seconds what answers there instead."""

from __future__ import annotations

import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.services.dataplane.complete import Completer
from kvplane.services.engines.facts import Engine
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import EngineFailed
from tests.support.listeners import listening
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

WRONG = [
    ("http://{}", "http", "http://{}/health answers 404, and http://{}/v1/models answers 404"),
    (
        "http://{}/v1",
        "http",
        "http://{}/v1/health answers 404, and http://{}/v1/v1/models answers 404; leave the /v1 out",
    ),
    ("https://{}", "http", "an HTTP server answers at {} without TLS; write http://"),
    ("http://{}", "https", "something at {} speaks TLS from the first byte; write https://"),
    ("https://{}", "https", "the certificate of {} is not trusted"),
    ("http://{}", "nats 2.10.0", "a NATS server 2.10.0 answers at {}, which speaks no HTTP"),
    ("http://{}", "ssh", "something else answers at {}: 'SSH-2.0"),
]


@asynccontextmanager
async def attaching(server: Server, engine: str, *options: str) -> AsyncIterator[anyio.abc.Process]:
    command = [
        sys.executable,
        "-m",
        "kvplane",
        "attach",
        "vllm",
        "--engine",
        engine,
        "--node",
        "a",
        "--server",
        server.url,
    ]
    process = await anyio.open_process([*command, *options])
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        with anyio.CancelScope(shield=True):
            await process.aclose()


@pytest.mark.parametrize(("url", "listener", "says"), WRONG)
async def test_what_can_never_be_an_engine_is_known_for_what_it_is(
    tmp_path: Path, url: str, listener: str, says: str
) -> None:
    async with listening(listener, tmp_path) as port:
        where = f"127.0.0.1:{port}"
        async with Engine("vllm", url.replace("{}", where)) as engine:
            with anyio.fail_after(10):
                health = await engine.health(1.5)
    assert (health.well, health.final) == (False, True)
    assert says.replace("{}", where) in health.reason


async def test_what_may_still_become_one_is_no_reason_to_end(tmp_path: Path) -> None:
    async with listening("silent", tmp_path) as port, Engine("vllm", f"http://127.0.0.1:{port}") as engine:
        assert await engine.health(0.2) == (False, f"http://127.0.0.1:{port}/health does not answer in 0.2 s", False)
    port = free_port()
    async with Engine("vllm", f"http://127.0.0.1:{port}") as engine:
        assert await engine.health() == (False, f"nobody listens at 127.0.0.1:{port} (connection refused)", False)
    async with Engine("vllm", "http://no.such.invalid") as engine:
        assert await engine.health() == (False, "no address is known for the name 'no.such.invalid'", False)


async def test_attach_ends_with_what_answered(server: Server, tmp_path: Path) -> None:
    async with listening("http", tmp_path) as port:
        begin = time.monotonic()
        async with attaching(server, f"http://127.0.0.1:{port}") as process:
            assert process.stderr is not None
            stderr = b""
            with anyio.fail_after(40):
                async for part in process.stderr:
                    stderr += part
                assert await process.wait() == 1
    last = stderr.decode().splitlines()[-1]
    assert last.startswith(f"kvplane: there is no engine: http://127.0.0.1:{port}/health answers 404")
    # It waited for ten minutes before.
    assert time.monotonic() - begin < 20


async def test_attach_says_whom_it_waits_for(server: Server) -> None:
    port = free_port()
    async with attaching(server, f"http://127.0.0.1:{port}") as process:
        assert process.stderr is not None
        stderr = b""
        with anyio.fail_after(20):
            while b"engine_waited_for" not in stderr:
                stderr += await process.stderr.receive()
    assert f"nobody listens at 127.0.0.1:{port} (connection refused)".encode() in stderr


@pytest.mark.parametrize(
    ("listener", "says"),
    [
        ("nats 2.10.0", "a NATS server 2.10.0 answers at {}, which speaks no HTTP"),
        ("http", "answers 404 at http://{}/v1/completions"),
        ("", "nobody listens at {} (connection refused)"),
    ],
)
async def test_a_completion_says_what_answered_instead_of_the_engine(
    fleet: Fleet, tmp_path: Path, listener: str, says: str
) -> None:
    await fleet.coordinator()
    await fleet.router()

    async def complete(port: int) -> str:
        node = messages.RegisterRequest(
            node="a", address=f"http://127.0.0.1:{port}", models=["m"], block_size=16, capacity_blocks={"gpu": 4}
        )
        await fleet.ask("coordinator.node.register", node)
        async with Completer(fleet.client, fleet.name) as completer:
            with anyio.fail_after(10), pytest.raises(EngineFailed) as caught:
                await completer.complete({"model": "m", "prompt": "text"})
        return str(caught.value)

    if listener:
        async with listening(listener, tmp_path) as port:
            message = await complete(port)
    else:
        port = free_port()
        message = await complete(port)
    assert says.format(f"127.0.0.1:{port}") in message


async def test_the_command_says_whom_a_completion_waits_for(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.coordinator()
    await fleet.router()
    async with listening("silent", tmp_path) as port:
        node = messages.RegisterRequest(
            node="a", address=f"http://127.0.0.1:{port}", models=["m"], block_size=16, capacity_blocks={"gpu": 4}
        )
        await fleet.ask("coordinator.node.register", node)
        command = [sys.executable, "-m", "kvplane", "complete", "m", "hello", "--server", fleet.url]
        process = await anyio.open_process(command)
        try:
            assert process.stderr is not None
            with anyio.fail_after(20):
                stderr = await process.stderr.receive()
        finally:
            process.kill()
            await process.aclose()
    assert stderr.decode().startswith(f"waiting for node a at http://127.0.0.1:{port}/v1/chat/completions/render")
