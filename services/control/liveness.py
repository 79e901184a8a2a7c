"""Liveness: which nodes are silent for too long, and which lost ones are heard again. Pure; time comes with each call.

A node that promised to pulse (`pulse_seconds`) is lost after `MISSED_PULSES` of its intervals, at least `LEAST_SECONDS`,
counted from when this coordinator could first have heard it: silence while the coordinator was deaf proves nothing. One
that is back by another coordinator's word while this one hears nothing shows that this one hears badly: its patience with that
node doubles, or the two would contradict each other for ever.

A lost node is back when it is heard twice, as far apart as pulses are. Pulses that waited in a buffer while this process was
stopped arrive all at once, and may be those of a node that has died since.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState
    from kvplane.services.protocol.messages import Pulse

MISSED_PULSES = 4
LEAST_SECONDS = 1.5
MOST_DOUBLED = 6


class _Heard(NamedTuple):
    """The last two pulses of one life."""

    epoch: int
    last: float
    before: float


class Liveness:
    """When each node was last heard. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.pulses: dict[str, Pulse] = {}
        """Last pulse of every node, for its gauges."""
        self._heard: dict[str, _Heard] = {}
        self._since: dict[str, tuple[int, float]] = {}
        """From when on the silence of a node counts, and in which life."""
        self._doubled: dict[str, int] = {}
        """How often a node came back of which this coordinator heard nothing."""
        self._listening_since = 0.0
        self._lost: set[str] = set()

    def listen(self, now: float) -> None:
        """Pulses can be heard from now on; whatever was missed before does not count."""
        self._listening_since = now

    def heard(self, state: FleetState, pulse: Pulse, now: float) -> None:
        """A pulse arrived. It counts only for the life that the fold knows: zombies and strangers prove nothing."""
        node = state.nodes.get(pulse.node)
        if node is not None and pulse.epoch == node.epoch:
            self.pulses[pulse.node] = pulse
            known = self._heard.get(pulse.node)
            before = known.last if known is not None and known.epoch == pulse.epoch else -inf
            self._heard[pulse.node] = _Heard(pulse.epoch, now, before)
            self._doubled.pop(pulse.node, None)
            if self._since.get(pulse.node, (0, 0.0))[0] != pulse.epoch:
                self._since[pulse.node] = (pulse.epoch, now)

    def silent(self, state: FleetState, now: float) -> list[tuple[str, float]]:
        """Nodes to be concluded lost, and for how many seconds they were silent."""
        found = []
        for name, node in state.nodes.items():
            promise = node.registered.pulse_seconds
            if node.lost is not None:
                self._lost.add(name)
            if not promise or node.lost is not None:
                continue
            last = max(self._listening_since, self._last(name, node.epoch))
            epoch, since = self._since.get(name, (0, 0.0))
            if epoch != node.epoch or name in self._lost:
                # A new life, or back by another coordinator's word: its time starts when this one sees it.
                if epoch == node.epoch and now - last >= LEAST_SECONDS:
                    self._doubled[name] = min(MOST_DOUBLED, self._doubled.get(name, 0) + 1)
                self._lost.discard(name)
                since = now
                self._since[name] = (node.epoch, now)
            quiet = now - max(last, since)
            if quiet > max(LEAST_SECONDS, MISSED_PULSES * promise) * (1 << self._doubled.get(name, 0)):
                found.append((name, quiet))
        return found

    def _last(self, name: str, epoch: int) -> float:
        known = self._heard.get(name)
        return known.last if known is not None and known.epoch == epoch else -inf

    def concluded(self, name: str) -> None:
        """The node was concluded lost: when it is seen alive next, somebody else has heard it, however soon that is."""
        self._lost.add(name)

    def back(self, state: FleetState, now: float) -> list[str]:
        """Lost nodes that pulse again, in the life in which they were lost."""
        found = []
        for name, node in state.nodes.items():
            heard = self._heard.get(name)
            if node.lost is None or heard is None or heard.epoch != node.epoch or now - heard.last >= LEAST_SECONDS:
                continue
            apart = heard.last - heard.before >= node.registered.pulse_seconds / 2
            if heard.before >= self._listening_since and apart:
                found.append(name)
        return found

    def forget(self, state: FleetState) -> None:
        """Keep nothing of nodes that have left the fleet."""
        known: dict[str, Any]
        for known in (self.pulses, self._heard, self._since, self._doubled):
            for name in [name for name in known if name not in state.nodes]:
                del known[name]
        self._lost &= state.nodes.keys()
