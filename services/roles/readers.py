"""Who reads a fleet's log, and which formats of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.rpc.client import instances

if TYPE_CHECKING:
    from nats.aio.client import Client

SERVICES = ("kvplane-coordinator", "kvplane-router", "kvplane-historian")
"""Micro services whose instances read the log."""
ANSWER_SECONDS = 0.5


async def readers(client: Client, fleet: str) -> list[dict[str, object]]:
    """All instances that read the fleet's log and answer, with the formats that they read. Raises errors of NATS."""
    return [
        {
            "service": service,
            "writer": metadata.get("writer", ""),
            "kvplane": metadata.get("kvplane", "?"),
            "format": int(metadata.get("format", "1")),
        }
        for service in SERVICES
        for metadata in await instances(client, service, seconds=ANSWER_SECONDS)
        if metadata.get("fleet") == fleet
    ]
