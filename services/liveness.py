"""Liveness: which nodes are silent for too long, and which lost ones are heard again. Pure; time comes with each call.

A node that promised to pulse (`pulse_seconds`) is lost after `MISSED_PULSES` of its intervals, at least `LEAST_SECONDS`,
counted from when this coordinator could first have heard it: silence while the coordinator was deaf proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from projections.fleet import FleetState
    from services.api import Pulse

MISSED_PULSES = 4
LEAST_SECONDS = 1.5


class Liveness:
    """When each node was last heard. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.pulses: dict[str, Pulse] = {}
        """Last pulse of every node, for its gauges."""
        self._heard: dict[str, tuple[int, float]] = {}
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
            self._heard[pulse.node] = (pulse.epoch, now)

    def silent(self, state: FleetState, now: float) -> list[tuple[str, float]]:
        """Nodes to be concluded lost, and for how many seconds they were silent."""
        found = []
        for name, node in state.nodes.items():
            promise = node.registered.pulse_seconds
            if node.lost is not None:
                self._lost.add(name)
            if not promise or node.lost is not None:
                continue
            epoch, last = self._heard.get(name, (0, 0.0))
            if epoch != node.epoch or name in self._lost:
                # A new life, or back by another coordinator's word: its time starts when this one sees it.
                self._lost.discard(name)
                last = now
                self._heard[name] = (node.epoch, now)
            quiet = now - max(last, self._listening_since)
            if quiet > max(LEAST_SECONDS, MISSED_PULSES * promise):
                found.append((name, quiet))
        return found

    def back(self, state: FleetState, now: float) -> list[str]:
        """Lost nodes that pulse again, in the life in which they were lost."""
        found = []
        for name, node in state.nodes.items():
            if node.lost is None or name not in self.pulses:
                continue
            epoch, last = self._heard.get(name, (0, 0.0))
            if epoch == node.epoch and now - last < LEAST_SECONDS:
                found.append(name)
        return found

    def forget(self, state: FleetState) -> None:
        """Keep nothing of nodes that have left the fleet."""
        for known in (self.pulses, self._heard):
            for name in [name for name in known if name not in state.nodes]:
                del known[name]
        self._lost &= state.nodes.keys()
