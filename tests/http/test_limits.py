"""Those who hold connections and send nothing, or read nothing, take nobody's place for long."""

from __future__ import annotations

import resource
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.services.http import server as serving
from kvplane.services.http.listener import bound
from kvplane.services.http.server import Exchange, Server
from kvplane.services.process.descriptors import KEPT_BACK, spared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import SocketStream

pytestmark = pytest.mark.anyio

WHOLE = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"
HALF = b"GET /x HTTP/1.1\r\nHost:"


async def answer(exchange: Exchange) -> None:
    exchange.send(200, [], b"ok")


@asynccontextmanager
async def listening(
    handler: Callable[[Exchange], Awaitable[None]] = answer, connections: int = 8
) -> AsyncIterator[tuple[str, int]]:
    server = Server(handler, lambda error: str(error).encode(), connections=connections)
    async with server.listening(bound("127.0.0.1", 0)) as where:
        yield where


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SWEEP_SECONDS", 0.05)


async def rest(stream: SocketStream) -> bytes:
    """Everything until the other side closes."""
    received = b""
    try:
        while True:
            received += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return received


@pytest.mark.parametrize("begin", [b"", b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 99999\r\n\r\n"])
async def test_a_byte_now_and_then_buys_no_time(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.5)
    async with listening() as where, await anyio.connect_tcp(*where) as stream:
        await stream.send(begin or HALF)
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:

                async def drip() -> None:
                    while True:
                        await stream.send(b"x")
                        await anyio.sleep(0.05)

                group.start_soon(drip)
                received = b""
                while b"408" not in received:
                    received += await stream.receive()
                group.cancel_scope.cancel()


async def test_a_request_after_an_idle_while_has_its_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a head begins with its first byte, not with the answer before."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.6)
    async with listening() as where, await anyio.connect_tcp(*where) as stream:
        for _ in range(2):
            await stream.send(WHOLE)
            assert b"200 OK" in await stream.receive()
            await anyio.sleep(0.5)
        await stream.send(WHOLE[:9])
        await anyio.sleep(0.3)
        await stream.send(WHOLE[9:])
        assert b"200 OK" in await stream.receive()


async def test_whoever_asks_has_a_place_among_those_who_don_t() -> None:
    async with listening() as where, AsyncExitStack() as stack:
        holders = [await stack.enter_async_context(await anyio.connect_tcp(*where)) for _ in range(30)]
        for place, stream in enumerate(holders):
            try:
                await stream.send(HALF if place % 2 else WHOLE)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                continue
        for _ in range(5):
            async with await anyio.connect_tcp(*where) as stream:
                await stream.send(WHOLE)
                with anyio.fail_after(10):
                    assert b"200 OK" in await stream.receive()


async def test_who_is_at_work_keeps_the_place() -> None:
    free = anyio.Event()

    async def wait(exchange: Exchange) -> None:
        await free.wait()
        await answer(exchange)

    async with listening(wait, connections=2) as where, AsyncExitStack() as stack:
        working = [await stack.enter_async_context(await anyio.connect_tcp(*where)) for _ in range(2)]
        for stream in working:
            await stream.send(WHOLE)
        async with await anyio.connect_tcp(*where) as late:
            with anyio.fail_after(10):
                assert (await rest(late)).startswith(b"HTTP/1.1 503")
        free.set()
        for stream in working:
            with anyio.fail_after(10):
                assert b"200 OK" in await stream.receive()


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SLOW_SECONDS", 0.2)
    left = anyio.Event()

    async def talk(exchange: Exchange) -> None:
        exchange.begin(200, [])
        try:
            while True:
                # As whoever relays: it stops while the client is slow.
                if not exchange.slow:
                    exchange.write(bytes(1 << 20))
                await anyio.sleep(0.001)
        finally:
            left.set()

    async with listening(talk) as where, await anyio.connect_tcp(*where) as stream:
        await stream.send(WHOLE)
        with anyio.fail_after(10):
            await left.wait()


def test_descriptors_are_kept_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        assert spared(20_000) == 200 - KEPT_BACK
        assert spared(20_000, 3) == (200 - KEPT_BACK) // 3
        assert spared(10) == 10
        assert Server(answer, lambda _: b"", connections=20_000).limit == 200 - KEPT_BACK
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
