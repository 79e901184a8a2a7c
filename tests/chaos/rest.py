"""The fleet at rest: replicas, the log itself, snapshots, history and process logs, held against what was read from the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from nats.errors import Error as NatsError

from kvplane.events.errors import KvplaneError, LogUnavailable
from kvplane.events.log.follow import replay
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.projections.digest import digest
from kvplane.projections.snapshot import load
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask
from tests.chaos.world import COMMANDS

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from tests.chaos.checker import Checker
    from tests.chaos.processes import Life, Service
    from tests.chaos.world import World

REPLICAS = [name for name in COMMANDS if name.startswith(("coordinator", "router", "gateway"))]
REST_SECONDS = 90.0
"""How long the fleet may take until all of it says the same."""
NEVER = ("Traceback", "endpoint_failed", "[log_corrupt]", "this is a defect")
"""What no process may ever say."""
SERVER_NEVER = ("panic:", "fatal error:", "[FTL]")
UNABLE = (
    "no NATS server answers",
    "does not answer",
    "could not be",
    "has no log yet",
    "log_unavailable",
    "LogUnavailable",
)
"""Why a process may end before it was ever ready: it found no log, says so, and its supervisor starts it again."""


class Rest:
    """Questions to a fleet at rest. What is wrong is said to the checker."""

    def __init__(self, world: World, client: Client, checker: Checker, messages: list[Message]) -> None:
        self._world = world
        self._client = client
        self._checker = checker
        self._messages = messages
        self._scanned: dict[tuple[str, int], int] = {}
        self.could_not_start = 0
        self.errors: dict[str, int] = {}
        """Events that processes logged as errors, counted."""

    async def look(self) -> dict[str, Any]:
        """Wait until everybody is where the log ends, and compare. Gives what was compared."""
        found = await self._agreed()
        await self._log()
        snapshots = await self._snapshots()
        self.processes()
        return {"sequence": found["sequence"], "replicas": found["replicas"], "snapshots": snapshots}

    async def _ask(self, subject: str) -> dict[str, Any]:
        status: dict[str, Any] = await ask(self._client, subject, messages.StatusRequest(digest=True), seconds=5)
        return status

    async def _statuses(self) -> dict[str, dict[str, Any]]:
        base, found = f"kv.{self._world.fleet}", {}
        for name, service in self._world.services.items():
            if service.life.writer:
                role = name.split("-")[0].replace("gateway", "router")
                what = "flush" if role == "router" else "status"
                found[name] = await self._ask(f"{base}.{role}.{service.life.writer}.{what}")
        return found

    async def _agreed(self) -> dict[str, Any]:
        """Ask until all replicas and the history are at one sequence; compare their digests there."""
        checker, why = self._checker, "nothing was asked"
        try:
            with anyio.fail_after(REST_SECONDS):
                while True:
                    try:
                        found = await self._statuses()
                        history = await self._ask(f"kv.{self._world.fleet}.history.status")
                        end = (await open_stream(self._client.jetstream(), self._world.fleet)).last_seq
                        at = {name: status["sequence"] for name, status in found.items()}
                        why = f"{at}, history {history['stored']}, log {end}, reader {checker.state.sequence}"
                        same = {*at.values(), history["stored"], end, checker.state.sequence}
                        if len(same) == 1 and len(at) == len(REPLICAS):
                            past = messages.MomentRequest(at=str(end))
                            past_state: dict[str, Any] = await ask(
                                self._client, f"kv.{self._world.fleet}.history.state", past, seconds=60
                            )
                            found["historian"] = past_state
                            break
                    except (ServiceFault, KvplaneError, NatsError, OSError) as error:
                        why = repr(error)
                    await anyio.sleep(0.2)
        except TimeoutError:
            checker.say("at rest", f"replicas did not reach one sequence in {REST_SECONDS:g} s: {why}")
            return {"sequence": checker.state.sequence, "replicas": 0}
        for name, status in found.items():
            if checker.state.sequence != status["sequence"]:
                # Read on meanwhile; what it was is known if it was asked for before.
                continue
            if status["digest"] != checker.digest():
                checker.say(
                    "digests", f"{name} says {status['digest']} at {status['sequence']}, the log {checker.digest()}"
                )
            if status.get("unrecorded"):
                self._world.ledger.note("unrecorded", writer=status["writer"], events=status["unrecorded"])
        return {"sequence": end, "replicas": len(found)}

    async def _log(self) -> None:
        """The log is what was read from it before, as far as it is still there."""
        first = (await open_stream(self._client.jetstream(), self._world.fleet)).first_seq
        known = self._messages

        def same(message: Message) -> None:
            if message.sequence <= len(known) and message != known[message.sequence - 1]:
                self._checker.say("unchanged", f"message {message.sequence} is another than before")

        await replay(self._client, self._world.fleet, same, applied=max(0, first - 1))

    async def _snapshots(self) -> int:
        """Snapshot and tail give what the log gives from zero."""
        kept = await self._kept()
        last = self._checker.state.sequence
        for sequence, body in kept.items():
            state = load(self._world.fleet, body)
            for message in self._messages[sequence:last]:
                state.apply(message)
            if state.sequence == self._checker.state.sequence and digest(state) != self._checker.digest():
                self._checker.say("digests", f"snapshot {sequence} and its tail differ from the log at {last}")
        return len(kept)

    async def _kept(self) -> dict[int, bytes]:
        """All snapshots. One may be deleted while it is read, or the connection change servers: then all are read again."""
        store = SnapshotStore(self._client, self._world.fleet)
        with anyio.fail_after(REST_SECONDS):
            while True:
                try:
                    return {sequence: await store.get(sequence) for sequence in await store.sequences()}
                except LogUnavailable:
                    await anyio.sleep(0.2)

    def processes(self) -> None:
        """No process said what none may say, and none ended by itself once it was ready."""
        for service in self._world.services.values():
            for life in service.lives:
                self._life(service, life)
        for member in self._world.servers.members.values():
            self._lines(member.name, 0, member.log.read_text(errors="replace").splitlines(), SERVER_NEVER)

    def _lines(self, name: str, number: int, lines: list[str], never: tuple[str, ...]) -> list[str]:
        begin = self._scanned.get((name, number), 0)
        self._scanned[name, number] = len(lines)
        for line in lines[begin:]:
            if any(word in line for word in never):
                self._checker.say("no failure", f"{name}, life {number}: {line[:300]}")
        return lines[begin:]

    def _life(self, service: Service, life: Life) -> None:
        known = (service.name, life.number) in self._scanned
        if known and life.ended and self._scanned[service.name, life.number] < 0:
            return
        lines = life.log.read_text(errors="replace").splitlines()
        self._lines(service.name, life.number, lines, NEVER)
        if not life.ended:
            return
        self._scanned[service.name, life.number] = -1
        for entry in life.lines():
            event = str(entry.get("event", ""))
            if entry.get("level") == "error":
                self.errors[event] = self.errors.get(event, 0) + 1
            if event == "events_not_recorded":
                self._world.ledger.note("unrecorded", writer=life.writer, events=entry["events"])
        if life.ended == "by itself":
            if life.ready or not any(word in "\n".join(lines[-6:]) for word in UNABLE):
                last_lines = " / ".join(lines[-2:])[:400]
                self._checker.say("no end by itself", f"{service.name}, life {life.number}: {last_lines}")
            else:
                self.could_not_start += 1
        elif not life.ended.startswith(("killed", "stopped")) or "did not stop" in life.ended:
            self._checker.say("stops when asked", f"{service.name}, life {life.number}: {life.ended}")
