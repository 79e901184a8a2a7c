"""When requests come: at their own time, or a while after the answer that their session waited for (a closed loop).

A session of a closed loop sends one request at a time, as agents and people do: a fleet that answers later is asked later. Its
first request comes at its own time.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.simulation.trace import Work


class Arrivals:
    """Requests that are still to come, by their number in `work`. Times are seconds.

    `speedup` is how many times closer than recorded own times are; what a session takes between an answer and its next request
    stays as it is.
    """

    def __init__(self, work: Sequence[Work], *, ready: float, speedup: float) -> None:
        self._work = work
        self._next: dict[int, int] = {}
        """The request that comes after the answer of another one."""
        self._sent: dict[str, int] = {}
        """Requests that somebody waits for, by their id."""
        last: dict[str, int] = {}
        self._coming: list[tuple[float, int]] = []
        for number, request in enumerate(work):
            if request.delay is not None and request.session in last:
                self._next[last[request.session]] = number
            else:
                self._coming.append((ready + request.arrival / speedup, number))
            if request.delay is not None:
                last[request.session] = number
        heapify(self._coming)

    @property
    def next(self) -> float:
        """When the next request comes, as far as is known; infinite when none is."""
        return self._coming[0][0] if self._coming else math.inf

    def take(self) -> tuple[float, int]:
        """The next request: when it comes, and its number."""
        return heappop(self._coming)

    def sent(self, number: int, request: str) -> None:
        """A request was given its id."""
        if number in self._next:
            self._sent[request] = number

    def answered(self, request: str, now: float) -> None:
        """A request was answered, or refused: its session goes on."""
        number = self._sent.pop(request, None)
        if number is not None:
            after = self._next[number]
            heappush(self._coming, (now + (self._work[after].delay or 0.0), after))
