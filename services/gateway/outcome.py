"""What became of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvplane.services.gateway.usage import Usage


class Outcome(NamedTuple):
    """What became of a request; for the access log and the metrics. Times in seconds."""

    node: str
    status: int
    ending: str
    match: int
    blocks: int
    usage: Usage
    ttft: float
    between: float
    """Mean time between the pieces of a stream; 0 for any other answer."""
    duration: float
    attempts: int
    held: float = 0.0
    """How long it waited for room before."""
