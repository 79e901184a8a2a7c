"""Durations counted in buckets, cheap enough for every decision: a search among a few bounds and two additions."""

from __future__ import annotations

from bisect import bisect_left

MICRO = (
    10e-6,
    20e-6,
    40e-6,
    60e-6,
    80e-6,
    100e-6,
    150e-6,
    200e-6,
    400e-6,
    1e-3,
    2.5e-3,
    5e-3,
    10e-3,
    50e-3,
    250e-3,
    1.0,
)
"""Bounds in seconds for what is done in memory."""
MILLI = (0.5e-3, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds in seconds for what waits for a disk or another process."""


class Durations:
    """How many took up to each bound, and how long all took together. In seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """For each bound those that took longer than the one before it; the last has no bound."""
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def empty(self) -> Durations:
        """Nothing yet, in the same buckets."""
        return Durations(self.bounds)

    def join(self, other: Durations) -> None:
        """Count those of another, in the same buckets, as well."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
