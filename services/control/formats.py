"""Raising the format of the log, and whether it can be done. `events.versions` says what a format is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.types import FormatRaised
from kvplane.events.versions import FORMAT
from kvplane.services.control.commands import Proposal, propose
from kvplane.services.protocol.errors import BadRequest, Conflict

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState
    from kvplane.services.protocol.messages import FormatRequest


def raised(state: FleetState, request: FormatRequest, *, kvplane: str) -> Proposal | None:
    """The commit by which this kvplane raises the format, or nothing when it is in force. Raises `BadRequest`."""
    wanted = FORMAT if request.format is None else request.format
    if wanted > FORMAT:
        raise BadRequest(f"this coordinator reads formats up to {FORMAT}, not {wanted}; start coordinators that do")
    if wanted < 1:
        raise BadRequest(f"format {wanted} does not exist; formats begin at 1")
    if wanted < state.format:
        raise BadRequest(f"format {state.format} is in force; what is on the log can't go back to {wanted}")
    return propose("control", "", FormatRaised(wanted, kvplane)) if wanted > state.format else None


def check_readers(found: list[dict[str, object]], wanted: int) -> None:
    """Raise `Conflict` when one of the readers would stop at the format."""
    behind = [reader for reader in found if int(str(reader["format"])) < wanted]
    if behind:
        who = ", ".join(f"{reader['writer'] or reader['service']} ({reader['kvplane']})" for reader in behind[:5])
        raise Conflict(
            f"{len(behind)} of {len(found)} readers would stop at format {wanted}: {who}; upgrade them first, or force it"
        )
