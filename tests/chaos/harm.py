"""What hostile members do to the others: how long an honest route takes, how much memory everybody has, what is left behind.

The members and the witness are processes of their own; this starts them, watches, and says to the checker what must not be.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from tests.chaos.hostile import EVIL
from tests.chaos.processes import ROOT
from tests.chaos.world import MODEL
from tests.support.fork_server import open_program
from tests.support.three_servers import monitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from kvplane.services.auth.roles import Role
    from tests.chaos.checker import Checker
    from tests.chaos.world import World
    from tests.support.fork_server import AsyncProgram

ATTACKERS: tuple[Role, ...] = ("node", "client", "historian")
TIMES_SLOWER = 5
"""An honest route may take so many times as long as usual, by the 99th of a hundred."""
LEAST_SECONDS = 0.02
"""What took less is as good as nothing on a machine where everybody shares two cores."""
MOST_BYTES = 1 << 30
"""Memory of one process; ten times what a fleet of this size needs."""
USUAL_SECONDS = 15.0
LEFT_SECONDS = 30.0
"""How long after their keys are revoked until nothing of hostile members is left."""
LOOK_SECONDS = 0.25
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Phase(NamedTuple):
    """A time in which honest routes are measured."""

    begin: float
    end: float


class Harm:
    """Hostile members of one world."""

    def __init__(self, world: World, checker: Checker, seed: int, roles: Sequence[Role] = ATTACKERS) -> None:
        self._world = world
        self._checker = checker
        self._seed = seed
        self._roles = roles
        self._round = 0
        self._file = world.folder / "witness.txt"
        self._usual: Phase | None = None
        self._attacked: list[Phase] = []
        self._seeds: dict[Role, Path] = {}
        self.most_bytes: dict[str, int] = {}
        """Largest size of each process while hostile members were there."""
        self.killed = 0
        """Processes that were killed because they had outgrown the bound, so that the machine goes on."""
        self.left: dict[str, Any] = {}

    @asynccontextmanager
    async def _program(self, module: str, *words: str, seed: Path, log: Path) -> AsyncIterator[AsyncProgram]:
        world = self._world
        assert world.held is not None
        servers = [part for url in world.urls("harness") for part in ("--server", url)]
        who = ["--fleet", world.fleet, "--credentials", str(seed), "--ca", str(world.held.ca)]
        with log.open("ab") as out:
            process = await open_program(
                [sys.executable, "-m", module, *words, *servers, *who], cwd=ROOT, stdin=DEVNULL, stdout=out, stderr=STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            with anyio.CancelScope(shield=True):
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                await process.wait()

    @asynccontextmanager
    async def witnessed(self) -> AsyncIterator[None]:
        """A witness and a watch for the length of a block, with a usual time to begin with."""
        assert self._world.held is not None
        seed = self._world.held.seed_file(self._world.fleet, "client")
        words = ("--model", MODEL, "--out", str(self._file))
        async with (
            self._program("tests.chaos.witness", *words, seed=seed, log=self._world.folder / "witness.log"),
            anyio.create_task_group() as group,
        ):
            group.start_soon(self._watch)
            for role in self._roles:
                self._seeds[role] = self._world.let_in(role, EVIL)
            yield
            group.cancel_scope.cancel()

    async def usual(self) -> None:
        """Measure what is usual."""
        begin = time.monotonic()
        await anyio.sleep(USUAL_SECONDS)
        self._usual = Phase(begin, time.monotonic())

    @asynccontextmanager
    async def attacking(self, *, measured: bool) -> AsyncIterator[None]:
        """Hostile members for the length of a block; with `measured`, honest routes must be nearly as fast as usual."""
        self._round += 1
        async with anyio.create_task_group() as group:
            for role in self._roles:
                await group.start(self._attack, role)
            begin = time.monotonic()
            yield
            if measured:
                self._attacked.append(Phase(begin, time.monotonic()))
            group.cancel_scope.cancel()

    async def _attack(self, role: Role, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """One member, started again when it has died of its own deeds."""
        folder, number = self._world.folder, 0
        task_status.started()
        while True:
            number += 1
            seed = self._seed * 1000 + self._round * 10 + number
            words = (role, "--seed", str(seed), "--out", str(folder / f"hostile-{role}-{self._round}-{number}.json"))
            log = folder / f"hostile-{role}.log"
            async with self._program("tests.chaos.hostile", *words, seed=self._seeds[role], log=log) as process:
                await process.wait()
            await anyio.sleep(1)

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for name, service in self._world.services.items():
            if service.runs and service.process is not None:
                yield name, _bytes(service.process.pid)
        for member in self._world.servers.members.values():
            if member.runs and member.process is not None:
                yield member.name, _bytes(member.process.pid)

    async def _watch(self) -> None:
        while True:
            await self.look()
            await anyio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Look at everybody's memory; what has outgrown the bound is killed, so that the machine goes on."""
        for name, size in list(self._sizes()):
            self.most_bytes[name] = max(self.most_bytes.get(name, 0), size)
            if size > MOST_BYTES:
                self._checker.say("memory", f"{name} has {size >> 20:,} MiB, the bound is {MOST_BYTES >> 20:,} MiB")
                self.killed += 1
                if name in self._world.services:
                    await self._world.services[name].end(signal.SIGKILL)
                    await self._world.services[name].start()
                else:
                    await self._world.servers.kill(name)
                    await self._world.servers.begin(name)

    def times(self) -> dict[str, Any]:
        """How long honest routes took; says so when that is too long."""
        asked = [
            tuple(map(float, line.split())) for line in self._file.read_text().splitlines() if line.count(" ") == 1
        ]

        def within(phases: Sequence[Phase]) -> list[float]:
            return sorted(took for at, took in asked if any(phase.begin <= at < phase.end for phase in phases))

        usual, attacked = within([self._usual] if self._usual else []), within(self._attacked)
        before, under = _quantiles(usual), _quantiles(attacked)
        found = {
            "usual": before, "attacked": under, "most_bytes": self.most_bytes, "killed": self.killed,
            "left": self.left, "moves": self._moves(),
            "beside": self._beside([each for each in asked if any(one.begin <= each[0] < one.end for one in self._attacked)]),
        }  # fmt: skip
        idle = [role for role in self._roles if not any(self._world.folder.glob(f"hostile-{role}-*.json"))]
        if idle:
            self._checker.say("attacked", f"hostile members of role {', '.join(idle)} did nothing")
        if usual and attacked:
            most = TIMES_SLOWER * max(LEAST_SECONDS, before["p99"])
            if under["p99"] > most:
                p99 = under["p99"]
                self._checker.say(
                    "others' routes", f"99 of 100 took up to {p99:.3f} s under attack, {most:.3f} s is the bound"
                )
        else:
            self._checker.say("others' routes", f"{len(usual)} were measured before and {len(attacked)} under attack")
        return found

    def _moves(self) -> dict[str, int]:
        """What hostile members did, by move."""
        found: dict[str, int] = {}
        for report in self._reports():
            for move, count in report["done"].items():
                found[move] = found.get(move, 0) + count
        return dict(sorted(found.items()))

    def _beside(self, asked: Sequence[tuple[float, ...]]) -> dict[str, dict[str, float]]:
        """How long these honest routes took beside each move, slowest first; other moves ran at the same time."""
        phases: dict[str, list[Phase]] = {}
        for report in self._reports():
            for move, begin, end in report["times"]:
                phases.setdefault(move, []).append(Phase(begin, end))
        found = {
            move: _quantiles(
                sorted(took for at, took in asked if any(at < each.end and at + took > each.begin for each in many))
            )
            for move, many in phases.items()
        }
        return dict(sorted(found.items(), key=lambda item: -item[1].get("p99", 0)))

    def _reports(self) -> Iterator[dict[str, Any]]:
        for file in self._world.folder.glob("hostile-*.json"):
            with suppress(ValueError):
                yield json.loads(file.read_text())

    async def revoke(self) -> None:
        """Revoke all their keys; nothing that is theirs may be there after a while."""
        world = self._world
        assert world.held is not None
        keys = [user.key for user in world.held.users if user.name == EVIL]
        for role in self._roles:
            world.held.remove(world.fleet, role, EVIL)
        world.held.save()
        world.servers.reload()
        give_up = anyio.current_time() + LEFT_SECONDS
        while anyio.current_time() < give_up:
            self.left = await self._left(keys)
            if not any(self.left.values()):
                return
            await anyio.sleep(LOOK_SECONDS)
        for what, names in self.left.items():
            if names:
                self._checker.say(
                    "nothing left", f"{len(names)} {what} of members that were revoked, such as {names[0]}"
                )

    async def _left(self, keys: Sequence[str]) -> dict[str, list[str]]:
        connections, consumers = [], []
        for member in self._world.servers.running:
            seen = await monitor(member, "connz?auth=true&limit=4096")
            connections += [each["authorized_user"] for each in seen.get("connections", [])
                            if each.get("authorized_user") in keys]  # fmt: skip
            jetstream = await monitor(member, "jsz?streams=true&consumers=true&limit=4096")
            for account in jetstream.get("account_details", []):
                for stream in account.get("stream_detail", []):
                    consumers += [
                        f"{stream['name']}/{each['name']}"
                        for each in stream.get("consumer_detail") or []
                        if EVIL in each["name"]
                    ]
        return {"connections": connections, "consumers": sorted(set(consumers))}


def _bytes(pid: int) -> int:
    """Memory that a process has, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def _quantiles(times: Sequence[float]) -> dict[str, float]:
    if not times:
        return {"count": 0}
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "count": len(times),
        **{name: round(times[int(part * (len(times) - 1))], 4) for name, part in places.items()},
        "max": round(times[-1], 4),
    }
