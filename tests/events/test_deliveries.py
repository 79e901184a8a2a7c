"""What comes to the inbox of a consumer: its own deliveries are believed, and nothing is published where others want it."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from kvplane.events import types
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.deliveries import SLICE_SECONDS
from kvplane.events.log.follow import Follower
from kvplane.events.log.stream import open_stream
from tests.support.purging import consumer_of, purging
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

NODE = "kv.default.node.a"


async def test_a_follower_publishes_to_its_own_flow_control_only(server: Server, client: Client) -> None:
    await open_stream(client.jetstream(), "default", create=True)
    appender = Appender(client, "default", new_writer("test"))
    for number in range(5):
        await appender.append(NODE, [types.NodeCordoned("a", str(number))])
    handled: list[int] = []
    follower = Follower(client, "default", lambda message: handled.append(message.sequence))
    async with anyio.create_task_group() as group, connected([server.url], "stranger") as stranger:
        group.start_soon(follower.run)
        await follower.caught_up.wait()
        await purging(stranger, "KV_default")
        state = (await client.jetstream().stream_info("KV_default")).state
        assert (state.messages, state.first_seq) == (5, 1)
        await appender.append(NODE, [types.NodeCordoned("a", "last")])
        while len(handled) < 6:
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    assert (handled, follower.restarts) == ([1, 2, 3, 4, 5, 6], 0)


async def test_a_consumer_of_another_stream_with_the_same_name_is_a_strangers(server: Server, client: Client) -> None:
    for fleet in ("default", "other"):
        await open_stream(client.jetstream(), fleet, create=True)
    handled: list[bytes] = []
    follower = Follower(client, "default", lambda message: handled.append(message.body))
    async with anyio.create_task_group() as group, connected([server.url], "stranger") as stranger:
        group.start_soon(follower.run)
        await follower.caught_up.wait()
        info = await consumer_of(stranger, "KV_default")
        js = stranger.jetstream()
        await js.publish("kv.other.node.a", b"forged")
        info.config.opt_start_seq = 1
        await js.add_consumer("KV_other", info.config)
        ends = await js.consumer_info("KV_other", info.name)
        while not (ends.delivered and ends.delivered.stream_seq == 1):
            ends = await js.consumer_info("KV_other", info.name)
        await Appender(client, "default", new_writer("test")).append(NODE, [types.NodeCordoned("a", "")])
        while not handled:
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    assert b"forged" not in handled
    assert follower.restarts == 0


async def test_a_flood_leaves_turns_to_others(client: Client) -> None:
    """What waits in the client is handed on in one go otherwise, and whoever is asked meanwhile answers nobody."""
    await open_stream(client.jetstream(), "default", create=True)
    appender = Appender(client, "default", new_writer("test"))
    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(appender.append, f"kv.default.node.n{number}", [types.NodeCordoned("a", "x" * 500)])
    turns, at_turn = 0, list[int]()

    async def other() -> None:
        nonlocal turns
        while len(at_turn) < 60:
            turns += 1
            await anyio.lowlevel.checkpoint()

    def slow(_: Message) -> None:
        at_turn.append(turns)
        begin = time.perf_counter()
        while time.perf_counter() - begin < 2 * SLICE_SECONDS:
            pass

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        follower = Follower(client, "default", slow)
        group.start_soon(follower.run)
        await follower.caught_up.wait()
        group.cancel_scope.cancel()
    # As many as a request needs from its arrival until its answer is sent.
    assert min(after - before for before, after in pairwise(at_turn)) >= 3


@pytest.mark.parametrize("apart", [True, False])
async def test_a_follower_apart_leaves_the_connection_to_requests(client: Client, *, apart: bool) -> None:
    await open_stream(client.jetstream(), "default", create=True)
    for number in range(20):
        await client.publish("kv.default.node.a", bytes([number]) * 50_000)
    read: list[int] = []
    before = client.stats["in_bytes"]
    follower = Follower(client, "default", lambda message: read.append(len(message.body)), apart=apart)
    async with anyio.create_task_group() as group:
        group.start_soon(follower.run)
        await until(lambda: len(read) == 20)
        group.cancel_scope.cancel()
    assert (client.stats["in_bytes"] - before < sum(read)) == apart
    assert client.is_connected
