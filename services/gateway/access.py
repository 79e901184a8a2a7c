"""What a gateway records of its requests: a line of JSON each, and figures for metrics."""

from __future__ import annotations

import time
from typing import IO, TYPE_CHECKING

import msgspec
import structlog

from kvplane.services.process.terminal import json_text

if TYPE_CHECKING:
    from kvplane.services.gateway.outcome import Outcome
    from kvplane.services.http.server import Exchange


_log = structlog.get_logger("kvplane.gateway")


class AccessLog:
    """Writes a line a request to `stream`, or nothing without one."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream

    def write(
        self, exchange: Exchange, request: str, model: str, outcome: Outcome | None, traceparent: str, seconds: float,
        *, tenant: str = "",
    ) -> None:  # fmt: skip
        """Write a request's line. Times in seconds."""
        if self.stream is None:
            return
        line: dict[str, object] = {
            "time": time.time(), "request": request, "peer": exchange.peer, "path": exchange.request.path.decode("latin-1"),
            "model": model, "status": exchange.status or 499, "seconds": round(seconds, 6),
        }  # fmt: skip
        if tenant:
            line["tenant"] = tenant
        if outcome is not None:
            line |= {
                "node": outcome.node, "ending": outcome.ending, "matched_blocks": outcome.match, "blocks": outcome.blocks,
                "prompt_tokens": outcome.usage.prompt, "cached_tokens": outcome.usage.cached,
                "output_tokens": outcome.usage.output,
                "ttft": round(outcome.ttft, 6), "attempts": outcome.attempts,
            }  # fmt: skip
            if outcome.held:
                line["held"] = round(outcome.held, 6)
        if traceparent:
            line["traceparent"] = traceparent
        try:
            # Whole lines, also when several processes write to one pipe.
            self.stream.write(json_text(msgspec.json.encode(line)) + "\n")
            self.stream.flush()
        except OSError as error:
            self.stream = None
            _log.error("access_log_ended", error=str(error))
