"""Sessions: which node each conversation belongs on.

A session whose node is lost or removed keeps its entry without a node, so that its next request is known as a move.
Sessions are remembered in the order of their last use, up to a limit; the least recently used are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict

from msgspec import Struct

SESSIONS_LIMIT = 1_000_000
"""Most sessions remembered."""

Key = tuple[str, str]
"""Model and session."""


class Session(Struct):
    """Where a session belongs. `node` is empty when it has to move, from `was`; `since` is when it was assigned."""

    node: str
    since: int
    was: str = ""


class Sessions:
    """Assignments by (model, session), least recently used first."""

    def __init__(self, limit: int = SESSIONS_LIMIT) -> None:
        self._limit = limit
        # The oldest of a plain dictionary lies behind all places that became empty before.
        self._entries = OrderedDict[Key, Session]()
        self._on_node: dict[str, set[Key]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, model: str, session: str) -> Session | None:
        """The assignment of a session."""
        return self._entries.get((model, session))

    def items(self) -> list[tuple[Key, Session]]:
        """All assignments, least recently used first."""
        return list(self._entries.items())

    def on_node(self, node: str) -> int:
        """How many sessions belong on a node."""
        return len(self._on_node.get(node, ()))

    def assign(self, model: str, session: str, node: str, sequence: int) -> None:
        """Put a session on a node."""
        key = (model, session)
        self.end(model, session)
        self._entries[key] = Session(node, sequence)
        self._on_node.setdefault(node, set()).add(key)
        if len(self._entries) > self._limit:
            self.end(*next(iter(self._entries)))

    def adopt(self, entries: dict[Key, Session]) -> None:
        """Take over assignments, least recently used first, in place of those that are here."""
        self._entries, self._on_node = OrderedDict(entries), {}
        for key, entry in entries.items():
            if entry.node:
                self._on_node.setdefault(entry.node, set()).add(key)

    def touch(self, model: str, session: str) -> None:
        """Mark a session as used."""
        key = (model, session)
        if key in self._entries:
            self._entries.move_to_end(key)

    def end(self, model: str, session: str) -> bool:
        """Forget a session; whether there was one."""
        key = (model, session)
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        if entry.node:
            self._leave(key, entry.node)
        return True

    def _leave(self, key: Key, node: str) -> None:
        keys = self._on_node[node]
        keys.discard(key)
        if not keys:
            del self._on_node[node]

    def node_gone(self, node: str) -> int:
        """Take the node from all its sessions; how many there were."""
        keys = self._on_node.pop(node, set())
        for key in keys:
            entry = self._entries[key]
            entry.node, entry.was = "", node
        return len(keys)
