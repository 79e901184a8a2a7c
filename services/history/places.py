"""A few places for what runs at once, given fairly: whoever has fewest comes first, and no one has all of them.

When nothing is free for one who has none, a place is taken back: of a result that nobody has asked to go on for a while, else
of the one who has several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from kvplane.services.protocol.errors import QueryLimit

if TYPE_CHECKING:
    from collections.abc import Callable

CONCURRENT = 4
"""Queries at once."""
MOST_OF_ONE = CONCURRENT - 1
"""Those of one asker."""
PATIENCE_SECONDS = 3.0
"""How long a place is waited for."""
IDLE_SECONDS = 30.0
"""So long after its last page a result is closed."""
WANTED_SECONDS = 2.0
"""The same, and how long a query of one with several may have run, when another asker waits and has none."""
WAITING_LIMIT = 256
"""Most askers in the line."""
_LOOK_SECONDS = 0.1


class Place:
    """A place that somebody has. `end` is called when it is taken back, with the reason."""

    def __init__(self, asker: str, end: Callable[[str], None]) -> None:
        self.asker = asker
        self.end = end
        self.since = anyio.current_time()
        """Since when it works, or waits to be asked to go on."""
        self.idle = False

    def works(self) -> None:
        """It was asked for something."""
        self.since, self.idle = anyio.current_time(), False

    def waits(self) -> None:
        """It has answered, and can go on."""
        self.since, self.idle = anyio.current_time(), True


class Places:
    """The places, and who waits for one."""

    def __init__(self, concurrent: int = CONCURRENT) -> None:
        self._concurrent = concurrent
        self._most = min(MOST_OF_ONE, concurrent)
        self._taken: list[Place] = []
        self._waiting: list[tuple[Place, anyio.Event]] = []

    def _held(self, asker: str) -> int:
        return sum(place.asker == asker for place in self._taken)

    async def take(self, asker: str, end: Callable[[str], None]) -> Place:
        """A place. Raises `QueryLimit` when there is none in time."""
        if len(self._waiting) >= WAITING_LIMIT:
            raise _busy("too many wait for an answer")
        place, turn = Place(asker, end), anyio.Event()
        self._waiting.append((place, turn))
        self._admit()
        try:
            with anyio.move_on_after(PATIENCE_SECONDS):
                while not turn.is_set():
                    self._take_back(asker)
                    with anyio.move_on_after(_LOOK_SECONDS):
                        await turn.wait()
        except BaseException:
            self.give(place)
            raise
        if not turn.is_set():
            self.give(place)
            raise _busy(
                f"{self._most} of your queries run or have pages left, as many as one may have"
                if self._held(asker) >= self._most
                else "as many queries run as may at a time"
            )
        place.works()
        return place

    def give(self, place: Place) -> None:
        """Give a place to the next. Twice is once."""
        self._waiting = [each for each in self._waiting if each[0] is not place]
        if place in self._taken:
            self._taken.remove(place)
        self._admit()

    def _admit(self) -> None:
        """Let those in the line in for whom there are places: who has fewest first, then who came first."""
        while len(self._taken) < self._concurrent:
            allowed = [each for each in self._waiting if self._held(each[0].asker) < self._most]
            if not allowed:
                return
            place, turn = first = min(allowed, key=lambda each: self._held(each[0].asker))
            self._waiting.remove(first)
            self._taken.append(place)
            turn.set()

    def _take_back(self, asker: str) -> None:
        """Take a place back for one who has none, if there is one to be taken."""
        if self._held(asker) or len(self._taken) < self._concurrent:
            return
        before = anyio.current_time() - WANTED_SECONDS
        old = [place for place in self._taken if place.since < before]
        idle = [place for place in old if place.idle]
        working = [place for place in old if self._held(place.asker) > 1]
        if idle:
            self._end(
                min(idle, key=lambda place: place.since), "others waited for its place; ask again, and page on soon"
            )
        elif working:
            # The one that began last: it has done least.
            most = max(reversed(working), key=lambda place: (self._held(place.asker), place.since))
            self._end(most, "others waited, and you have several: ask again")

    def _end(self, place: Place, reason: str) -> None:
        place.end(reason)
        self.give(place)

    def close_idle(self) -> None:
        """Take back what nobody has asked to go on for long."""
        before = anyio.current_time() - IDLE_SECONDS
        for place in [place for place in self._taken if place.idle and place.since < before]:
            self._end(place, f"it ended, or nobody asked for its next page in {IDLE_SECONDS:g} s")


def _busy(why: str) -> QueryLimit:
    return QueryLimit("busy", f"{why}: ask again in a moment")
