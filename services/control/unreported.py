"""Nodes that completed prompts and reported nothing of their caches, as the log shows it. Pure; time comes with each call.

Who has computed more new tokens of one prompt than a block holds has filled a block, and must report it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.types import NodeRegistered, NodeRemoved, RequestCompleted

if TYPE_CHECKING:
    from kvplane.events.codec import Commit
    from kvplane.projections.fleet import FleetState

PATIENCE_SECONDS = 5.0
"""How long after a completion a report of its blocks may come."""


class Unreported:
    """Which nodes keep silent about their caches. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._quiet: set[str] | None = None
        """Nodes that own their caches and have reported nothing in this life; none before the first commit was seen."""
        self._since: dict[str, float] = {}
        """When the first completion was read after which they should have."""

    def observe(self, state: FleetState, commit: Commit, now: float) -> None:
        """A commit was applied."""
        if self._quiet is None:
            nodes = state.nodes.values()
            self._quiet = {node.name for node in nodes if not node.managed and not state.caches.held(node)}
        topic = commit.place.topic
        if topic == "node":
            for event in commit.events:
                if isinstance(event, NodeRegistered) and event.cache_mode == "reported":
                    self._since.pop(event.node, None)
                    self._quiet.add(event.node)
                elif isinstance(event, NodeRegistered | NodeRemoved):
                    self._reported(event.node)
        elif not self._quiet:
            return
        elif topic == "cache":
            self._reported(commit.place.name)
        elif topic == "access":
            for event in commit.events:
                if isinstance(event, RequestCompleted) and event.node in self._quiet:
                    size = state.nodes[event.node].registered.block_size if event.node in state.nodes else 0
                    if size and event.prompt_tokens - event.cached_tokens > size:
                        self._since.setdefault(event.node, now)

    def _reported(self, node: str) -> None:
        self._since.pop(node, None)
        if self._quiet:
            self._quiet.discard(node)

    def silent(self, node: str, now: float) -> bool:
        """Whether a node should have reported something and has not."""
        return node in self._since and now - self._since[node] >= PATIENCE_SECONDS
