"""A fleet in which something has happened: every part of its state has something to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from kvplane.events import codec, types
from kvplane.events.log.stream import open_stream
from kvplane.services.protocol import messages

if TYPE_CHECKING:
    from nats.aio.client import Client

    from tests.support.fleet import Fleet

from typing import TYPE_CHECKING

import anyio.lowlevel

from kvplane.events.hashing import pack_hashes

if TYPE_CHECKING:
    from nats.aio.client import Client


async def live(fleet: Fleet, count: int = 3) -> None:
    """Managed nodes, placements, sessions, a lost node: something to know."""
    for number in range(count):
        await fleet.ask("coordinator.node.register", registration(f"n{number}"))
    for number in range(40):
        admit = messages.AdmitRequest(
            model="m", hashes=pack_hashes(range(number * 4, number * 4 + 6)), node=f"n{number % count}"
        )
        await fleet.ask("coordinator.cache.admit", admit)
        route = messages.RouteRequest(
            model="m", hashes=pack_hashes([number * 4, number * 4 + 1]), session=f"s{number % 7}"
        )
        answer = await fleet.ask("route", route, messages.RouteAnswer)
        if number % 2:
            await fleet.ask("complete", messages.CompleteRequest(request=answer.request, node=answer.node))


def registration(node: str) -> messages.RegisterRequest:
    return messages.RegisterRequest(
        node=node, address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 64}, cache_mode="managed"
    )


async def write_commits(client: Client, count: int, fleet: str = "default") -> None:
    """So many commits, and return when they are stored."""
    body = codec.encode([types.RequestCompleted("nobody", "n0")])
    last = (await open_stream(client.jetstream(), fleet)).last_seq + count
    for _ in range(count):
        await client.publish(f"kv.{fleet}.access.test", body)
    with anyio.fail_after(60):
        while (await open_stream(client.jetstream(), fleet)).last_seq < last:
            await anyio.sleep(0.02)
