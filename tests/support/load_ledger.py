"""Load on a fleet, and a ledger of what it was promised, to be found on the log afterwards.

Nothing here knows pytest: programs that run for minutes use it as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from nats.errors import Error as NatsError

from kvplane.events import codec, types
from kvplane.events.errors import LogUnavailable
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.follow import replay
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask, instances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client

    from kvplane.events.codec import Message

MODEL = "m"
PAUSE_SECONDS = 0.005


class Ledger:
    """What writers were acknowledged and what routers answered, and how long both had to wait."""

    def __init__(self, fleet: str) -> None:
        self.fleet = fleet
        self.committed: dict[int, tuple[str, int, int]] = {}
        """Sequence of an acknowledged commit, its subject, and epoch and number in it."""
        self.routed: set[str] = set()
        """Requests that a router answered."""
        self.degraded = 0
        """Answers that said so."""
        self.failed: list[str] = []
        """Requests that were not answered, and why."""
        self.stalls: dict[str, float] = {}
        """Longest wait of each writer for an acknowledgement, in seconds."""
        self.slowest = 0.0
        """Longest wait for a router's answer, in seconds."""

    async def write(self, client: Client, stop: anyio.Event, *, name: str = "ledger") -> None:
        """Commits of one writer about a node of its own, one after the other, whatever the log does."""
        epoch = await self.register(client, name, models=[f"of {name}"])
        appender = Appender(client, self.fleet, new_writer("ledger"))
        subject = f"kv.{self.fleet}.cache.{name}"
        number = 0
        while not stop.is_set():
            number += 1
            begin = anyio.current_time()
            try:
                sequence = await appender.append(subject, [types.CacheCleared(name, epoch, number)], give_up=30)
            except LogUnavailable:
                # Not promised: it may be on the log or not.
                continue
            self.stalls[name] = max(self.stalls.get(name, 0.0), anyio.current_time() - begin)
            self.committed[sequence] = (subject, epoch, number)
            await anyio.sleep(PAUSE_SECONDS)

    async def route(self, client: Client, stop: anyio.Event, *, name: str = "ledger") -> None:
        """Requests, one after the other. Each must be answered."""
        number = 0
        while not stop.is_set():
            number += 1
            request = messages.RouteRequest(
                model=MODEL, hashes=pack_hashes(range(1 + number % 7, 20)), request=f"{name}.{number}",
                session=f"{name}.{number % 5}",
            )  # fmt: skip
            begin = anyio.current_time()
            try:
                answer = await ask(client, f"kv.{self.fleet}.route", request, messages.RouteAnswer)
            except ServiceFault as error:
                self.failed.append(f"{request.request}: {error}")
                continue
            self.slowest = max(self.slowest, anyio.current_time() - begin)
            self.routed.add(answer.request)
            self.degraded += answer.degraded
            await anyio.sleep(PAUSE_SECONDS)

    async def register(self, client: Client, node: str, models: Sequence[str] = (MODEL,)) -> int:
        """Register a node that promises no heartbeats, and so is never lost; its epoch."""
        request = messages.RegisterRequest(
            node=node, address=f"kv.{self.fleet}.serve.{node}", models=list(models), block_size=16,
            capacity_blocks={"gpu": 1000}, replace=True,
        )  # fmt: skip
        answer: dict[str, int] = await ask(client, f"kv.{self.fleet}.coordinator.node.register", request)
        return answer["epoch"]

    async def check(self, client: Client, *, routers: int, coordinators: int) -> FleetState:
        """Read the log from its beginning. Raises `AssertionError` when a promise is broken; else the state it makes."""
        wanted = await self._replicas(client, routers, coordinators)
        state = FleetState(self.fleet)
        found: dict[int, str] = {}
        numbers: list[tuple[str, int, int]] = []
        at: dict[int, tuple[str, int, int]] = {}
        requests: set[str] = set()
        identities: list[str] = []

        def handle(message: Message) -> None:
            commit = state.apply(message).commit
            identities.append((message.headers or {})["Nats-Msg-Id"])
            for event in commit.events if commit is not None else codec.decode(self.fleet, message).events:
                if isinstance(event, types.CacheCleared):
                    numbers.append((message.subject, event.epoch, event.batch))
                    at[message.sequence] = numbers[-1]
                elif isinstance(event, types.RequestRouted):
                    requests.add(event.request)
            if message.sequence in wanted:
                found[message.sequence] = digest(state)

        await replay(client, self.fleet, handle)
        lost = {sequence: what for sequence, what in self.committed.items() if at.get(sequence) != what}
        assert not lost, f"acknowledged and not on the log: {lost}"
        assert len(numbers) == len(set(numbers)), "a commit is on the log twice"
        assert len(identities) == len(set(identities)), "a message id is on the log twice"
        assert not self.routed - requests, f"answered and not on the log: {sorted(self.routed - requests)[:10]}"
        for sequence, digests in wanted.items():
            assert digests == {found[sequence]}, f"states differ at sequence {sequence}"
        return state

    async def _replicas(self, client: Client, routers: int, coordinators: int) -> dict[int, set[str]]:
        """Digests of all replicas by their sequence, after routers recorded all that they answered."""
        base = f"kv.{self.fleet}"
        subjects = [f"{base}.router.{writer}.flush" for writer in await writers(client, "kvplane-router", routers)]
        coordinating = await writers(client, "kvplane-coordinator", coordinators)
        subjects += [f"{base}.coordinator.{writer}.status" for writer in coordinating]
        wanted: dict[int, set[str]] = {}
        for subject in subjects:
            status: dict[str, Any] = await ask(client, subject, messages.StatusRequest(digest=True), dict[str, Any])
            assert not status.get("unrecorded"), f"{subject} says that decisions were dropped"
            wanted.setdefault(status["sequence"], set()).add(status["digest"])
        return wanted


async def writers(client: Client, service: str, count: int, *, seconds: float = 30.0) -> list[str]:
    """Writers of a service, once so many of them answer. Raises `TimeoutError`."""
    with anyio.fail_after(seconds):
        while True:
            try:
                found = await instances(client, service, seconds=0.5, enough=count)
            except (NatsError, OSError):
                found = []
            if len(found) >= count:
                return [metadata["writer"] for metadata in found]
            await anyio.sleep(0.05)
