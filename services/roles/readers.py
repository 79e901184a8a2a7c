"""Who reads a fleet's log, and which formats of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from kvplane.services.rpc.client import instances

if TYPE_CHECKING:
    from nats.aio.client import Client

SERVICES = ("kvplane-coordinator", "kvplane-router", "kvplane-historian")
"""Micro services whose instances read the log."""
ANSWER_SECONDS = 1.5
"""How long readers have to answer before a format is raised over their heads."""
QUIET_SECONDS = 0.25
"""Who looks at a healthy fleet has all answers in milliseconds, and waits so long for one more."""


async def readers(
    client: Client, fleet: str, *, seconds: float = ANSWER_SECONDS, quiet: float | None = None
) -> list[dict[str, object]]:
    """All instances that read the fleet's log and answer in `seconds`, with the formats that they read. Raises errors of NATS.

    With `quiet` a reader that is slow, because it is stopped or overloaded, may be missing.
    """
    answers: dict[str, list[dict[str, str]]] = {}

    async def ask(service: str) -> None:
        answers[service] = await instances(client, service, seconds=seconds, quiet=quiet)

    async with anyio.create_task_group() as group:
        for service in SERVICES:
            group.start_soon(ask, service)
    return [
        {
            "service": service,
            "writer": metadata.get("writer", ""),
            "kvplane": metadata.get("kvplane", "?"),
            "format": int(metadata.get("format", "1")),
        }
        for service in SERVICES
        for metadata in answers[service]
        if metadata.get("fleet") == fleet
    ]
