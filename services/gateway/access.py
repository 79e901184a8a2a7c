"""What a gateway tells of its requests: a line of JSON each, and figures for metrics."""

from __future__ import annotations

import sys
import time
from typing import IO, TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvplane.services.gateway.forward import Told
    from kvplane.services.http.server import Exchange


class AccessLog:
    """Writes a line a request to `stream`, or nothing without one."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream

    def write(
        self, exchange: Exchange, request: str, model: str, told: Told | None, traceparent: str, seconds: float
    ) -> None:
        """Write a request's line. Times in seconds."""
        if self.stream is None:
            return
        line: dict[str, object] = {
            "time": time.time(), "request": request, "peer": exchange.peer, "path": exchange.request.path.decode("latin-1"),
            "model": model, "status": exchange.status or 499, "seconds": round(seconds, 6),
        }  # fmt: skip
        if told is not None:
            line |= {
                "node": told.node, "ending": told.ending, "matched_blocks": told.match, "blocks": told.blocks,
                "prompt_tokens": told.usage.prompt, "cached_tokens": told.usage.cached, "output_tokens": told.usage.output,
                "ttft": round(told.ttft, 6), "attempts": told.attempts,
            }  # fmt: skip
        if traceparent:
            line["traceparent"] = traceparent
        self.stream.write(msgspec.json.encode(line).decode() + "\n")
        if self.stream is sys.stderr:
            self.stream.flush()
