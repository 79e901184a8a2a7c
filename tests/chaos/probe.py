"""How long writers and routers stand still: one commit after the other, and one question after the other by every server."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio

from kvplane.events import types
from kvplane.events.errors import LogError
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask
from tests.chaos.load import OWN, Noted

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from tests.chaos.world import World

EVERY_SECONDS = 0.05
AFTER_SECONDS = 12.0
"""So long after a leader was killed a stall is put down to it."""
ROUTE_SECONDS = 0.5


class Probe:
    """Times of what was acknowledged and answered."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.resting = False
        """Nothing is written while everybody is to come to one sequence."""
        self._rested: list[float] = []
        self.written: list[float] = []
        self.routed: list[float] = []

    async def run(self, *, task_status: TaskStatus[anyio.CancelScope] = anyio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled; started, it gives the scope that ends it."""
        async with anyio.create_task_group() as group:
            task_status.started(group.cancel_scope)
            group.start_soon(self._write)
            for url in self._world.urls("harness"):
                group.start_soon(self._route, url)

    async def _write(self) -> None:
        async with self._world.client("probe") as client:
            appender = Noted(client, self._world.fleet, self._world.ledger)
            subject = f"kv.{self._world.fleet}.cache.probe"
            batch = 0
            while True:
                if self.resting:
                    self._rested.append(self._world.ledger.now)
                    await anyio.sleep(EVERY_SECONDS)
                    continue
                batch += 1
                with suppress(LogError):
                    await appender.put(subject, [types.CacheCleared("probe", 1, batch)], give_up=120)
                    self.written.append(self._world.ledger.now)
                await anyio.sleep(EVERY_SECONDS)

    async def _route(self, url: str) -> None:
        """Ask by one server only: which of them is gone must not decide whether routers are."""
        request = messages.RouteRequest(model=OWN, tokens=[1, 2, 3], dry_run=True)
        async with self._world.client("probe", url) as client:
            while True:
                try:
                    await ask(client, f"kv.{self._world.fleet}.route", request, seconds=ROUTE_SECONDS)
                except ServiceFault as error:
                    if error.code in {"unknown_model", "no_node", "overloaded"}:
                        self.routed.append(self._world.ledger.now)
                else:
                    self.routed.append(self._world.ledger.now)
                await anyio.sleep(EVERY_SECONDS)

    def stalls(self) -> dict[str, Any]:
        """Longest stall after each kill of a leader, of writers and of routers, in seconds."""
        ledger = self._world.ledger
        among = [
            fault["began"]
            for fault in ledger.of("fault")
            if fault["what"] == "kill" and fault["leader"] and len(fault["on"]) == 1
        ]
        alone = [drill["began"] for drill in ledger.of("drill")]
        self.routed.sort()
        return {
            what: {
                "leader_kills": len(kills),
                "writers": _summed([_longest(sorted([*self.written, *self._rested]), at) for at in kills]),
                "routers": _summed([_longest(self.routed, at) for at in kills]),
            }
            for what, kills in (("alone", alone), ("among_other_faults", among))
        }


def _longest(times: list[float], at: float) -> float:
    """Longest time without anything, of those that overlap the moments after a kill."""
    longest = 0.0
    for before, after in pairwise(times):
        if after > at and before < at + AFTER_SECONDS:
            longest = max(longest, after - before)
    return longest


def _summed(stalls: list[float]) -> dict[str, float]:
    if not stalls:
        return {"max": 0.0, "median": 0.0}
    return {"max": round(max(stalls), 2), "median": round(median(stalls), 2)}
