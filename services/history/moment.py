"""Past states, folded in a process of their own.

A state is reached from the nearest snapshot, through rows of the history where the log has been purged, and through the log
from there on. The functions at the end are what that process is asked for. What they take and give can be pickled.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import duckdb
from msgspec import Struct, to_builtins

from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.replay import messages
from kvplane.projections.history.tables import TABLES
from kvplane.projections.overview import Picture, changes, moment
from kvplane.projections.snapshot import dump
from kvplane.services.history.snapshots import nearest
from kvplane.services.protocol.errors import BeforeHistory, ServiceFault
from kvplane.services.routing.explain import Past, refused
from kvplane.services.routing.policies import allow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvplane.events.codec import Message
    from kvplane.events.types import RequestRouted


class Way(Struct, kw_only=True):
    """How a past state is reached."""

    fleet: str
    servers: list[str]
    credentials: str | None = None
    ca: str | None = None
    snapshots: list[str]
    """Paths of snapshots that may be begun with, the nearest first."""
    rows: str = ""
    """Folder with a Parquet file a table, for commits that the log no longer has."""
    rows_last: int = 0
    """Sequence of the last commit in those files."""
    first: int = 1
    """First commit that rows or log have."""
    modules: list[str] = []
    """Modules from which policies may be taken."""


class Walk:
    """A state that moves on along the log."""

    def __init__(self, way: Way) -> None:
        self._way = way
        state = nearest([Path(path) for path in way.snapshots], way.fleet)
        self.state = state if state is not None else FleetState(way.fleet)
        if self.state.sequence + 1 < way.first:
            raise BeforeHistory(
                f"the history begins at sequence {way.first}, and no snapshot before it is left; ask for a later moment"
            )

    def to(self, sequence: int, apply: Callable[[Message], object] | None = None) -> None:
        """Apply all commits up to a sequence, with `apply` if it is not the state's own."""
        state, way = self.state, self._way
        step = apply or state.apply
        if state.sequence < min(sequence, way.rows_last):
            connection = duckdb.connect()
            for table in TABLES:
                path = Path(way.rows) / f"{table.name}.*.parquet"
                connection.read_parquet(str(path)).create_view(table.name)
            for message in messages(
                lambda query: connection.sql(query).to_arrow_table(), way.fleet, state.sequence,
                min(sequence, way.rows_last),
            ):  # fmt: skip
                step(message)
            connection.close()
        if state.sequence < sequence:
            anyio.run(self._through_log, sequence, step, backend_options={"use_uvloop": True})

    async def _through_log(self, sequence: int, step: Callable[[Message], object]) -> None:
        way = self._way
        async with connected(way.servers, "kvplane-moment", credentials=way.credentials, ca=way.ca) as client:
            await replay(client, way.fleet, step, applied=self.state.sequence, last=sequence)


@contextmanager
def walking(way: Way) -> Iterator[Walk]:
    """A walk, without the collector going over millions of long-lived objects, and nothing left behind."""
    gc.disable()
    try:
        yield Walk(way)
    finally:
        gc.enable()
        gc.collect()


def state_at(way: Way, sequence: int, node: str) -> dict[str, Any]:
    """The fleet as it was at a sequence, see `projections.overview.moment`."""
    with walking(way) as walk:
        walk.to(sequence)
        return moment(walk.state, node)


def snapshot_at(way: Way, sequence: int) -> bytes:
    """The same as a snapshot."""
    with walking(way) as walk:
        walk.to(sequence)
        return dump(walk.state)


def changes_between(way: Way, first: int, second: int) -> dict[str, Any]:
    """What changed from one sequence to another, see `projections.overview.changes`."""
    with walking(way) as walk:
        walk.to(first)
        before = Picture(walk.state)
        walk.to(second)
        return changes(before, Picture(walk.state))


def explain(way: Way, router: str, begin: int, own: list[RequestRouted]) -> dict[str, Any]:
    """The last of a router's decisions made again, see `services.routing.explain`. The log is read anew from `begin`."""
    allow(way.modules)
    with walking(way) as walk:
        walk.to(begin)
        past = Past(walk.state, router, own)
        walk.to(own[-1].applied, past.apply)
        try:
            explanation = past.explain()
        except ServiceFault as error:
            return {"candidates": [], "differences": [to_builtins(refused(error))]}
        plain: dict[str, Any] = to_builtins(explanation)
        return plain
