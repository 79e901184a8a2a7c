"""Kill -9 of everything during load, again and again: nothing acknowledged is missing, and all folds agree.

Each round is a seed: which processes are killed and when is drawn from it, so a failure can be run again alone with
`KILL_SEEDS=7 pytest tests/events/test_crash.py`. The default is `KILL_SEEDS=20` rounds, on one log that lives through all
of them.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events import codec, types
from kvplane.events.errors import KvplaneError, LostRace
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.events.log.group import GroupWriter
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.demo.fleet import Fleet
from kvplane.services.demo.workload import conversations
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ask
from tests.support.fork_server import open_program
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.events.codec import Message

pytestmark = pytest.mark.anyio

SEEDS = [int(seed) for seed in os.environ.get("KILL_SEEDS", ",".join(map(str, range(20)))).split(",")]
MODEL = "m"
NAME = "crash"


class Ledger:
    """What was acknowledged to clients, to be found on the log afterwards."""

    def __init__(self) -> None:
        self.sequences: dict[int, tuple[str, int]] = {}
        """Sequence of a commit, its subject and the batch number in it."""
        self.grouped: list[int] = []
        """Batches that a group writer handed over and saw acknowledged."""
        self.nodes: dict[str, int] = {}
        """Epochs that the coordinator answered."""
        self.placed: list[int] = []
        """Sequences of placements that the coordinator answered."""
        self.routed = 0


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    running = Fleet(tmp_path, free_port(), NAME, open_process=open_program)
    await running.start_server()
    yield running
    await running.stop()


async def start_services(fleet: Fleet) -> None:
    for name in ("coordinator", "router-1", "router-2"):
        await fleet.start(name, name.split("-")[0])


async def append(client: Client, ledger: Ledger, stop: anyio.Event) -> None:
    """Commits of one writer, one after the other."""
    appender = Appender(client, NAME, new_writer("test"))
    subject = f"kv.{NAME}.cache.appended"
    batch = max([batch for place, batch in ledger.sequences.values() if place == subject], default=0)
    while not stop.is_set():
        batch += 1
        with suppress(LostRace):
            sequence = await appender.append(subject, [types.CacheCleared("appended", 1, batch)], give_up=60)
            ledger.sequences[sequence] = (subject, batch)
        await anyio.sleep(0.003)


async def gather(client: Client, ledger: Ledger, stop: anyio.Event) -> None:
    """Events of a group writer at a high rate."""
    writer = GroupWriter(Appender(client, NAME, new_writer("test")), f"kv.{NAME}.cache.grouped")
    first = len(ledger.grouped)
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        batch = first
        while not stop.is_set():
            for _ in range(20):
                await writer.send(types.CacheCleared("grouped", 1, batch))
                batch += 1
            # Every round reads all of them again.
            await anyio.sleep(0.005)
        await writer.flush()
        group.cancel_scope.cancel()
    assert (writer.dropped, writer.acknowledged) == (0, batch - first)
    ledger.grouped += range(first, batch)


async def coordinate(client: Client, ledger: Ledger, stop: anyio.Event, rng: random.Random) -> None:
    """Registrations and placements, of which only what was answered counts."""
    while not stop.is_set():
        node = f"node-{rng.randrange(6)}"
        register = messages.RegisterRequest(
            node=node, address="x", models=[MODEL], block_size=16, capacity_blocks={"gpu": 32}, cache_mode="managed",
            replace=True,
        )  # fmt: skip
        admit = messages.AdmitRequest(model=MODEL, hashes=pack_hashes(rng.sample(range(1, 200), 8)), node=node)
        with suppress(ServiceFault):
            if rng.random() < 0.2 or node not in ledger.nodes:
                answer = await ask(
                    client, f"kv.{NAME}.coordinator.node.register", register, dict[str, object], seconds=3
                )
                ledger.nodes[node] = max(ledger.nodes.get(node, 0), int(str(answer["epoch"])))
            else:
                answer = await ask(client, f"kv.{NAME}.coordinator.cache.admit", admit, dict[str, object], seconds=3)
                ledger.placed.append(int(str(answer["sequence"])))
        await anyio.sleep(0.002)


async def route(client: Client, ledger: Ledger, stop: anyio.Event, rng: random.Random) -> None:
    work = conversations(sessions=8, turns=4, seed=rng.randrange(1000))
    while not stop.is_set():
        each = rng.choice(work)
        request = messages.RouteRequest(model=MODEL, hashes=each.hashes, tokens_count=each.tokens, session=each.session)
        with suppress(ServiceFault):
            await ask(client, f"kv.{NAME}.route", request, seconds=1)
            ledger.routed += 1
        await anyio.sleep(0.003)


async def one_round(fleet: Fleet, client: Client, ledger: Ledger, seed: int) -> None:
    """Load on everything; at a random moment everything is killed and started again, still under load."""
    rng = random.Random(seed)
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(append, client, ledger, stop)
        group.start_soon(gather, client, ledger, stop)
        group.start_soon(coordinate, client, ledger, stop, rng)
        group.start_soon(route, client, ledger, stop, rng)
        await anyio.sleep(rng.uniform(0.05, 0.5))
        victims = ["server", "coordinator", "router-1", "router-2"]
        rng.shuffle(victims)
        for victim in victims:
            await fleet.kill(victim)
            await anyio.sleep(rng.choice((0, 0, 0.02)))
        await fleet.start_server()
        await start_services(fleet)
        await fleet.coordinators(client, 1)
        await fleet.routers(client, 2)
        await anyio.sleep(rng.uniform(0.05, 0.2))
        stop.set()


class Judge:
    """A fold that reads the log on, round by round, and what it found there. Services begin at zero in each round."""

    def __init__(self) -> None:
        self.state = FleetState(NAME)
        self.skipped: set[int] = set()
        self.events: dict[int, tuple[str, Sequence[types.Event]]] = {}
        """Subject and events of the commits that could be read."""
        self.grouped: list[int] = []

    def read(self, message: Message) -> None:
        state = self.state
        if state.apply(message).skipped is not None:
            self.skipped.add(message.sequence)
        for node in state.nodes.values():
            if node.managed:
                assert state.caches.held(node) <= node.registered.capacity_blocks["gpu"]
        events = codec.decode(NAME, message).events
        self.events[message.sequence] = message.subject, events
        if message.subject == f"kv.{NAME}.cache.grouped":
            self.grouped += [event.batch for event in events]  # type: ignore[attr-defined]

    async def check(self, fleet: Fleet, client: Client, ledger: Ledger) -> None:
        """Everything that was acknowledged is on the log once, and every fold of it says the same."""
        writers = await fleet.routers(client, 2)
        wanted: dict[int, set[str]] = {}
        for subject in [*(f"kv.{NAME}.router.{writer}.flush" for writer in writers), f"kv.{NAME}.coordinator.status"]:
            status = await ask(client, subject, messages.StatusRequest(digest=True), dict[str, object])
            assert status.get("unrecorded", 0) == 0
            wanted.setdefault(int(str(status["sequence"])), set()).add(str(status["digest"]))
        digests: dict[int, set[str]] = {}

        def note(message: Message) -> None:
            self.read(message)
            if message.sequence in wanted:
                digests[message.sequence] = {digest(self.state)}

        await replay(client, NAME, note, applied=self.state.sequence)
        assert wanted == digests
        for sequence, (subject, batch) in ledger.sequences.items():
            assert self.events[sequence][0] == subject
            assert self.events[sequence][1][0].batch == batch  # type: ignore[attr-defined]
        assert self.grouped == ledger.grouped
        for node, epoch in ledger.nodes.items():
            assert self.state.nodes[node].epoch >= epoch
            assert isinstance(self.events[epoch][1][0], types.NodeRegistered)
        for sequence in ledger.placed:
            assert sequence in self.events
            assert sequence not in self.skipped


async def test_kill_everything_during_load(fleet: Fleet) -> None:
    ledger, judge = Ledger(), Judge()
    await start_services_first(fleet)
    async with connected([fleet.url], "test") as client:
        await fleet.routers(client, 2)
        for seed in SEEDS:
            try:
                await one_round(fleet, client, ledger, seed)
                await judge.check(fleet, client, ledger)
            except (AssertionError, KvplaneError, TimeoutError) as error:
                error.add_note(f"seed {seed}; run it alone with KILL_SEEDS={seed}")
                raise
    # Every kind of load got through, or the test would have attacked nothing.
    assert len(ledger.sequences) > 50 * len(SEEDS) ** 0.5
    assert len(ledger.grouped) > 100 * len(SEEDS)
    assert ledger.placed
    assert ledger.routed > 10 * len(SEEDS) ** 0.5


async def start_services_first(fleet: Fleet) -> None:
    """The coordinator creates the log, so it must be there before the routers."""
    await fleet.start("coordinator", "coordinator")
    async with connected([fleet.url], "test") as client:
        await fleet.coordinators(client, 1)
    await fleet.start("router-1", "router")
    await fleet.start("router-2", "router")
