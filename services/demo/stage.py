"""What the steps of the demonstration share: connections, the log as it grows, and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from kvplane.events import codec, types
from kvplane.events.log.follow import Follower, replay
from kvplane.events.types import Event
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused, StepFailed
from kvplane.services.protocol.status import ReplicaStatus
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec
    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.projections.skips import Applied
    from kvplane.services.demo.fleet import Fleet
    from kvplane.services.demo.traffic import Traffic

SETTLE_SECONDS = 0.1
"""Time for both routers to read what was just seen on the log."""

E = TypeVar("E", bound=Event)
T = TypeVar("T")


class Stage:
    """The fleet on show. `events` are all events of its log so far, with sequences."""

    def __init__(self, client: Client, fleet: Fleet, traffic: Traffic, block_size: int) -> None:
        self.client = client
        self.fleet = fleet
        self.traffic = traffic
        self.block_size = block_size
        self.state = FleetState(fleet.name)
        self.events: list[tuple[int, Event]] = []
        self.follower = Follower(client, fleet.name, self._handle)
        self._advanced = anyio.Event()

    def _handle(self, message: Message) -> None:
        applied: Applied = self.state.apply(message)
        if applied.commit is not None:
            self.events += [(message.sequence, event) for event in applied.commit.events]
        self._advanced.set()
        self._advanced = anyio.Event()

    async def seen(
        self, kind: type[E], where: Callable[[E], bool] = lambda _: True, *, after: int = 0, seconds: float = 10
    ) -> tuple[int, E]:
        """Wait for an event on the log, and give it with its sequence. Raises `StepFailed`."""
        with anyio.move_on_after(seconds):
            at = 0
            while True:
                while at < len(self.events):
                    sequence, event = self.events[at]
                    at += 1
                    if sequence > after and isinstance(event, kind) and where(event):
                        return sequence, event
                await self._advanced.wait()
        raise StepFailed(f"no {kind.__name__} came on the log in {seconds:g} s")

    async def reached(self, sequence: int, *, seconds: float = 10) -> None:
        """Wait until a sequence was read. Raises `StepFailed`."""
        with anyio.move_on_after(seconds):
            while self.state.sequence < sequence:
                await self._advanced.wait()
            return
        raise StepFailed(f"sequence {sequence} was not read in {seconds:g} s")

    async def settled(self, request: str) -> None:
        """Wait until a request's end is on the log, and every router has had the time to read it."""
        await self.seen(types.RequestCompleted, lambda event: event.request == request)
        await anyio.sleep(SETTLE_SECONDS)

    async def ask(self, subject: str, request: msgspec.Struct, form: type[T] | None = None) -> T:
        """Ask any endpoint."""
        return await ask(self.client, subject, request, form)

    async def command(self, endpoint: str, request: msgspec.Struct) -> dict[str, Any]:
        """Ask the coordinator."""
        answer: dict[str, Any] = await ask(self.client, f"kv.{self.fleet.name}.coordinator.{endpoint}", request)
        return answer

    async def refused(self, endpoint: str, request: msgspec.Struct) -> Refused:
        """Ask the coordinator for what it must refuse."""
        try:
            await self.command(endpoint, request)
        except Refused as error:
            return error
        raise StepFailed(f"{endpoint} should have been refused")

    async def register(self, node: str, model: str, *, capacity: int = 64, mode: str = "managed", most: int = 0) -> int:
        """Register a node that no process stands behind, for placement alone; its epoch."""
        request = messages.RegisterRequest(
            node=node, address=f"nowhere.{node}", models=[model], block_size=self.block_size,
            capacity_blocks={"gpu": capacity}, cache_mode=mode, max_active=most,
        )  # fmt: skip
        epoch: int = (await self.command("node.register", request))["epoch"]
        return epoch

    async def statuses(self) -> list[ReplicaStatus]:
        """Status with digest of every router and coordinator, once all of them have applied the same sequence."""
        name = self.fleet.name
        routers = await self.fleet.routers(self.client, 2)
        with anyio.move_on_after(15):
            while True:
                ask_all = [f"kv.{name}.router.{writer}.flush" for writer in routers]
                ask_all += [f"kv.{name}.coordinator.status"]
                found: list[ReplicaStatus] = []
                for subject in ask_all:
                    found.append(await ask(self.client, subject, messages.StatusRequest(digest=True), ReplicaStatus))
                if len({status.sequence for status in found}) == 1:
                    return found
                await anyio.sleep(0.05)
        raise StepFailed("routers and coordinator never came to the same sequence")

    async def digest_at(self, sequence: int) -> str:
        """Digest of the state at a sequence, folded from the log's beginning."""
        state = FleetState(self.fleet.name)

        def handle(message: Message) -> None:
            if message.sequence <= sequence:
                state.apply(message)

        await replay(self.client, self.fleet.name, handle)
        return digest(state)


def check(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - an assertion that stays in optimized code
    """Raise `StepFailed` unless it holds."""
    if not holds:
        raise StepFailed(otherwise)


def brief(event: Event) -> str:
    """An event in short, as the demonstration prints it."""
    data = codec.to_builtins(event)
    keep = ("node", "session", "request", "reason", "match", "blocks", "policy")
    fields = [f"{key}={data[key]}" for key in keep if data.get(key) not in (None, "", [])]
    for key in ("stored", "evicted", "hashes"):
        if data.get(key):
            fields.append(f"{key}={len(data[key])}")
    return f"{type(event).__name__} {' '.join(fields)}"
