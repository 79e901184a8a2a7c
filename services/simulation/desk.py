"""What stands for a router in a simulated fleet: kvplane's own without a network, or a peer's selector (`peer`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import Overlay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events import types
    from kvplane.events.codec import Commit
    from kvplane.projections.fleet import FleetState
    from kvplane.services.routing.decide import Decision
    from kvplane.services.routing.holding import Hold
    from kvplane.services.routing.query import Query
    from kvplane.services.routing.roster import Column, Roster
    from kvplane.services.routing.view import View


class Desk(Protocol):
    """What stands for one router: a `Chooser` with its overlay, or a peer's selector."""

    @property
    def decisions(self) -> int:
        """How often the policy was asked."""

    @property
    def policy_failures(self) -> int:
        """Decisions that fell back to least loaded."""

    @property
    def last_failure(self) -> str:
        """What the last of them was."""

    def decide(self, query: Query, now: int) -> Decision:
        """Choose a node."""

    def hold(self, query: Query, now: int) -> Hold | None:
        """Why a request has to wait; none when it need not."""

    def ready(self, model: str, now: int) -> Sequence[str]:
        """Requests that wait and may go now."""

    def count_in(
        self, query: Query, decision: Decision, now: int, applied: int
    ) -> tuple[types.RequestRouted, types.SessionAssigned | None]:
        """Count the decision, and say what goes on the log."""

    def computed(self, request: str, now: int) -> None:
        """The first token of a request came; what passes on its answer sees that at once."""

    def observe(self, commit: Commit, time: int, now: int) -> None:
        """The fold has applied a commit."""


class Router(Chooser):
    """A router without a network."""

    def __init__(self, state: FleetState, name: str) -> None:
        self._own = Overlay()
        super().__init__(state, self._own)
        self._seen = state
        self._name = name
        self.decisions = 0

    def weigh(self, roster: Roster, query: Query, session: str, now: int) -> tuple[View, Column, str]:
        """Ask the policy, and count that."""
        self.decisions += 1
        return super().weigh(roster, query, session, now)

    def computed(self, request: str, now: int) -> None:
        """Nothing: this router passes on no answers, and learns of them from the log."""

    def observe(self, commit: Commit, time: int, now: int) -> None:
        """The fold has applied a commit."""
        self._own.observe(commit, time, self._seen, self._name, now)
