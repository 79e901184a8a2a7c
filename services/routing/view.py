"""What a policy sees of the fleet: columns, one entry a candidate.

A column is made when a policy asks for it, so that a policy pays for what it looks at. All of it comes from the fold and
the router's overlay, and so from the log: any decision can be made again from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from kvplane.projections.contexts import Context
    from kvplane.projections.fleet import FleetState
    from kvplane.services.routing.overlay import Overlay
    from kvplane.services.routing.roster import Column, Roster

EXPECTED_TURNS = 10
"""Requests that a named session is taken to have while none is known: who names one means to come back."""
TRUSTED = 8
"""So many conversations that are known weigh as much as that."""


class Request(NamedTuple):
    """What a policy may know of a request. `blocks` is the most that a match could be."""

    id: str
    tokens: int
    blocks: int
    block_size: int


class View:
    """Candidates as columns: entry i of each is candidate i. A policy must not change them."""

    __slots__ = (
        "_context",
        "_named",
        "_now",
        "_overlay",
        "_roster",
        "_speed",
        "_state",
        "_window",
        "active",
        "match",
        "session",
        "slow",
    )

    def __init__(
        self, roster: Roster, state: FleetState, overlay: Overlay, match: Column, slow: Column | None, session: int,
        now: int, context: Context | None = None, *, named: bool = False,
    ) -> None:  # fmt: skip
        self._roster = roster
        self._state = state
        self._overlay = overlay
        self._now = now
        self._context = context
        self._named = named
        self._speed: Column | None = None
        self._window = state.load.window(now)
        self.match = match
        """Leading blocks of the request that the node holds or will hold, in any tier."""
        self.slow = slow
        """Of the match, blocks that lie in a slower tier than `gpu`; none when no candidate has any."""
        self.session = session
        """Candidate where the request's session belongs, -1 when there is none."""
        self.active: Column
        """Requests that run, those on their way included."""
        if overlay.pending:
            overlay.fit(len(state.load.active))
            self.active = roster.rows(roster.columns.active) + roster.rows(overlay.columns.active)
        else:
            self.active = roster.pick(roster.columns.active)

    @property
    def names(self) -> list[str]:
        """Names of the candidates."""
        return self._roster.names

    @property
    def speed(self) -> Column:
        """Tokens per second that the node is measured to prefill."""
        # The queue asks for it as well.
        if self._speed is None:
            self._speed = self._roster.rows(self._roster.columns.pace) * self._state.load.ratio
        return self._speed

    @property
    def queue(self) -> Column:
        """Seconds until the node has computed the prompts that it has, those on their way included."""
        queue: Column = self._roster.rows(self._roster.columns.prefill_done) - self._now * 1e-9
        np.maximum(queue, self._roster.zeros, out=queue)
        if self._overlay.pending:
            queue += self._roster.rows(self._overlay.columns.tokens) / self.speed
        return queue

    @property
    def decoding(self) -> Column:
        """Requests that run and whose prompts are known to be computed."""
        return self._roster.rows(self._roster.columns.decoding)

    @property
    def pending(self) -> Column:
        """Uncached tokens of prompts that are not known to be computed."""
        return self._with(self._roster.columns.pending, self._overlay.columns.tokens)

    @property
    def blocks(self) -> Column:
        """Blocks of the requests that run."""
        return self._with(self._roster.columns.blocks, self._overlay.columns.blocks)

    @property
    def capacity(self) -> Column:
        """Blocks that the node's tier `gpu` can hold."""
        return self._roster.capacity

    @property
    def held(self) -> Column:
        """Blocks that the node's tier `gpu` holds."""
        roster = self._roster
        held = np.zeros(len(roster.nodes))
        for _, index, having, slots in roster.indexes:
            held[having] = np.array(index.counts())[slots]
        return held

    @property
    def begins(self) -> bool:
        """Whether the request goes on with no conversation that is known."""
        return self.session < 0 and self._context is None

    @property
    def room(self) -> Column:
        """Tokens that the node can hold, in all tiers."""
        return self._roster.room

    @property
    def mean_room(self) -> float:
        """Its mean."""
        return self._roster.mean_room

    @property
    def contexts(self) -> Column:
        """Tokens of the contexts of other conversations that go on at the node (`projections.contexts`)."""
        roster, own = self._roster, self._context
        at = None if own is None else roster.position.get(own.node)
        if own is None or at is None:
            return roster.rows(roster.contexts)
        contexts = roster.pick(roster.contexts)
        contexts[at] -= own.tokens
        return contexts

    @property
    def turns(self) -> float:
        """Requests that a conversation has had, in the mean of those that go on; expected ones while few are known."""
        contexts = self._state.load.contexts
        turns, known = contexts.turns, len(contexts)
        if self._named:
            turns, known = turns + EXPECTED_TURNS * TRUSTED, known + TRUSTED
        return turns / known if known else 1.0

    @property
    def arrivals(self) -> float:
        """Requests per second and node that were routed of late, in the whole fleet."""
        load = self._state.load
        return load.routed_recently / (self._window * max(1, len(load.ordinal)))

    @property
    def recent_requests(self) -> Column:
        """Requests per second that were routed here of late (`projections.load.WINDOW_SECONDS`)."""
        return self._recent(self._roster.columns.recent_requests)

    @property
    def recent_tokens(self) -> Column:
        """Tokens of those, per second."""
        return self._recent(self._roster.columns.recent_tokens)

    @property
    def recent_uncached(self) -> Column:
        """Uncached tokens of those, per second."""
        return self._recent(self._roster.columns.recent_uncached)

    def _with(self, column: Column, own: Column) -> Column:
        found: Column = self._roster.rows(column).astype(np.float64)
        if self._overlay.pending:
            found += self._roster.rows(own)
        return found

    def _recent(self, column: Column) -> Column:
        rate: Column = self._roster.rows(column) / self._window
        return rate
