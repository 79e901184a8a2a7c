"""What each client of a router has running: so that no one has all places, nor all memory, with requests that never complete.

A request that nobody completes counts for a quarter of an hour: an engine may well work on it as long. While there is room, it
does no harm. When there is none for somebody else, who has most gives up its oldest requests of which nothing was heard.
Only the router's own decisions are known here, by who asked for them (`services.rpc.asker`). What this process asks itself has
no limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.projections.load import ACTIVE_SECONDS
from kvplane.services.protocol.errors import Overloaded

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState
    from kvplane.services.routing.overlay import Overlay
    from kvplane.services.routing.roster import Roster

RUNNING_BYTES = 256 << 20
"""Most bytes of block hashes of requests that run; what comes then is recorded without its hashes."""
BYTES_OF_ONE = RUNNING_BYTES // 4
"""Those of one client."""
LEFT_SHARE = 8
"""While others ask, a client leaves them one part in so many of the places of a model's nodes (`max_active`)."""
OTHERS_SECONDS = 60.0
"""So long after its last request another client still counts as one that asks."""
UNHEARD_SECONDS = 5.0
"""A request of which nothing was heard for so long may be given up for others."""
HEARD_SECONDS = 120.0
"""The same for one whose prompt its node was heard to hold."""
CLIENTS_LIMIT = 10_000
"""Most clients of a model that are remembered; those that asked longest ago are forgotten first."""
LOOK_SECONDS = 1.0
"""Requests that ended without a word, as those of a node that is gone, are looked for no more often."""

MODELS_KNOWN = 1_000
"""Most models of which it is remembered who asks."""

_NS = 1_000_000_000
_NOW_AND_THEN = 255
_HASH_BYTES = 8


class Share:
    """What one client has running of one model: requests, and bytes of their recorded hashes."""

    __slots__ = ("bytes", "client", "count", "model")

    def __init__(self, client: str, model: str) -> None:
        self.client = client
        self.model = model
        self.count = 0
        self.bytes = 0


class Shares:
    """The requests of one router's clients. Time is unix nanoseconds and comes with each call."""

    def __init__(self, state: FleetState, overlay: Overlay) -> None:
        self._state = state
        self._overlay = overlay
        # Tuples of what the collector need not look at.
        self._held: dict[str, tuple[str, str, int, str, int]] = {}
        """Of each request, oldest first: client, model, when, the node, and bytes of its recorded hashes."""
        self._shares: dict[tuple[str, str], Share] = {}
        self._asked: dict[str, dict[str, int]] = {}
        """By model, when each client asked last, where nodes have limits; the last one last."""
        self._looked = 0
        self.given_up = 0
        """Requests that were given up for others."""

    def node_of(self, request: str) -> str:
        """Where a request that runs went; empty when it is not known here."""
        held = self._held.get(request)
        return "" if held is None else held[3]

    def count(self, client: str, model: str) -> int:
        """Requests that a client has running."""
        share = self._shares.get((client, model))
        return 0 if share is None else share.count

    def has_room(self, client: str, model: str, size: int) -> bool:
        """Whether so many bytes of hashes may be kept for a client while its request runs."""
        if self._state.load.running_bytes + size > RUNNING_BYTES:
            return not size
        share = self._shares.get((client, model))
        return share is None or share.bytes + size <= BYTES_OF_ONE or not client

    def add(self, request: str, client: str, model: str, now: int, node: str, size: int) -> None:
        """A request runs from now on, with so many bytes of recorded hashes."""
        if request in self._held:
            self.over(request)
        key = client, model
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = Share(client, model)
        share.count += 1
        share.bytes += size
        self._held[request] = (client, model, now, node, size)
        if not share.count & _NOW_AND_THEN:
            self._expire(now)

    def _expire(self, now: int) -> None:
        before = now - ACTIVE_SECONDS * _NS
        old = []
        for request, held in self._held.items():
            if held[2] >= before:
                break
            old.append(request)
        for request in old:
            self.over(request)

    def over(self, request: str) -> None:
        """A request is over."""
        held = self._held.pop(request, None)
        if held is None:
            return
        key = held[0], held[1]
        share = self._shares[key]
        share.count -= 1
        share.bytes -= held[4]
        if not share.count:
            del self._shares[key]

    def check(self, client: str, model: str, roster: Roster, now: int) -> None:
        """Raise `Overloaded` when a client has all of a model's places that it may have now. For a roster with limits."""
        if self._full(client, model, roster, now):
            raise Overloaded(
                f"you run {self.count(client, model)} requests of model {model[:80]!r}, as many as one may while others ask; "
                "complete those that ended, and try again later"
            )

    def _full(self, client: str, model: str, roster: Roster, now: int) -> bool:
        asked = self._asked.get(model)
        if asked is None:
            asked = self._asked[model] = {}
            if len(self._asked) > MODELS_KNOWN:
                del self._asked[next(iter(self._asked))]
        asked.pop(client, None)
        asked[client] = now
        if len(asked) > CLIENTS_LIMIT:
            del asked[next(iter(asked))]
        if not client or len(asked) < 2:
            return False
        most = roster.places - max(1.0, roster.places // LEFT_SHARE)
        if self.count(client, model) < most:
            return False
        other = next(name for name in reversed(asked) if name != client)
        if asked[other] < now - OTHERS_SECONDS * _NS:
            return False
        self._look(now)
        return self.count(client, model) >= most

    def surplus(self, client: str, model: str, now: int) -> list[str]:
        """Requests to be given up, since there is no place for this client and another one has more than it."""
        self._look(now)
        rivals = [share for share in self._shares.values() if share.model == model and share.client not in {"", client}]
        rival = max(rivals, key=lambda share: share.count, default=None)
        if rival is None or rival.count <= self.count(client, model) + 1:
            return []
        enough = max(1, rival.count // LEFT_SHARE)
        unheard, heard = now - UNHEARD_SECONDS * _NS, now - HEARD_SECONDS * _NS
        found: list[str] = []
        for request, (asked, of, begun, _, _) in self._held.items():
            if begun > unheard or len(found) == enough:
                break
            if (asked, of) == (rival.client, model) and (begun < heard or not self._was_heard(request)):
                found.append(request)
        self.given_up += len(found)
        return found

    def _was_heard(self, request: str) -> bool:
        """Whether the node of a request holds the end of its prompt, or is known to have computed it."""
        state = self._state
        active = state.load.running.get(request)
        node = None if active is None else state.nodes.get(active.node)
        if active is None or node is None:
            return False
        if active.hashes:
            index, last = state.caches.index(node.model), int.from_bytes(active.hashes[-_HASH_BYTES:], "little")
            return any(index.holds(slot, last) for slot in node.slots.values())
        return request not in state.load.prefills[state.load.ordinal[node.name]].waiting

    def _look(self, now: int) -> None:
        if 0 <= now - self._looked < LOOK_SECONDS * _NS:
            return
        self._looked = now
        running, pending = self._state.load.running, self._overlay.pending
        for request in [name for name in self._held if name not in running and name not in pending]:
            self.over(request)
