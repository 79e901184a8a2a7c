"""Who asks a service and is not answered: what may be asked again is, and what changes something is asked once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.protocol import messages, signs
from kvplane.services.protocol.errors import NoAnswer, Refused
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.server import Endpoint, serve

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio


async def _deaf_to_the_first(client: Client, subject: str) -> list[bytes]:
    """Answer on a subject as a service does whose like was killed with the first request; the requests that came."""
    received: list[bytes] = []

    async def hear(message: Msg) -> None:
        received.append(message.data)
        if len(received) > 1:
            await message.respond(msgspec.msgpack.encode({"received": len(received)}))

    await client.subscribe(subject, cb=hear)
    await client.flush()
    return received


@pytest.mark.parametrize(
    ("endpoint", "request_"),
    [
        ("coordinator.node.list", messages.ListRequest(model="m")),
        ("coordinator.cache.lookup", messages.LookupRequest(model="m", hashes=bytes(8))),
        ("coordinator.format.show", messages.StatusRequest()),
        ("router.r.status", messages.StatusRequest()),
        ("route", messages.RouteRequest(model="m", hashes=bytes(8))),
    ],
)
async def test_what_is_read_from_memory_is_asked_again(
    client: Client, endpoint: str, request_: msgspec.Struct
) -> None:  # fmt: skip
    received = await _deaf_to_the_first(client, f"kv.asking.{endpoint}")
    assert await ask(client, f"kv.asking.{endpoint}", request_, seconds=10) == {"received": 2}
    assert received[0] == received[1]


@pytest.mark.parametrize(
    ("endpoint", "request_"),
    [
        ("coordinator.node.cordon", messages.NodeRequest(node="n")),
        ("coordinator.snapshot", messages.StatusRequest()),
        ("coordinator.status", messages.StatusRequest(digest=True)),
        ("serve.status", messages.ServeRequest(request="r", hashes=b"", tokens=1)),
        ("complete", messages.CompleteRequest(request="r", node="status")),
    ],
)
async def test_what_changes_something_or_takes_long_is_asked_once(
    client: Client, endpoint: str, request_: msgspec.Struct
) -> None:
    received = await _deaf_to_the_first(client, f"kv.asking.{endpoint}")
    with pytest.raises(NoAnswer, match=rf"no answer on kv\.asking\.{endpoint} in 1\.6 s"):
        await ask(client, f"kv.asking.{endpoint}", request_, seconds=1.6)
    assert len(received) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "SIGN_SECONDS", 0.05)
    monkeypatch.setattr(signs, "SILENT_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
async def test_one_that_dies_with_a_long_question_is_not_waited_for(server: Server, client: Client) -> None:
    began = anyio.Event()

    async def work(_: messages.StatusRequest) -> None:
        began.set()
        await anyio.sleep_forever()

    endpoint = Endpoint("snapshot", "kv.asking.coordinator.snapshot", messages.StatusRequest, work, concurrent=True)
    async with anyio.create_task_group() as group:

        async def die() -> None:
            async with connected([server.url], "dying") as dying, anyio.create_task_group() as working:
                await serve(dying, working, "dying", "", [endpoint], {})
                serving.set()
                await began.wait()
                working.cancel_scope.cancel()

        serving = anyio.Event()
        group.start_soon(die)
        await serving.wait()
        with anyio.fail_after(20), pytest.raises(NoAnswer, match="no sign of life for 0.5 s"):
            await ask(client, endpoint.subject, messages.StatusRequest(), seconds=600)


@pytest.mark.usefixtures("impatient")
async def test_one_that_works_on_is_waited_for(client: Client) -> None:
    async def work(request: messages.StatusRequest) -> dict[str, bool]:
        await anyio.sleep(1.2)
        return {"digest": request.digest}

    async with anyio.create_task_group() as group:
        endpoint = Endpoint("slow", "kv.asking.slow", messages.StatusRequest, work, concurrent=True)
        await serve(client, group, "slow", "", [endpoint], {})
        assert await ask(client, "kv.asking.slow", messages.StatusRequest(digest=True), seconds=600) == {"digest": True}
        with pytest.raises(Refused, match="unknown field"):
            await ask(client, "kv.asking.slow", messages.ListRequest(model="m"), seconds=600)
        group.cancel_scope.cancel()


async def test_an_older_one_gives_no_signs_and_is_waited_for(client: Client) -> None:
    async def older(message: Msg) -> None:
        await message.respond(msgspec.msgpack.encode({"format": 1}))

    await client.subscribe("kv.asking.older", cb=older)
    assert await ask(client, "kv.asking.older", messages.StatusRequest(), seconds=600) == {"format": 1}
    with anyio.fail_after(10), pytest.raises(NoAnswer, match="no service answers on kv.asking.nobody"):
        await ask(client, "kv.asking.nobody", messages.StatusRequest(), seconds=600)


async def test_where_nobody_is_a_question_ends_at_once(client: Client) -> None:
    with anyio.fail_after(1), pytest.raises(NoAnswer, match="`kvplane up` starts a coordinator"):
        await ask(client, "kv.asking.coordinator.node.list", messages.ListRequest(), seconds=10)
