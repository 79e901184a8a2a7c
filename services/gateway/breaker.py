"""Which nodes are left out for a while because requests fail there. Pure: what happened comes in with its time.

Every gateway reads all gateways' completions on the log, so all of them learn of a node that fails. After `TRIP`
failures in a row, no success between, a node is left out for `BREAK_SECONDS`, then given requests again: a further
failure leaves it out for twice as long, at most `LONGEST_SECONDS`; a success ends it. When all nodes of a model are
left out, none is.
"""

from __future__ import annotations

from msgspec import Struct

from kvplane.services.dataplane.endings import FAILED

TRIP = 3
BREAK_SECONDS = 2.0
LONGEST_SECONDS = 60.0
NODES_LIMIT = 10_000


class _Node(Struct):
    failures: int = 0
    breaks: int = 0
    until: float = 0.0


class Breaker:
    """What is known of nodes' failures. Times in seconds of any one clock."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self.tripped = 0
        """How often a node was left out."""

    @property
    def known(self) -> bool:
        """Whether any node has failed of late."""
        return bool(self._nodes)

    def saw(self, node: str, status: str, now: float) -> None:
        """A request has ended there."""
        if status == "ok":
            self._nodes.pop(node, None)
            return
        if not status.startswith(FAILED):
            return
        known = self._nodes.get(node)
        if known is None:
            if len(self._nodes) >= NODES_LIMIT:
                self._nodes.pop(next(iter(self._nodes)))
            known = self._nodes[node] = _Node()
        known.failures += 1
        if known.failures >= TRIP and now >= known.until:
            known.until = now + min(LONGEST_SECONDS, BREAK_SECONDS * 2**known.breaks)
            known.breaks += 1
            self.tripped += 1

    def forget(self, node: str) -> None:
        """It has come, or come back: what it was says nothing."""
        self._nodes.pop(node, None)

    def left_out(self, now: float) -> list[str]:
        """Nodes that are left out now."""
        return [name for name, node in self._nodes.items() if node.until > now]
