"""Clients of the fleet under attack. What is acknowledged to them goes to the ledger; errors are part of life.

The rates are such that two cores have some air; all of it is one process, which nobody kills.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
from nats.errors import Error as NatsError

from kvplane.events import codec, types
from kvplane.events.errors import LogError, LostRace
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.group import GroupWriter
from kvplane.events.subjects import token
from kvplane.services.demo.workload import conversations
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoAnswer, Refused, ServiceFault
from kvplane.services.rpc.client import ask
from tests.chaos.talk import TALKERS, Talker
from tests.chaos.world import MANAGED, MODEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from nats.aio.client import Client

    from kvplane.events.types import Event
    from tests.chaos.ledger import Ledger
    from tests.chaos.world import World

OWN = "m"
"""Model of the nodes that exist only on the log: they are registered by clients here, and never heartbeat."""
OWN_MANAGED = tuple(f"own-{number}" for number in range(4))
OWN_REPORTED = ("ext-0", "ext-1")
GROUPED = "ext-g"
CAPACITY = 48
REPORTED_CAPACITY = 110
"""Half of what its reports say at times, so that some are too much."""
BLOCK = 16
POLICIES = ("ttft", "cascade", "least_loaded", "round_robin")
ASK_SECONDS = 4.0
KEPT_COMMITS = 400
"""Commits that may be sent once more."""


async def ask_once(client: Client, subject: str, request: messages.RouteRequest, *, seconds: float) -> dict[str, Any]:
    """A router's answer to one question, asked once and without an id: the one that it gives names the router.

    Raises as `ask`.
    """
    try:
        answer = await client.request(subject, msgspec.msgpack.encode(request), timeout=seconds)
    except (NatsError, OSError, TimeoutError) as error:
        raise NoAnswer(repr(error)) from None
    if answer.headers and "Nats-Service-Error-Code" in answer.headers:
        raise Refused(int(answer.headers["Nats-Service-Error-Code"]), msgspec.json.decode(answer.data)["code"], "")
    found: dict[str, Any] = msgspec.msgpack.decode(answer.data)
    return found


class Noted(Appender):
    """An appender that writes every commit down before it is tried, and keeps it to be sent again later."""

    def __init__(self, client: Client, fleet: str, ledger: Ledger) -> None:
        super().__init__(client, fleet, new_writer("load"))
        self.kept: list[tuple[str, bytes, dict[str, str], int]] = []
        self._ledger = ledger
        self._last: dict[str, str] = {}

    def _headers(self, subject: str, body: bytes) -> dict[str, str]:
        headers = super()._headers(subject, body)
        self._last = headers
        self._ledger.note(
            "tried", writer=self.writer, subject=subject, counter=int(headers[codec.WRITER_SEQ]),
            crc=headers[codec.CRC32],
        )  # fmt: skip
        return headers

    async def put(self, subject: str, events: list[Event], *, give_up: float = 30.0) -> int:
        """Append; what became of it goes to the ledger."""
        body = codec.encode(events)
        try:
            sequence = await self.append_encoded(subject, body, give_up=give_up)
        except (LogError, LostRace):
            self._ledger.note(
                "given_up", writer=self.writer, subject=subject, counter=int(self._last[codec.WRITER_SEQ])
            )  # fmt: skip
            raise
        counter = int(self._last[codec.WRITER_SEQ])
        self._ledger.note("acked", writer=self.writer, subject=subject, counter=counter, sequence=sequence)
        self.kept.append((subject, body, dict(self._last), sequence))
        del self.kept[:-KEPT_COMMITS]
        return sequence


class Load:
    """All clients of one world."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.ledger = world.ledger
        self.fleet = world.fleet
        self.epochs: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.rng = random.Random(seed)
        self.work = conversations(sessions=24, turns=8, prompts=4, block_size=BLOCK, seed=seed)
        self.resting = anyio.Event()
        self._appenders: list[Noted] = []

    def count(self, what: str) -> None:
        """Count something that was tried or done."""
        self.counts[what] = self.counts.get(what, 0) + 1

    @asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """Load for the length of a block. At its end what is on its way is waited for."""
        tasks: list[Callable[[Client], Awaitable[None]]] = [
            self.write, self.write, self.gather, self.coordinate, self.coordinate, self.converse, self.converse,
            self.route_own, self.route_own, self.again, self.keep,
        ]  # fmt: skip
        self.resting = anyio.Event()
        async with anyio.create_task_group() as group:
            for number in range(TALKERS):
                group.start_soon(Talker(self, f"{self.rng.random()}").run, number)
            for number, task in enumerate(tasks):
                group.start_soon(self._client, f"load-{number}", task)
            try:
                yield
            finally:
                self.resting.set()

    async def _client(self, name: str, task: Callable[[Client], Awaitable[None]]) -> None:
        async with self.world.client(name) as client:
            await task(client)

    async def ask(self, client: Client, endpoint: str, request: Any, seconds: float = ASK_SECONDS) -> Any:
        """A service's answer; none when there is none or it refuses."""
        self.count(f"asked {endpoint}")
        try:
            place = f"kv.{self.fleet}.{endpoint}"
            ask_so = ask_once if endpoint == "route" else ask
            answer: dict[str, Any] = await ask_so(client, place, request, seconds=seconds)
        except ServiceFault as error:
            self.count(f"refused {endpoint}: {error.code}")
            return None
        self.count(f"answered {endpoint}")
        return answer

    async def write(self, client: Client) -> None:
        """Commits of one writer, one after the other."""
        appender = Noted(client, self.fleet, self.ledger)
        self._appenders.append(appender)
        rng = random.Random(self.rng.random())
        batch = 0
        while not self.resting.is_set():
            node = rng.choice(OWN_REPORTED)
            if node not in self.epochs:
                await self._register(client, node, "reported")
                await anyio.sleep(0.2)
                continue
            batch += 1
            blocks = pack_hashes(rng.sample(range(1, 300), rng.randrange(1, 9)))
            kind = types.BlocksStored if rng.random() < 0.7 else types.BlocksRemoved
            with suppress(LogError):
                await appender.put(
                    f"kv.{self.fleet}.cache.{node}", [kind(node, self.epochs[node], batch, blocks)],
                    give_up=rng.choice((0.5, 30, 30, 30)),
                )  # fmt: skip
            await anyio.sleep(0.04)

    async def gather(self, client: Client) -> None:
        """Events of a group writer; the batch number says which one each is."""
        writer = GroupWriter(Appender(client, self.fleet, new_writer("group")), f"kv.{self.fleet}.cache.{GROUPED}")
        name = writer._appender.writer
        sent = 0
        async with anyio.create_task_group() as group:
            group.start_soon(writer.run)
            while not self.resting.is_set():
                for _ in range(10):
                    await writer.send(types.CacheCleared(GROUPED, 1, sent))
                    sent += 1
                await anyio.sleep(0.1)
                self.ledger.note(
                    "flushed", writer=name, subject=writer._subject, events=writer.acknowledged
                )  # fmt: skip
            await writer.flush()
            self.ledger.note("flushed", writer=name, subject=writer._subject, events=writer.acknowledged)
            group.cancel_scope.cancel()

    async def _register(self, client: Client, node: str, mode: str) -> None:
        request = messages.RegisterRequest(
            node=node, address=f"none.{node}", models=[OWN], block_size=BLOCK, cache_mode=mode,
            capacity_blocks={"gpu": CAPACITY if mode == "managed" else REPORTED_CAPACITY}, replace=True,
        )  # fmt: skip
        answer = await self.ask(client, "coordinator.node.register", request)
        if answer is not None:
            self.epochs[node] = max(self.epochs.get(node, 0), answer["epoch"])
            self._answered("register", node, answer)

    def _answered(self, action: str, node: str, answer: dict[str, Any], **more: Any) -> None:
        self.ledger.note(
            "answered", action=action, node=node, sequence=answer["sequence"], changed=answer.get("changed", True), **more
        )  # fmt: skip

    async def coordinate(self, client: Client) -> None:
        """Registrations, cordons, placements, evictions and removals on nodes that clients own."""
        rng = random.Random(self.rng.random())
        while not self.resting.is_set():
            await anyio.sleep(0.05)
            node, draw = rng.choice(OWN_MANAGED), rng.random()
            named = messages.NodeRequest(node=node, reason="chaos")
            if node not in self.epochs or draw < 0.03:
                await self._register(client, node, "managed")
            elif draw < 0.13:
                action = rng.choice(["cordon", "uncordon", "uncordon"])
                node = rng.choice((*OWN_MANAGED, *OWN_REPORTED, "sim-a", "man-a")) if action == "uncordon" else node
                if draw < 0.04:
                    node = rng.choice(("sim-a", "man-a", *OWN_REPORTED))
                answer = await self.ask(client, f"coordinator.node.{action}", messages.NodeRequest(node=node))
                if answer is not None:
                    self._answered(action, node, answer)
            elif draw < 0.14:
                answer = await self.ask(client, "coordinator.node.remove", named)
                if answer is not None:
                    self._answered("remove", node, answer)
            elif draw < 0.2:
                evict = messages.BlocksRequest(node=node, count=rng.randrange(1, 6))
                answer = await self.ask(client, "coordinator.cache.evict", evict)
                if answer is not None:
                    self._answered("evict", node, answer)
            elif draw < 0.22:
                ending = messages.SessionRequest(model=OWN, session=f"s{rng.randrange(20)}", reason="chaos")
                answer = await self.ask(client, "coordinator.session.end", ending)
                if answer is not None:
                    self._answered("end", "", answer, session=ending.session, model=OWN)
            else:
                admit = messages.AdmitRequest(
                    model=OWN, hashes=pack_hashes(rng.sample(range(1, 400), rng.randrange(1, 12))),
                    node=node if draw < 0.7 else "",
                )  # fmt: skip
                answer = await self.ask(client, "coordinator.cache.admit", admit)
                if answer is not None:
                    self._answered(
                        "admit", answer["node"], answer, stored=admit.hashes.hex(), evicted=answer["evicted"].hex()
                    )  # fmt: skip

    def _routed(self, answer: dict[str, Any], model: str, exclude: list[str]) -> None:
        self.ledger.note(
            "routed", request=answer["request"], node=answer["node"], model=model, applied=answer["applied"],
            degraded=answer.get("degraded", False), exclude=exclude,
        )  # fmt: skip

    async def converse(self, client: Client) -> None:
        """Turns of conversations: routed, and served by the simulated node that was named."""
        rng = random.Random(self.rng.random())
        async with anyio.create_task_group() as group:
            while not self.resting.is_set():
                await anyio.sleep(rng.uniform(0.1, 0.3))
                group.start_soon(self._turn, client, rng.choice(self.work), rng.choice((MODEL, MODEL, MANAGED)))

    async def _turn(self, client: Client, work: Any, model: str) -> None:
        hashes = work.hashes[: 8 * 40]
        request = messages.RouteRequest(
            model=model, hashes=hashes, tokens_count=len(hashes) // 8 * BLOCK + 5, session=work.session
        )
        answer = await self.ask(client, "route", request)
        if answer is None:
            return
        self._routed(answer, model, [])
        serve = messages.ServeRequest(
            request=answer["request"], hashes=hashes, tokens=len(hashes) // 8 * BLOCK + 5, output_tokens=8
        )  # fmt: skip
        with suppress(ServiceFault):
            # By its subject: its address is that of an engine's HTTP.
            await ask(client, f"kv.{self.fleet}.serve.{token(answer['node'])}", serve, seconds=ASK_SECONDS)
            self.count("served")

    async def route_own(self, client: Client) -> None:
        """Requests for nodes that only the log knows; the client says how they end."""
        rng = random.Random(self.rng.random())
        while not self.resting.is_set():
            await anyio.sleep(0.08)
            exclude = [rng.choice(OWN_MANAGED)] if rng.random() < 0.2 else []
            hashes = pack_hashes(range(begin := rng.randrange(1, 300), begin + rng.randrange(1, 9)))
            session = f"s{rng.randrange(20)}" if rng.random() < 0.5 else ""
            request = messages.RouteRequest(model=OWN, hashes=hashes, session=session, exclude=exclude)
            answer = await self.ask(client, "route", request)
            if answer is None:
                continue
            self._routed(answer, OWN, exclude)
            complete = messages.CompleteRequest(request=answer["request"], node=answer["node"], prompt_tokens=9)
            await self.ask(client, "complete", complete)

    async def again(self, client: Client) -> None:
        """Sends acknowledged commits once more: with their id, as a retry, and with another, as one that comes very late."""
        rng = random.Random(self.rng.random())
        while not self.resting.is_set():
            await anyio.sleep(0.5)
            kept = [commit for appender in self._appenders for commit in appender.kept]
            if not kept:
                continue
            subject, body, headers, sequence = rng.choice(kept)
            late = rng.random() < 0.5
            if late:
                headers = {**headers, "Nats-Msg-Id": f"late-{rng.random()}"}
            with suppress(Exception):
                await client.request(subject, body, timeout=2, headers=headers)
                self.count("sent again, late" if late else "sent again")
                self.ledger.note("again", subject=subject, sequence=sequence, late=late)

    async def keep(self, client: Client) -> None:
        """Snapshots, compactions and policies, now and then."""
        rng = random.Random(self.rng.random())
        while not self.resting.is_set():
            with anyio.move_on_after(rng.uniform(4, 12)):
                await self.resting.wait()
            draw = rng.random()
            if draw < 0.4:
                await self.ask(client, "coordinator.snapshot", messages.StatusRequest(), 15)
            elif draw < 0.6:
                await self.ask(client, "coordinator.compact", messages.CompactRequest(), 15)
            else:
                policy = messages.PolicyRequest(policy=rng.choice(POLICIES))
                answer = await self.ask(client, "coordinator.policy.set", policy)
                if answer is not None:
                    self._answered("policy", "", answer, policy=policy.policy)
