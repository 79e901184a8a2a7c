"""The life of an adapter's node: where it stands with fleet and engine, how the engine is, when to look again. Pure.

Time is a number of seconds on one clock and comes with each call.
"""

from __future__ import annotations

from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE_SECONDS = 10.0
"""How long an engine that is there may be too busy to answer before the node's heartbeat stops."""
SETTLE_SECONDS = 1.0
"""Looked again so long after an engine has connected: what it published before it knew of us was lost."""


class State(Enum):
    """Where a node stands."""

    JOINING = auto()
    """The fleet does not know this life of the engine yet: nothing is reported."""
    MEMBER = auto()
    """It is registered, and its cache is reported."""
    FORGOTTEN = auto()
    """The fleet has forgotten its blocks: it must register again."""
    REJOINING = auto()
    """Its next registration is on its way."""
    OVERTAKEN = auto()
    """It was forgotten while that was on its way, so that one more is needed."""
    REBORN = auto()
    """The engine has begun another life, of which the facts must be asked first."""
    ENDED = auto()
    """It is somebody else's node, or none."""


class Event(Enum):
    """What changes that."""

    ASKING = auto()
    """A registration is sent."""
    REGISTERED = auto()
    """It was answered."""
    FORGOTTEN = auto()
    """The log says that the node was lost, or is back."""
    DISOWNED = auto()
    """The log says that the node was removed, or registered by someone else."""
    RESTARTED = auto()
    """The engine has begun another life."""
    REFRESHED = auto()
    """The facts of the engine's life were asked for and answered."""


TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    # What the log says of a node in an earlier life, or under an earlier adapter, is not about this one.
    State.JOINING: {
        Event.ASKING: State.JOINING, Event.REGISTERED: State.MEMBER, Event.FORGOTTEN: State.JOINING,
        Event.DISOWNED: State.JOINING, Event.RESTARTED: State.REBORN,
    },
    State.MEMBER: {Event.FORGOTTEN: State.FORGOTTEN, Event.DISOWNED: State.ENDED, Event.RESTARTED: State.REBORN},
    State.FORGOTTEN: {
        Event.ASKING: State.REJOINING, Event.FORGOTTEN: State.FORGOTTEN, Event.DISOWNED: State.ENDED,
        Event.RESTARTED: State.REBORN,
    },
    State.REJOINING: {Event.REGISTERED: State.MEMBER, Event.FORGOTTEN: State.OVERTAKEN, Event.DISOWNED: State.ENDED},
    State.OVERTAKEN: {Event.REGISTERED: State.FORGOTTEN, Event.FORGOTTEN: State.OVERTAKEN, Event.DISOWNED: State.ENDED},
    State.REBORN: {
        Event.REFRESHED: State.JOINING, Event.FORGOTTEN: State.REBORN, Event.DISOWNED: State.REBORN,
        Event.RESTARTED: State.REBORN,
    },
    # Whatever was on its way.
    State.ENDED: {
        Event.REGISTERED: State.ENDED, Event.FORGOTTEN: State.ENDED, Event.DISOWNED: State.ENDED,
        Event.RESTARTED: State.ENDED,
    },
}  # fmt: skip
"""What is not here can't happen."""


class Life:
    """Where one node stands."""

    def __init__(self) -> None:
        self.state = State.JOINING

    def on(self, event: Event) -> State:
        """Take an event; the state that it leads to. Raises `KeyError` for one that can't happen."""
        self.state = TRANSITIONS[self.state][event]
        return self.state

    @property
    def reporting(self) -> bool:
        """Whether the cache is reported to the fleet: in an epoch that has begun, and whose engine still lives."""
        return self.state not in {State.JOINING, State.REBORN}

    @property
    def must_register(self) -> bool:
        """Whether a registration is to be sent."""
        return self.state in {State.JOINING, State.FORGOTTEN, State.REBORN}


class Health:
    """How an engine is, as far as it was asked."""

    def __init__(self) -> None:
        self.suspect = False
        """It says that it began at another time than was known: it is to be looked whether it is another life."""
        self._well_until = 0.0

    def well(self, now: float) -> bool:
        """Whether it is well. One that was may be too busy to answer for a while."""
        return now < self._well_until

    def answered(self, now: float, *, well: bool | None) -> None:
        """It was asked for its health; none when it did not answer in time."""
        if well:
            self._well_until = now + PATIENCE_SECONDS
        elif well is False:
            self.ill()

    def ill(self) -> None:
        """It is not well before it says so again."""
        self._well_until = 0.0

    def began(self, reported: str, known: str) -> None:
        """It reports when its life began; `known` is when it did. Either is empty when that is not known."""
        self.suspect |= bool(reported and known and reported != known)


class Looks:
    """When the replay buffer is to be asked whether anything was missed."""

    def __init__(self, idle_seconds: float) -> None:
        self.connections = 0
        """How many of the engine's connections were looked after."""
        self._idle_seconds = idle_seconds
        self._idle_at = 0.0
        self._settle_at = inf

    @property
    def next(self) -> float:
        """When it is due again."""
        return min(self._idle_at, self._settle_at)

    def begin(self, now: float, connections: int) -> bool:
        """A look begins; whether the engine has connected anew since the last."""
        connected = connections != self.connections
        self.connections = connections
        self._settle_at = now + SETTLE_SECONDS if connected else inf
        self._idle_at = now + self._idle_seconds
        return connected
