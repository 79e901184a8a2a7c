"""Counts and times of requests that went through a gateway."""

from __future__ import annotations

from kvplane.events.durations import MICRO, MILLI, Durations

OUTCOMES = ("ok", "failed", "ended", "no_node", "not_continued")
"""What becomes of streams that break off: a further leg was whole, or broke off too; nothing was missing but the end; no other
node could be had; it was not to be continued."""


class Measured:
    """Counts and times of one gateway since its start."""

    def __init__(self) -> None:
        self.open = 0
        self.unauthorized = 0
        """Requests without a key where one is asked for, or with a wrong one."""
        self.requests: dict[str, int] = {}
        """By how they ended: `ok`, `cancelled`, `refused`, `failed`."""
        self.sources: dict[str, int] = {}
        """By where the prompt's tokens come from."""
        self.retries = 0
        self.migrations = 0
        """Requests that another node answered than the first that was chosen."""
        self.legs: dict[str, int] = {}
        """Streams that broke off, by `OUTCOMES`."""
        self.queued = 0
        """Requests at engines whose answers have not begun."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.ttft = Durations(MILLI)
        self.between = Durations(MICRO)
        """Mean time between the pieces of a stream."""
        self.duration = Durations(MILLI)

    def leg(self, outcome: str) -> None:
        """A stream broke off, or a further leg of it has ended."""
        self.legs[outcome] = self.legs.get(outcome, 0) + 1

    def ended(self, ending: str, source: str, seconds: float) -> None:
        """A request has ended, `seconds` after it had come."""
        self.requests[ending] = self.requests.get(ending, 0) + 1
        if source:
            self.sources[source] = self.sources.get(source, 0) + 1
        self.duration.add(seconds)

    def answered(self, prompt: int, cached: int, output: int, ttft: float, between: float, attempts: int) -> None:
        """An engine has answered. Tokens are -1 where it does not say; `between` is the mean time between a stream's pieces."""
        self.retries += max(0, attempts - 1)
        self.migrations += attempts > 1 and ttft > 0
        self.prompt_tokens += max(0, prompt)
        self.cached_tokens += max(0, cached)
        self.output_tokens += max(0, output)
        if ttft:
            self.ttft.add(ttft)
        if between:
            self.between.add(between)
