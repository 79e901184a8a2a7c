"""Liveness: which nodes are silent for too long, and which lost ones are heard again. Pure; time comes with each call.

A node that promised to heartbeat (`pulse_seconds`) is lost after `MISSED_HEARTBEATS` of its intervals, at least
`LEAST_SECONDS`, counted from when this coordinator could first have heard it: silence while the coordinator was deaf
proves nothing. One that is back by another coordinator's word while this one hears nothing shows that this one hears
badly: its patience with that node doubles, or the two would contradict each other for ever.

A lost node is back when it is heard twice, as far apart as heartbeats are. Heartbeats that waited in a buffer while this
process was stopped arrive all at once, and may be those of a node that has died since.
"""

from __future__ import annotations

from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvplane.projections.fleet import FleetState
    from kvplane.services.protocol.messages import Heartbeat

MISSED_HEARTBEATS = 4
LEAST_SECONDS = 1.5
MOST_DOUBLED = 6


class State(Enum):
    """What this coordinator takes a node for."""

    UNKNOWN = auto()
    """Nothing was seen of it yet."""
    ALIVE = auto()
    """Its silence counts."""
    LOST = auto()
    """It was lost, by whomever's word."""


class Event(Enum):
    """What is seen of a node."""

    FIRST_HEARTBEAT = auto()
    """It heartbeats, in a life of which nothing was seen."""
    HEARTBEAT = auto()
    """It heartbeats again."""
    FIRST_SEEN = auto()
    """The log has it alive, in a life of which nothing was seen."""
    SEEN = auto()
    """The log has it alive, and it was heard of late."""
    SEEN_SILENT = auto()
    """The log has it alive, and nothing was heard."""
    LOST = auto()
    """It is lost by the log, or by what this coordinator has just concluded."""


class Patience(Enum):
    """What becomes of the patience with a node that was not heard and was alive all the same."""

    KEPT = auto()
    DOUBLED = auto()
    USUAL = auto()


class Transition(NamedTuple):
    """What an event leads to."""

    state: State
    begins: bool = False
    """Its silence counts from now on: before, this coordinator could not have heard it."""
    patience: Patience = Patience.KEPT


_LOST = Transition(State.LOST)
_BEGINS = Transition(State.ALIVE, begins=True)
TRANSITIONS: Mapping[State, Mapping[Event, Transition]] = {
    State.UNKNOWN: {
        Event.FIRST_HEARTBEAT: Transition(State.ALIVE, begins=True, patience=Patience.USUAL),
        Event.FIRST_SEEN: _BEGINS,
        Event.LOST: _LOST,
    },
    State.ALIVE: {
        Event.FIRST_HEARTBEAT: Transition(State.ALIVE, begins=True, patience=Patience.USUAL),
        Event.HEARTBEAT: Transition(State.ALIVE, patience=Patience.USUAL),
        Event.FIRST_SEEN: _BEGINS,
        Event.SEEN: Transition(State.ALIVE),
        Event.SEEN_SILENT: Transition(State.ALIVE),
        Event.LOST: _LOST,
    },
    State.LOST: {
        # A heartbeat alone does not bring it back: the log must say so.
        Event.FIRST_HEARTBEAT: Transition(State.LOST, begins=True, patience=Patience.USUAL),
        Event.HEARTBEAT: Transition(State.LOST, patience=Patience.USUAL),
        Event.FIRST_SEEN: _BEGINS,
        # Back by somebody's word: its time starts when this one sees it.
        Event.SEEN: _BEGINS,
        Event.SEEN_SILENT: Transition(State.ALIVE, begins=True, patience=Patience.DOUBLED),
        Event.LOST: _LOST,
    },
}
"""What is not here can't happen."""


class Watched:
    """What one coordinator has seen of one node. Times are seconds of one clock; `-inf` is never."""

    def __init__(self) -> None:
        self.state = State.UNKNOWN
        self._life = 0
        """The epoch in which its silence counts."""
        self._since = -inf
        self._heartbeat_life = 0
        self._last = self._before = -inf
        """The last two heartbeats of that life."""
        self._doubled = 0

    def on(self, event: Event, epoch: int = 0, now: float = 0.0) -> None:
        """Take an event; those that may begin its time have an epoch and a time. Raises `KeyError` for what can't happen."""
        self.state, begins, patience = TRANSITIONS[self.state][event]
        if begins:
            self._life, self._since = epoch, now
        if patience is Patience.USUAL:
            self._doubled = 0
        elif patience is Patience.DOUBLED:
            self._doubled = min(MOST_DOUBLED, self._doubled + 1)

    def heartbeat(self, epoch: int, now: float) -> None:
        """It heartbeats, in the life that the log knows."""
        self._before = self._last_in(epoch)
        self._heartbeat_life, self._last = epoch, now
        self.on(Event.HEARTBEAT if self._life == epoch else Event.FIRST_HEARTBEAT, epoch, now)

    def unheard(self) -> None:
        """What was heard of it is no sign that it is back."""
        self._last = self._before = -inf

    def seen(self, epoch: int, now: float, listening_since: float) -> float:
        """The log has it alive in this life; for how long it is silent."""
        last = max(listening_since, self._last_in(epoch))
        seen = Event.SEEN if now - last < LEAST_SECONDS else Event.SEEN_SILENT
        self.on(seen if self._life == epoch else Event.FIRST_SEEN, epoch, now)
        return now - max(last, self._since)

    def patience(self, promise: float) -> float:
        """How long its silence is borne, if it promised to heartbeat at this interval."""
        return max(LEAST_SECONDS, MISSED_HEARTBEATS * promise) * (1 << self._doubled)

    def is_back(self, epoch: int, promise: float, now: float, listening_since: float) -> bool:
        """Whether it was heard twice in this life, of late and as far apart as heartbeats are."""
        last = self._last_in(epoch)
        apart = last - self._before >= promise / 2
        return now - last < LEAST_SECONDS and self._before >= listening_since and apart

    def _last_in(self, epoch: int) -> float:
        return self._last if self._heartbeat_life == epoch else -inf


class Liveness:
    """When each node was last heard. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.heartbeats: dict[str, Heartbeat] = {}
        """Last heartbeat of every node, for its gauges."""
        self._nodes: dict[str, Watched] = {}
        self._asleep: dict[str, int] = {}
        """Nodes that said that they sleep, and in which life."""
        self._listening_since = 0.0

    def _node(self, name: str) -> Watched:
        return self._nodes.setdefault(name, Watched())

    def state(self, name: str) -> State:
        """What a node is taken for."""
        node = self._nodes.get(name)
        return node.state if node else State.UNKNOWN

    def listen(self, now: float) -> None:
        """Heartbeats can be heard from now on; whatever was missed before does not count."""
        self._listening_since = now

    def observe(self, state: FleetState, heartbeat: Heartbeat, now: float) -> None:
        """A heartbeat arrived. It counts only for the life that the fold knows: zombies and strangers prove nothing."""
        node = state.nodes.get(heartbeat.node)
        if node is not None and heartbeat.epoch == node.epoch:
            self.heartbeats[heartbeat.node] = heartbeat
            if heartbeat.asleep:
                self._asleep[heartbeat.node] = heartbeat.epoch
                self._node(heartbeat.node).unheard()
                return
            self._asleep.pop(heartbeat.node, None)
            self._node(heartbeat.node).heartbeat(heartbeat.epoch, now)

    def asleep(self, state: FleetState) -> list[str]:
        """Nodes to be concluded lost because they said that they sleep, in the life that the fold knows."""
        return [
            name
            for name, epoch in self._asleep.items()
            if (node := state.nodes.get(name)) is not None and node.lost is None and node.epoch == epoch
        ]

    def silent(self, state: FleetState, now: float) -> list[tuple[str, float]]:
        """Nodes to be concluded lost, and for how many seconds they were silent."""
        found = []
        for name, node in state.nodes.items():
            promise = node.registered.pulse_seconds
            if node.lost is not None:
                self._node(name).on(Event.LOST)
            elif promise:
                own = self._node(name)
                quiet = own.seen(node.epoch, now, self._listening_since)
                if quiet > own.patience(promise):
                    found.append((name, quiet))
        return found

    def concluded(self, name: str) -> None:
        """The node was concluded lost: when it is seen alive next, somebody else has heard it, however soon that is."""
        self._node(name).on(Event.LOST)

    def back(self, state: FleetState, now: float) -> list[str]:
        """Lost nodes that heartbeat again, in the life in which they were lost."""
        return [
            name
            for name, node in state.nodes.items()
            if node.lost is not None
            and self._node(name).is_back(node.epoch, node.registered.pulse_seconds, now, self._listening_since)
        ]

    def forget(self, state: FleetState) -> None:
        """Keep nothing of nodes that have left the fleet."""
        known: dict[str, Any]
        for known in (self.heartbeats, self._nodes, self._asleep):
            for name in [name for name in known if name not in state.nodes]:
                del known[name]
