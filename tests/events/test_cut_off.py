"""A server that was cut off from the others leads an old copy of the log until it notices: it is not believed at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events import types
from kvplane.events.errors import LogUnavailable
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import Follower
from kvplane.events.log.stream import open_stream
from tests.chaos.network import Proxies
from tests.chaos.world import Servers
from tests.support.three_servers import NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

pytestmark = [
    pytest.mark.anyio,
    # nats-py forgets a connection on which a stopped server never said a word.
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
]

NAME = "cut"
SUBJECT = f"kv.{NAME}.cache.a"


async def cut_leader(servers: Servers, net: Proxies) -> tuple[str, list[str]]:
    """Cut the server that leads the log from the others; its name, and theirs."""
    await servers.settled()
    old = None
    with anyio.fail_after(30):
        while old is None:
            old = await servers.leader(NAME)
    others = [name for name in NAMES if name != old]
    for other in others:
        await net.cut(old, other)
        await net.cut(other, old)
    return old, others


async def last_reported_end(client: Client) -> int:
    """Where the log ends by a server that is about to notice that it is alone; the last thing it says, 0 for nothing."""
    end = 0
    with anyio.move_on_after(10):
        while True:
            try:
                end = (await open_stream(client.jetstream(timeout=1), NAME)).last_seq
            except LogUnavailable:
                break
            await anyio.sleep(0.2)
    return end


async def behind_is_not_believed(servers: Servers, net: Proxies) -> bool:
    """Follow by a leader that was cut off; whether it did say that the log is shorter, or nothing was attacked."""
    read: list[int] = []
    old, others = await cut_leader(servers, net)
    behind = connected([servers.members[old].url], "behind")
    ahead = connected([servers.members[name].url for name in others], "ahead")
    async with behind as here, ahead as there, anyio.create_task_group() as group:
        appender = Appender(there, NAME, new_writer("test"))
        last = await appender.append(SUBJECT, [types.CacheCleared("a", 1, 2)], give_up=60)
        follower = Follower(here, NAME, lambda message: read.append(message.sequence), applied=last)
        group.start_soon(follower.run)
        reported = await last_reported_end(here)
        await net.mend()
        following = await appender.append(SUBJECT, [types.CacheCleared("a", 1, 3)], give_up=60)
        with anyio.fail_after(40):
            while not read:
                await anyio.sleep(0.1)
        assert read == [following]
        group.cancel_scope.cancel()
    return reported == last - 1


async def test_a_leader_that_was_cut_off_is_no_shorter_log(tmp_path: Path) -> None:
    net = Proxies()
    async with anyio.create_task_group() as group:
        await net.open(NAMES, [], group)
        servers = Servers(tmp_path, net, NAMES)
        try:
            await servers.start(*NAMES)
            async with connected(servers.urls, "test") as client:
                await open_stream(client.jetstream(), NAME, replicas=3, create=True)
                await Appender(client, NAME, new_writer("test")).append(SUBJECT, [types.CacheCleared("a", 1, 1)])
            # Mostly the others have a new leader before the old one notices; not always.
            for _ in range(4):
                if await behind_is_not_believed(servers, net):
                    break
            else:
                pytest.fail("the old leader always gave up first: nothing was attacked")
        finally:
            await servers.stop()
            group.cancel_scope.cancel()
