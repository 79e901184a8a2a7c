"""When requests come: at their own time, or a while after the answers that their session waited for (a closed loop).

A session of a closed loop sends one request at a time, as agents and people do: a fleet that answers later is asked later. Its
first request comes at its own time. A sub-agent begins after an answer of its parent's, which goes on when all of its
sub-agents have ended.
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
        self._then: dict[int, list[int]] = {}
        """Requests that wait for the answer of another one."""
        self._waits: dict[int, int] = {}
        """For how many answers a request waits."""
        self._sent: dict[str, int] = {}
        """Requests that somebody waits for, by their id."""
        self._coming: list[tuple[float, int]] = []
        last: dict[str, int] = {}
        agents: dict[str, list[str]] = {}
        for number, request in enumerate(work):
            session = request.session
            first = session not in last
            before = set()
            if request.delay is not None:
                before = {
                    last[name]
                    for name in (request.parent if first else session, *agents.pop(session, ()))
                    if name in last
                }
            for answered in before:
                self._then.setdefault(answered, []).append(number)
            if before:
                self._waits[number] = len(before)
            else:
                self._coming.append((ready + request.arrival / speedup, number))
            if session:
                last[session] = number
                if first and request.parent:
                    agents.setdefault(request.parent, []).append(session)
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
        if number in self._then:
            self._sent[request] = number

    def answered(self, request: str, now: float) -> None:
        """A request was answered, or refused: its session goes on."""
        number = self._sent.pop(request, None)
        for waiting in self._then.get(number, ()) if number is not None else ():
            self._waits[waiting] -= 1
            if not self._waits[waiting]:
                heappush(self._coming, (now + (self._work[waiting].delay or 0.0), waiting))
