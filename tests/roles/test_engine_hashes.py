"""An adapter reads nothing of the log: a coordinator tells it what its node held, in its own time and to it alone."""

from __future__ import annotations

import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events import codec
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.types import BlocksStored, NodeRegistered
from kvplane.services.engines.remembered import remembered
from kvplane.services.protocol import messages
from kvplane.services.protocol.answers import RegisterAnswer
from kvplane.services.protocol.errors import NoAnswer, Refused
from kvplane.services.roles import memory
from kvplane.services.roles.engine_hashes import ReadingLimits
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.tally import OK
from tests.support.fake_engine import FakeEngine, running
from tests.support.purging import purging
from tests.support.waiting import until
from tests.support.with_credentials import NAME, TRIED, Guarded, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from anyio.abc import Process
    from nats.aio.client import Client

    from kvplane.services.protocol.remembered import Remembered
    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

WHERE = "kv.default.coordinator.cache.names.a"


@asynccontextmanager
async def attached(fleet: Guarded, engine: FakeEngine, log: Path) -> AsyncIterator[Process]:
    """The command, with credentials of the node; killed at the end."""
    command = [
        sys.executable, "-m", "kvplane", "attach", "vllm", "--engine", engine.url, "--node", "node-a",
        "--fleet", NAME, "--server", fleet.url, "--ca", str(fleet.held.ca), "--pulse-seconds", "0.2",
        "--credentials", str(fleet.held.seed_file(NAME, "node", "node-a")),
    ]  # fmt: skip
    with log.open("ab") as output:
        process = await anyio.open_process(command, stdout=output, stderr=output, env={**os.environ, "NO_COLOR": "1"})
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def stored(client: Client, fleet: str, blocks: int, node: str = "a") -> int:
    """A node that says it holds so many blocks, each with a name of 32 bytes."""
    request = messages.RegisterRequest(
        node=node, address="x", models=["m"], block_size=4, capacity_blocks={"gpu": blocks}, labels={"k": "v"}
    )
    answer = await ask(client, f"kv.{fleet}.coordinator.node.register.{node}", request, RegisterAnswer)
    appender = Appender(client, fleet, new_writer(node))
    for batch, first in enumerate(range(1, blocks + 1, 1000)):
        hashes = range(first, min(first + 1000, blocks + 1))
        event = BlocksStored(
            node, answer.epoch, batch, pack_hashes(hashes), engine_hashes=[h.to_bytes(32) for h in hashes]
        )
        await appender.append(f"kv.{fleet}.cache.{node}", [event])
    return answer.epoch


def held(coordinator: Coordinator) -> set[int]:
    node = coordinator.state.nodes.get("node-a")
    return set(coordinator.state.caches.index(node.model).held(node.slots["gpu"])) if node else set()


async def test_an_adapter_with_credentials_of_its_node_finds_its_names_again(tmp_path: Path) -> None:
    log = tmp_path / "attach.log"
    async with guarded(tmp_path) as fleet, running(FakeEngine(buffer=3)) as engine:
        coordinators = [await fleet.coordinator(), await fleet.coordinator()]

        async def publish(*prompts: int) -> None:
            for prompt in prompts:
                engine.cache.request([prompt] * 3 * engine.cache.size)
                await engine.publish()
                await until(lambda: held(coordinators[0]) == engine.cache.held(), 30)

        async with attached(fleet, engine, log):
            await until(lambda: "node-a" in coordinators[0].state.nodes, 60)
            await publish(1, 2, 3, 4)
        epoch = coordinators[0].state.nodes["node-a"].epoch
        # The buffer no longer reaches the beginning, but what was said meanwhile.
        engine.cache.request([5] * 3 * engine.cache.size)
        await engine.publish()
        async with attached(fleet, engine, log):
            await until(lambda: coordinators[0].state.nodes["node-a"].epoch > epoch, 60)
            # Removals name blocks as the engine does, and are understood.
            await publish(6, 7, 8)
        output = log.read_text()
        assert "remembered" in output
        assert "learned_anew" not in output
        assert coordinators[0].state.skipped == {}
        assert "iolation" not in output + fleet.server.log.read_text()


async def test_a_node_is_told_of_itself_only(tmp_path: Path) -> None:
    async with guarded(tmp_path) as fleet:
        coordinator, _ = [await fleet.coordinator(reading=ReadingLimits(piece_bytes=1000)) for _ in range(2)]
        node, other = await fleet.connect("node", "node-a"), await fleet.connect("node", "node-b")
        stranger = await fleet.stranger("node", "node-a")
        await stranger.refused_publish(
            *(f"kv.{NAME}.coordinator.{what}" for what in (
                "cache.names", "node.last", "cache.names.node-b", "node.last.node-b", f"{coordinator.writer}.status",
                "cache.lookup", "cache.names.node-a.x",
            ))
        )  # fmt: skip
        for what in ("cache.names", "node.last"):
            with pytest.raises(Refused, match="the subject is of node 'node-a'"):
                await ask(node, f"kv.{NAME}.coordinator.{what}.node-a", messages.NodeRequest(node="node-b"))
            TRIED.withstood += 1
        assert await remembered(other, f"kv.{NAME}.coordinator.cache.names.node-b", "node-b") is None
        epoch = await stored(node, NAME, 100, "node-a")
        known = await remembered(node, f"kv.{NAME}.coordinator.cache.names.node-a", "node-a")
        assert known is not None
        assert len(known.engine_hashes()["gpu"]) == 100
        last = await ask(
            node, f"kv.{NAME}.coordinator.node.last.node-a", messages.NodeRequest(node="node-a"), messages.NodeLast
        )
        assert last.sequence == epoch


async def test_what_a_node_held_comes_in_pieces_from_one_of_several_coordinators(fleet: Fleet) -> None:
    coordinators = [await fleet.coordinator(reading=ReadingLimits(piece_bytes=10_000)) for _ in range(3)]
    epoch = await stored(fleet.client, fleet.name, 5000)
    for _ in range(4):
        known = await remembered(fleet.client, WHERE, "a")
        assert known is not None
        assert (known.epoch, known.position, known.block_size, known.labels) == (epoch, 4, 4, {"k": "v"})
        assert known.engine_hashes() == {"gpu": {block.to_bytes(32): block for block in range(1, 5001)}}
    assert sum(coordinator.tally.answers["piece", OK] for coordinator in coordinators) > 80
    assert all(coordinator.engine_hashes._pieces.size == 0 for coordinator in coordinators)
    assert await remembered(fleet.client, f"{WHERE[:-1]}b", "b") is None


async def test_readings_take_turns_and_who_waits_learns_that_it_goes_on(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator(reading=ReadingLimits(poll_seconds=0.05))
    for node in ("a", "b"):
        await stored(fleet.client, fleet.name, 10, node)
    found: dict[str, Remembered | None] = {}

    async def find(node: str) -> None:
        found[node] = await remembered(fleet.client, f"{WHERE[:-1]}{node}", node)

    async with coordinator.engine_hashes._lock, anyio.create_task_group() as group:
        for node in ("a", "b"):
            group.start_soon(find, node)
        await until(
            lambda: coordinator.tally.answers["piece", OK] > 10 and len(coordinator.engine_hashes._readings) == 2
        )
        assert found == {}
        coordinator.engine_hashes._lock.release()
        await until(lambda: len(found) == 2)
        await coordinator.engine_hashes._lock.acquire()
    assert all(known is not None and len(known.engine_hashes()["gpu"]) == 10 for known in found.values())
    await until(lambda: not coordinator.engine_hashes._readings)


async def test_who_has_waited_too_long_for_readings_before_is_to_ask_again(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator(reading=ReadingLimits(poll_seconds=0.05, busy_seconds=0.2))
    await stored(fleet.client, fleet.name, 10)
    async with coordinator.engine_hashes._lock:
        with (
            anyio.fail_after(30),
            pytest.raises(Refused, match="read what other nodes held before for 0.2 s; ask again") as caught,
        ):
            await remembered(fleet.client, WHERE, "a")
        assert (caught.value.status, caught.value.code) == (503, "busy")
        await until(lambda: not coordinator.engine_hashes._readings)
    known = await remembered(fleet.client, WHERE, "a")
    assert known is not None
    assert len(known.engine_hashes()["gpu"]) == 10


async def test_a_reading_that_nobody_asks_for_is_given_up(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator(reading=ReadingLimits(poll_seconds=0.05, gone_seconds=0.3))
    await stored(fleet.client, fleet.name, 10)
    async with coordinator.engine_hashes._lock:
        first = await ask(fleet.client, WHERE, messages.NodeRequest(node="a"), messages.Piece)
        assert (first.size, first.data, len(coordinator.engine_hashes._readings)) == (0, b"", 1)
        # A node that asks again gives up what it asked for before.
        again = await ask(fleet.client, WHERE, messages.NodeRequest(node="a"), messages.Piece)
        assert again.result != first.result
        with pytest.raises(Refused):
            await ask(fleet.client, first.next, messages.PieceRequest(result=first.result, offset=0), messages.Piece)
        await until(lambda: not coordinator.engine_hashes._readings)
    known = await remembered(fleet.client, WHERE, "a")
    assert known is not None
    assert known.position == 0


async def test_what_is_held_for_nodes_and_what_a_node_is_believed_is_bounded(fleet: Fleet) -> None:
    limits = ReadingLimits(piece_bytes=1000, held_bytes=30_000, most_entries=1500)
    coordinator = await fleet.coordinator(reading=limits)
    for node in ("a", "b"):
        await stored(fleet.client, fleet.name, 1000, node)
    for _ in range(3):
        # Asked for again and again, and never fetched: it is held once.
        await ask(fleet.client, WHERE, messages.NodeRequest(node="a"), messages.Piece)
    assert 40_000 < coordinator.engine_hashes._pieces.size < 60_000
    with pytest.raises(Refused, match="not yet fetched") as caught:
        await remembered(fleet.client, f"{WHERE[:-1]}b", "b")
    assert caught.value.status == 503
    known = await remembered(fleet.client, WHERE, "a")
    assert known is not None
    assert coordinator.engine_hashes._pieces.size == 0
    await stored(fleet.client, fleet.name, 1500, "c")
    with pytest.raises(Refused, match="more than 1,500 things.*; begin anew") as caught:
        await remembered(fleet.client, f"{WHERE[:-1]}c", "c")
    assert caught.value.status == 413


async def test_the_last_word_about_a_node(fleet: Fleet) -> None:
    with pytest.raises(NoAnswer):
        await fleet.ask("coordinator.node.last.a", messages.NodeRequest(node="a"), messages.NodeLast)
    await fleet.coordinator()
    assert await fleet.ask(
        "coordinator.node.last.a", messages.NodeRequest(node="a"), messages.NodeLast
    ) == messages.NodeLast(sequence=0, body=b"")
    epoch = await stored(fleet.client, fleet.name, 1)
    last = await fleet.ask("coordinator.node.last.a", messages.NodeRequest(node="a"), messages.NodeLast)
    assert last.sequence == epoch
    assert isinstance(codec.decode_body("node", last.body)[0], NodeRegistered)


async def test_who_reads_what_a_node_held_publishes_to_its_own_flow_control_only(fleet: Fleet) -> None:
    await fleet.coordinator()
    epoch = await stored(fleet.client, fleet.name, 10)
    before = (await fleet.client.jetstream().stream_info(f"KV_{fleet.name}")).state.last_seq
    known, where = memory.Memory(epoch), f"kv.{fleet.name}.cache.a"
    stranger = await fleet.connect("stranger")
    async with anyio.create_task_group() as group:
        # It waits for one more.
        group.start_soon(memory._fold, fleet.client, fleet.name, known, where, before + 1)
        await purging(stranger, f"KV_{fleet.name}", "memory-")
        more = BlocksStored("a", epoch, 1, pack_hashes([11]), engine_hashes=[b"more"])
        await Appender(fleet.client, fleet.name, new_writer("a")).append(where, [more])
    assert len(known.engine_hashes()["gpu"]) == 11
    assert (await fleet.client.jetstream().stream_info(f"KV_{fleet.name}")).state.messages == before + 1
