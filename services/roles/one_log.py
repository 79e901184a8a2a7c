"""A fleet has one log. Where servers keep streams of their own (leaf nodes with a JetStream domain), a second is soon made."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from nats.errors import Error as NatsError

from kvplane.events.errors import LogMissing, TwoLogs
from kvplane.events.log.stream import open_stream, stream_info
from kvplane.services.rpc.client import instances

if TYPE_CHECKING:
    from nats.aio.client import Client

SERVICE = "kvplane-coordinator"
LIST_SECONDS = 1.0
QUIET_SECONDS = 0.25
"""So long after the last answer nobody else is waited for."""


async def created(client: Client, fleet: str, replicas: int) -> float:
    """Create the fleet's log if there is none; when it was created in unix seconds, which differs between two logs.

    Raises `TwoLogs` when there is none here and somebody coordinates the fleet elsewhere, and as `open_stream`.
    """
    js = client.jetstream()
    if not await _there(client, fleet):
        others = await _others(client, fleet)
        # One that started at the same time may have created it meanwhile.
        if others and not await _there(client, fleet):
            raise TwoLogs(
                f"coordinator {', '.join(others[:3])} of fleet {fleet!r} answers and so has a log, and this server has none: a "
                "server with a JetStream domain of its own, such as a leaf node, does not see it. Connect to the server that "
                "has it (--server), or choose another --fleet; if that log was deleted, stop those coordinators first"
            )
    await open_stream(js, fleet, replicas=replicas, create=True)
    time = (await stream_info(js, fleet)).created
    return time.timestamp() if time is not None else 0.0


async def _there(client: Client, fleet: str) -> bool:
    with suppress(LogMissing):
        await stream_info(client.jetstream(), fleet)
        return True
    return False


async def _others(client: Client, fleet: str) -> list[str]:
    """Coordinators of the fleet that answer."""
    with suppress(NatsError, OSError, TimeoutError):
        found = await instances(client, SERVICE, seconds=LIST_SECONDS, quiet=QUIET_SECONDS)
        return [each.get("writer", "") for each in found if each.get("fleet") == fleet]
    return []
