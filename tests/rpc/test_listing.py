"""Who is listed among the services can be asked: a list made while one starts has it with its endpoints, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from kvplane.events.log.connection import connected
from kvplane.services.protocol.messages import StatusRequest
from kvplane.services.rpc import client as rpc
from kvplane.services.rpc.client import instances
from kvplane.services.rpc.server import Endpoint, serve

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio


async def test_a_service_is_listed_when_its_endpoints_answer(server: Server, client: Client) -> None:
    answers: list[dict[str, str]] = []

    async def ask_when_listed() -> None:
        async with connected([server.url], "asker") as asker:
            while not await instances(asker, "late", seconds=0.2, enough=1, quiet=0.05):
                await anyio.lowlevel.checkpoint()
            message = await asker.request("late.one", msgspec.msgpack.encode(StatusRequest()), timeout=5)
            answers.append(msgspec.msgpack.decode(message.data))
            group.cancel_scope.cancel()

    subscribe = client.subscribe

    async def slow(*arguments: Any, **named: Any) -> Subscription:
        """A subscription that stands before the next one is asked for, as on a slow line."""
        made = await subscribe(*arguments, **named)
        await client.flush()
        await anyio.sleep(0.02)
        return made

    client.subscribe = slow  # type: ignore[method-assign]
    endpoint = Endpoint("one", "late.one", StatusRequest, lambda _: {"here": "yes"})
    async with anyio.create_task_group() as group:
        group.start_soon(ask_when_listed)
        await serve(client, group, "late", "starts slowly", [endpoint], {})
    assert answers == [{"here": "yes"}]


async def test_who_answers_nonsense_or_too_often_is_not_listed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MOST_INSTANCES", 5)
    wrong = [b"junk", b"{}", b"[]", b'{"metadata": 1}', b'{"metadata": {"writer": 2}}', b"\xff\xfe"]
    right = [b'{"metadata": {"writer": "%d"}}' % number for number in range(20)]

    async def answer(message: Msg) -> None:
        for data in (*wrong, *right):
            await message.respond(data)

    await client.subscribe("$SRV.INFO.odd", cb=answer)
    assert await instances(client, "odd", seconds=10) == [{"writer": str(number)} for number in range(5)]


async def test_heartbeats_of_a_consumer_that_is_aimed_at_the_listing_are_nothing(
    server: Server, client: Client
) -> None:
    """They have no reply subject, and may come by the thousand."""
    async with anyio.create_task_group() as group, connected([server.url], "listed") as listed:
        with capture_logs() as logged:
            await serve(listed, group, "aimed-at", "is listed", [], {})
            for verb in ("PING", "INFO", "STATS"):
                await client.publish(f"$SRV.{verb}", b"", headers={"Status": "100 Idle Heartbeat"})
                # Each has its own queue; what comes behind is answered when the heartbeat was handled.
                await client.request(f"$SRV.{verb}.aimed-at", b"", timeout=5)
                await client.request(f"$SRV.{verb}", b"", timeout=5)
        assert [entry for entry in logged if entry["log_level"] in {"warning", "error"}] == []
