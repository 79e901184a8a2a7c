"""One run: rounds of faults under load, each followed by rest and a check of everything so far."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import anyio
from msgspec import Struct

from kvplane.events.log.follow import Follower, single
from kvplane.events.log.stream import open_stream
from kvplane.services.auth.roles import Role  # noqa: TC001 - fields of a Struct
from tests.chaos.checker import SHOWN, Checker
from tests.chaos.faults import schedule
from tests.chaos.harm import Harm
from tests.chaos.ledger import Ledger
from tests.chaos.load import Load
from tests.chaos.play import Play
from tests.chaos.probe import Probe
from tests.chaos.rest import Rest
from tests.chaos.world import FLEET, world_in
from tests.support import log_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from tests.chaos.world import World

ROUND_SECONDS = 120.0
"""Faults of one round; about half as long again goes by until all is at rest and checked."""
DRAIN_SECONDS = 90.0


class Settings(Struct, frozen=True, kw_only=True):
    """What a run is to be."""

    seed: int
    minutes: float
    servers: int = 3
    cuts: str = "auto"
    round_seconds: float = ROUND_SECONDS
    drills: int = 0
    hostile: tuple[Role, ...] = ()
    """Members of these roles, with valid credentials, do their worst; every other round nothing else is done."""


class Run:
    """The state of a run."""

    def __init__(self, folder: Path, settings: Settings, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.checker = Checker(FLEET, strangers=bool(settings.hostile))
        self.messages: list[Message] = []
        self.rests: list[float] = []
        self.rounds: list[dict[str, Any]] = []
        self.schedules: list[list[str]] = []
        self.violations: list[dict[str, str]] = []
        self.harm: Harm | None = None
        self._say = say

    def _read(self, message: Message) -> None:
        self.messages.append(message)
        self.checker.feed(message)

    async def go(self) -> dict[str, Any]:
        """Run all rounds; the report."""
        begin = time.time()
        settings = self.settings
        deadline = anyio.current_time() + settings.minutes * 60
        try:
            async with world_in(
                self.folder, self.ledger, servers=settings.servers, cuts=settings.cuts, guarded=bool(settings.hostile)
            ) as world:
                self._say(
                    f"seed {settings.seed}, {len(world.names)} servers, cuts by {world.net.kind}, in {self.folder}"
                )
                load, probe = Load(world, settings.seed), Probe(world)
                async with (
                    world.client("checker") as client,
                    anyio.create_task_group() as group,
                ):
                    follower = Follower(client, FLEET, self._read)
                    group.start_soon(follower.run)
                    probing = await group.start(probe.run)
                    rest = Rest(world, client, self.checker, self.messages)
                    if settings.drills:
                        self._say(f"the leader is killed {settings.drills} times, and nothing else")
                        async with load.on():
                            for _ in range(settings.drills):
                                await Play(world, -1).drill()
                    if settings.hostile:
                        self.harm = Harm(world, self.checker, settings.seed, settings.hostile)
                    async with self.harm.witnessed() if self.harm is not None else nullcontext():
                        if self.harm is not None:
                            async with load.on():
                                await self.harm.usual()
                        number = 0
                        while not number or anyio.current_time() + 15 < deadline:
                            try:
                                await self._round(world, load, probe, rest, client, number)
                            except (TimeoutError, BaseExceptionGroup) as error:
                                if self.harm is None or not _timed_out(error):
                                    raise
                                # What hostile members did keeps the fleet from coming to rest, and would for ever.
                                self.checker.say("at rest", f"round {number} did not end")
                                break
                            number += 1
                        if self.harm is not None:
                            await self.harm.revoke()
                    # What it wrote last has to be read, too.
                    probing.cancel()
                    await self._reached(client)
                    group.cancel_scope.cancel()
                servers = world.net.kind
        except BaseExceptionGroup as errors:
            self._keep()
            raise single(errors) from None
        finally:
            self.ledger.close()
        self._keep()
        rest.processes()
        hostile = self.harm.times() if self.harm is not None else None
        self._judge()
        report = self._report(begin, load, probe, rest, servers)
        return report if hostile is None else {**report, "hostile": hostile}

    async def _round(
        self, world: World, load: Load, probe: Probe, rest: Rest, client: Client, number: int
    ) -> None:  # fmt: skip
        # The same in every run with these settings: a schedule is drawn for its length.
        seconds = min(self.settings.round_seconds, self.settings.minutes * 40)
        faults = schedule(self.settings.seed, number, seconds, world.ground)
        alone = self.harm is not None and not number % 2
        if alone:
            # How long others' routes take is measured when nothing else slows them.
            faults = []
        lines = [fault.line() for fault in faults]
        self.schedules.append(lines)
        self._say(f"round {number}: {len(faults)} faults in {seconds:.0f} s")
        for line in lines:
            self._say(f"  {line}")
        (self.folder / f"schedule-{number}.txt").write_text("\n".join(lines) + "\n")
        with anyio.fail_after(seconds * 2 + DRAIN_SECONDS * 3):
            async with load.on():
                async with self.harm.attacking(measured=alone) if self.harm is not None else nullcontext():
                    await Play(world, number).run(faults)
                    if alone:
                        await anyio.sleep(seconds)
                over = self.ledger.now
                await world.restore()
            probe.resting = True
            # A writer that never gives up may be the last to be done.
            await self._reached(client)
            looked = await rest.look()
            probe.resting = False
        self.rests.append(round(self.ledger.now - over, 2))
        self.rounds.append({**looked, "rest_seconds": self.rests[-1]})
        before = len(self.violations)
        self._judge()
        self._say(f"  at rest after {self.rests[-1]:.1f} s, {looked}, {len(self.violations) - before} violations")

    async def _reached(self, client: Client) -> None:
        """The reader has read what is on the log now."""
        end = (await open_stream(client.jetstream(), FLEET)).last_seq
        with anyio.move_on_after(DRAIN_SECONDS):
            while self.checker.state.sequence < end:
                await anyio.sleep(0.05)
            return
        self.checker.say("at rest", f"the reader is at {self.checker.state.sequence}, the log at {end}")

    def _judge(self) -> None:
        known = {(each["rule"], each["detail"]) for each in self.violations}
        for violation in self.checker.judge(self.ledger):
            if tuple(violation) not in known:
                known.add(tuple(violation))  # type: ignore[arg-type]
                self.violations.append(violation._asdict())
                if len(self.violations) <= SHOWN:
                    self._say(f"  VIOLATION of {violation.rule!r}: {violation.detail}")

    def _keep(self) -> None:
        """Keep the log as it was read, so that a failure can be judged again."""
        log_file.write(self.folder / "log.jsonl", self.messages)

    def _report(self, begin: float, load: Load, probe: Probe, rest: Rest, cuts: str) -> dict[str, Any]:
        of = self.ledger.of
        lost = [each for each in self.violations if each["rule"] == "nothing lost"]
        routed = of("routed")
        report = {
            "seed": self.settings.seed,
            "asked_minutes": self.settings.minutes,
            "round_seconds": self.settings.round_seconds,
            "minutes": round((time.time() - begin) / 60, 1),
            "servers": self.settings.servers,
            "cuts": cuts,
            "begun": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(begin)),
            "commits": len(self.messages),
            "tried": len(of("tried")),
            "acknowledged": len(of("acked")),
            "acknowledged_events": sum(
                {entry["writer"]: entry["events"] for entry in of("flushed")}.values()
            ),
            "answers": len(of("answered")),
            "routes": len(routed),
            "degraded": sum(entry["degraded"] for entry in routed),
            "gateway_answers": dict(Counter(entry["outcome"] for entry in of("got")).most_common()),
            "unrecorded": sum(entry["request"] not in self.checker.decisions for entry in routed),
            "lost": len(lost),
            "faults": dict(Counter(entry["what"] for entry in of("fault")).most_common()),
            "ended": dict(Counter(entry["how"] for entry in of("end")).most_common()),
            "could_not_start": rest.could_not_start,
            "skipped": self.checker.state.skipped,
            "logged_errors": rest.errors,
            "stalls": probe.stalls(),
            "rest_seconds": self.rests,
            "rounds": self.rounds,
            "load": dict(sorted(load.counts.items())),
            "violations": self.violations,
            "schedules": self.schedules,
        }  # fmt: skip
        (self.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        return report


def _timed_out(error: BaseException) -> bool:
    """Whether an error is nothing but time that ran out."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_timed_out, error.exceptions))
    return isinstance(error, TimeoutError)
