"""Plays a schedule on a world: each fault at its time, for its length, beside the others."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import anyio

from tests.chaos.world import STUTTER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.chaos.faults import Fault
    from tests.chaos.world import World

DRILL_SECONDS = 12.0


class Play:
    """One round of faults."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._number = number
        self._busy: set[str] = set()

    async def run(self, faults: Sequence[Fault]) -> None:
        """Play all of them; return when the last one is over."""
        begin = anyio.current_time()
        async with anyio.create_task_group() as group:
            for fault in faults:
                await anyio.sleep(max(0.0, begin + fault.at - anyio.current_time()))
                group.start_soon(self._one, fault)

    async def drill(self) -> None:
        """Kill the leader and nothing else, so that what stands still stands still for it alone."""
        world = self._world
        leader, begin = await world.leader(), world.ledger.now
        await world.servers.kill(leader)
        await anyio.sleep(DRILL_SECONDS)
        await world.servers.begin(leader)
        await world.servers.settled()
        world.ledger.note("drill", on=[leader], began=begin)
        await anyio.sleep(DRILL_SECONDS / 3)

    async def _one(self, fault: Fault) -> None:
        world = self._world
        targets = [fault.target]
        if fault.target == "leader":
            targets = [await world.leader()]
        elif fault.target == "two":
            first = await world.leader()
            targets = [first, next(name for name in (*world.names, first) if name != first or len(world.names) == 1)]
        elif fault.target == "all":
            targets = list(world.names)
        targets = list(dict.fromkeys(targets))
        # A process that is attacked already is left to that; what is drawn for it is not played.
        if not self._busy.isdisjoint(targets):
            return
        leads = [name for name in targets if name in world.names] and await world.leader() in targets
        self._busy.update(targets)
        begin = world.ledger.now
        try:
            await self._play(fault, targets)
        finally:
            self._busy.difference_update(targets)
            world.ledger.note(
                "fault", what=fault.what, target=fault.target, on=targets, leader=bool(leads), seconds=fault.seconds,
                round=self._number, began=begin,
            )  # fmt: skip

    async def _play(self, fault: Fault, targets: Sequence[str]) -> None:
        match fault.what:
            case "kill" | "restart" | "lame duck":
                await self._end(fault, targets)
            case "pause":
                await self._pause(targets[0], fault.seconds)
            case "stutter":
                await self._stutter(targets[0], fault.seconds)
            case "cut from servers" | "deaf to servers" | "mute to servers" | "cut from all" | "cut from one":
                await self._cut(fault, targets[0])
            case _:
                raise ValueError(fault.what)

    async def _end(self, fault: Fault, targets: Sequence[str]) -> None:
        servers = self._world.servers
        if targets[0] in self._world.names:
            end: Callable[..., object] = {
                "kill": servers.kill, "restart": servers.terminate, "lame duck": servers.lame_duck,
            }[fault.what]  # fmt: skip
            await end(*targets)  # type: ignore[misc]
            await anyio.sleep(fault.seconds)
            await servers.begin(*targets)
            return
        service = self._world.services[targets[0]]
        await service.end(signal.SIGKILL if fault.what == "kill" else signal.SIGTERM)
        await anyio.sleep(fault.seconds)
        await service.start()

    async def _pause(self, name: str, seconds: float) -> None:
        if name in self._world.names:
            self._world.servers.pause(name)
            await anyio.sleep(seconds)
            self._world.servers.resume(name)
        else:
            self._world.services[name].pause()
            await anyio.sleep(seconds)
            self._world.services[name].resume()

    async def _stutter(self, name: str, seconds: float) -> None:
        """Slow: it runs and stands still by turns, which delays all that it does."""
        ends = anyio.current_time() + seconds
        while anyio.current_time() < ends:
            await self._pause(name, STUTTER[1])
            await anyio.sleep(STUTTER[0])

    async def _cut(self, fault: Fault, name: str) -> None:
        world = self._world
        others = [server for server in world.names if server != name]
        if fault.what == "cut from one":
            others = others[: 1 + len(others) // 3]
        pairs = []
        if not fault.what.startswith("deaf"):
            pairs += [(name, other) for other in others]
        if not fault.what.startswith("mute"):
            pairs += [(other, name) for other in others]
        if fault.what == "cut from all":
            services = list(world.services)
            pairs += [(service, name) for service in services] + [(name, service) for service in services]
        for pair in pairs:
            await world.net.cut(*pair)
        await anyio.sleep(fault.seconds)
        for pair in pairs:
            await world.net.restore(*pair)
