"""Histories that are written without a historian."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.projections.fleet import FleetState
from kvplane.projections.history.rows import Rows

if TYPE_CHECKING:
    from kvplane.events.codec import Message
    from kvplane.projections.history.store import Store


def write_history(store: Store, log: list[Message], upto: int) -> None:
    """What a historian that starts now does: fold from zero, store what is beyond the checkpoint."""
    stored = store.checkpoint.sequence
    state, rows, waiting = FleetState("f"), Rows(), store.waiting()
    for message in log[:upto]:
        applied = state.apply(message)
        if message.sequence > stored:
            rows.add(message, applied, state, waiting)
    if len(rows):
        store.write(rows, time=state.time)
