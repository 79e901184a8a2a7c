"""How a node that ends in good order says so: it is gone at once, and not silent for seconds before it counts as lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from kvplane.events.errors import KvplaneError
from kvplane.events.subjects import token
from kvplane.services.protocol.messages import LeaveRequest
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from nats.aio.client import Client

LEAVE_SECONDS = 2.0
"""How long one that ends waits for a coordinator. Without an answer it is lost, as if it had been killed."""

_log = structlog.get_logger("kvplane.leaving")


async def leave(
    client: Client, fleet: str, node: str, epoch: int, reason: str, *, seconds: float = LEAVE_SECONDS
) -> bool:  # fmt: skip
    """Tell a coordinator that a node leaves, if it is still in this life; whether one has taken it. Raises nothing."""
    request = LeaveRequest(node=node, epoch=epoch, reason=reason)
    try:
        await ask(client, f"kv.{fleet}.coordinator.node.leave.{token(node)}", request, seconds=seconds)
    except KvplaneError as error:
        _log.warning(
            "leave_not_told",
            node=node,
            error=str(error),
            then="coordinators find it lost by its silence, some seconds later",
        )
        return False
    _log.info("node_left", node=node, epoch=epoch)
    return True
