"""What the log says of a node, asked of a coordinator: an adapter may not read the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvplane.services.protocol.messages import NodeRequest, Piece
from kvplane.services.protocol.remembered import Remembered
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.pieces import whole

if TYPE_CHECKING:
    from nats.aio.client import Client


async def remembered(client: Client, subject: str, node: str) -> Remembered | None:
    """Ask a coordinator what the log says of a node; none when it knows of no cache. Raises `ServiceFault`."""
    first = await ask(client, subject, NodeRequest(node=node), Piece)
    return msgspec.msgpack.decode(
        await whole(client, subject.split(".")[1], "coordinator", first), type=Remembered | None
    )
