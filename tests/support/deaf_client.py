"""A client whose read loop has ended: it hears nothing any more, and does not know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.observability.lifeline import Lifeline

if TYPE_CHECKING:
    from nats.aio.client import Client


def break_read_loop(client: Client) -> None:
    """End a client's read loop, as what it does not expect would: the causes that are known are survived."""
    assert client._reading_task is not None
    client._reading_task.cancel()


def deaf(client: Client) -> bool:
    return Lifeline(client, "test").deaf
