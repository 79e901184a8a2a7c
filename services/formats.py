"""Raising the format of the log: who reads which, and whether it can be done. `events.versions` says what a format is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from events.types import FormatRaised
from events.versions import FORMAT
from services.client import instances
from services.errors import BadRequest, Conflict
from services.placement import Proposal, propose
from services.version import package_version

if TYPE_CHECKING:
    from nats.aio.client import Client

    from projections.fleet import FleetState
    from services.api import FormatRequest

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


def raised(state: FleetState, request: FormatRequest) -> Proposal | None:
    """The commit that raises the format, or nothing when it is in force already. Raises `BadRequest`."""
    wanted = FORMAT if request.format is None else request.format
    if wanted > FORMAT:
        raise BadRequest(f"this coordinator reads formats up to {FORMAT}, not {wanted}; start coordinators that do")
    if wanted < 1:
        raise BadRequest(f"format {wanted} does not exist; formats begin at 1")
    if wanted < state.format:
        raise BadRequest(f"format {state.format} is in force; what is on the log can't go back to {wanted}")
    return propose("control", "", FormatRaised(wanted, package_version())) if wanted > state.format else None


def check_readers(found: list[dict[str, object]], wanted: int) -> None:
    """Raise `Conflict` when one of the readers would stop at the format."""
    behind = [reader for reader in found if int(str(reader["format"])) < wanted]
    if behind:
        who = ", ".join(f"{reader['writer'] or reader['service']} ({reader['kvplane']})" for reader in behind[:5])
        raise Conflict(
            f"{len(behind)} of {len(found)} readers would stop at format {wanted}: {who}; upgrade them first, or force it"
        )
