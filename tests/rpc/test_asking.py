"""Who asks a service and is not answered: what may be asked again is, and what changes something is asked once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoAnswer
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

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


async def test_where_nobody_is_a_question_ends_at_once(client: Client) -> None:
    with anyio.fail_after(1), pytest.raises(NoAnswer, match="`kvplane up` starts a coordinator"):
        await ask(client, "kv.asking.coordinator.node.list", messages.ListRequest(), seconds=10)
