"""kvplane's own policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.routing.parameters import Parameter

if TYPE_CHECKING:
    from services.routing.view import Column, Request, View

TTFT = {
    "uncached_weight": Parameter(1.5, "times", "how much a second of own prefill counts more than one of waiting"),
    "session_seconds": Parameter(0.5, "s", "how much sooner another node must be before a session moves"),
    "decode_seconds": Parameter(0.002, "s", "how much each running request slows a prefill down"),
    "slow_share": Parameter(0.15, "share", "time to load a token from a slower tier, of the time to compute it"),
}


def ttft(view: View, request: Request, parameters: dict[str, float]) -> Column:
    """Least expected time to first token, in seconds."""
    uncached = request.tokens - view.match * request.block_size
    if view.slow is not None:
        uncached = uncached + view.slow * (request.block_size * parameters["slow_share"])
    costs: Column = (
        uncached * parameters["uncached_weight"] / view.speed + view.queue + view.active * parameters["decode_seconds"]
    )
    if view.session >= 0:
        costs[view.session] -= parameters["session_seconds"]
    return costs
