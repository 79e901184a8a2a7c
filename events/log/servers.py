"""One client, several servers: to notice that an answer was lost with a server, and to leave one that is about to stop."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import anyio
from nats.errors import Error as NatsError

from kvplane.events.errors import ConnectionLost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats.aio.client import Client
    from nats.aio.msg import Msg

SPREAD_SECONDS = 1.5
"""Clients leave a server that is about to stop within this time, not all at once."""
ANSWERING_SECONDS = 1.0
"""How long a client that leaves a server goes on answering what had arrived."""
LOOK_SECONDS = 0.001

_waiting: WeakKeyDictionary[Client, set[anyio.CancelScope]] = WeakKeyDictionary()


async def request(
    client: Client, subject: str, body: bytes, *, seconds: float, headers: Mapping[str, str] | None = None
) -> Msg:  # fmt: skip
    """`client.request` that does not wait for an answer which can't come any more.

    Raises `ConnectionLost` as soon as the connection is replaced while it waits, and errors of NATS.
    """
    waiting = _waiting.setdefault(client, set())
    with anyio.CancelScope() as scope:
        waiting.add(scope)
        try:
            return await client.request(subject, body, timeout=seconds, headers=dict(headers) if headers else None)
        finally:
            waiting.discard(scope)
    raise ConnectionLost(f"the connection was lost before {subject} was answered; ask again")


def lost(client: Client) -> None:
    """The connection is gone: end what waits for an answer on it."""
    for scope in _waiting.get(client, ()):
        scope.cancel()


def in_cluster(client: Client) -> bool:
    """Whether the server says that it is one of several."""
    return bool(client._server_info.get("cluster"))  # noqa: SLF001 - there is no other way to its INFO


async def move(client: Client) -> None:
    """Leave a server that is about to stop, before it closes the connection, and with everything answered that arrived."""
    await anyio.sleep(random.uniform(0, SPREAD_SECONDS))  # noqa: S311 - no secret
    shared = [(number, each) for number, each in client._subs.items() if each.queue]  # noqa: SLF001 - no other way in
    with suppress(NatsError, OSError, TimeoutError):
        # Others of the queue group take over now; the client subscribes again where it connects next.
        for number, _ in shared:
            await client._send_unsubscribe(number)  # noqa: SLF001 - `unsubscribe` would forget the subscription
        await client.flush()
        with anyio.move_on_after(ANSWERING_SECONDS):
            while any(each.pending_msgs for _, each in shared):  # noqa: ASYNC110 - nats-py has no event for it
                await anyio.sleep(LOOK_SECONDS)
        await client.flush()
    await client.force_reconnect()
