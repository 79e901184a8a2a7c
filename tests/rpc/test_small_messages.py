"""A server that takes small messages only: what is larger is cut, or hashed where it is asked."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

import anyio
import msgspec
import pytest

from kvplane.events import codec, types
from kvplane.events.cutting import cut
from kvplane.events.hashing import block_hashes, pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.group import GroupWriter
from kvplane.services.diagnosis.examine import examine
from kvplane.services.embedded import server as embedded
from kvplane.services.embedded.server import start_server
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoTokenizer, Refused
from tests.support.findings import sentence, wrong
from tests.support.fleet import fleet_on
from tests.support.historians import messages_of
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

SMALL = 64 << 10
TOKENS = 250_000
SIZE = 16


@pytest.fixture(params=[SMALL, 1 << 20])
async def small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[Fleet]:
    """A fleet on a server that takes so much in a message."""
    monkeypatch.setattr(embedded, "MAX_PAYLOAD", request.param)
    running = await start_server(tmp_path / "data", port=free_port())
    async with connected([running.url], "test") as client, fleet_on(running.url, client) as fleet:
        assert client.max_payload == request.param
        await fleet.coordinator()
        await fleet.router()
        yield fleet
    await running.stop()


async def node(fleet: Fleet, name: str, model: str, mode: Literal["reported", "managed"], **labels: str) -> int:
    """Register a node; its epoch."""
    request = messages.RegisterRequest(
        node=name, address="host:1", models=[model], block_size=SIZE, capacity_blocks={"gpu": 200_000}, cache_mode=mode,
        labels=labels,
    )  # fmt: skip
    epoch: int = (await fleet.ask("coordinator.node.register", request))["epoch"]
    return epoch


async def store(fleet: Fleet, name: str, epoch: int, hashes: bytes) -> None:
    """Report blocks in one event, with names as long as an engine's."""
    names: list[types.EngineHash] = [bytes([0]) + number.to_bytes(31, "big") for number in range(len(hashes) // 8)]
    writer = GroupWriter(Appender(fleet.client, "default", new_writer("node")), f"kv.default.cache.{name}")
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        writer.put(types.BlocksStored(name, epoch, 1, hashes, engine_hashes=names))
        await writer.flush()
        group.cancel_scope.cancel()
    assert not writer.dropped


async def test_long_prompts_are_hashed_where_they_are_asked_about(small: Fleet) -> None:
    most = small.client.max_payload
    rng = random.Random(5)
    tokens = [rng.randrange(1 << 31) for _ in range(TOKENS)]
    hashes = block_hashes(tokens, SIZE, lora="l", salt="s")
    await store(small, "a", await node(small, "a", "m", "reported"), hashes)
    await node(small, "b", "m", "reported")
    asked = messages.RouteRequest(model="m", tokens=tokens, adapter="l", salt="s", request="r", exclude=["c"])
    assert len(msgspec.msgpack.encode(asked)) > most
    answer = await small.ask("route", asked, messages.RouteAnswer)
    fits = min(len(hashes) // 8, most // 8)
    assert (answer.request, answer.node, answer.tokens) == ("r", "a", TOKENS)
    # The last token is always computed.
    assert fits - 50 <= answer.blocks <= fits
    assert answer.matched_blocks == min(answer.blocks, (TOKENS - 1) // SIZE)
    # Another tenant's.
    other = await small.ask("route", msgspec.structs.replace(asked, salt="x", request="x"), messages.RouteAnswer)
    assert other.matched_blocks == 0
    # What is on the log is as large as it may be, and nothing was lost of what was reported.

    async def routed() -> list[types.RequestRouted]:
        events = [codec.decode("default", message).events for message in await messages_of(small.client)]
        return [event for each in events for event in each if isinstance(event, types.RequestRouted)]

    await until(routed)
    (event, *_) = await routed()
    assert (event.blocks, len(event.hashes)) == (answer.blocks, 0 if most == SMALL else 8 * answer.blocks)
    found = await examine(small.client, "default")
    assert ("warning", "messages") in wrong(found)
    assert f"may have {most:,} bytes" in sentence(found, "messages")


async def test_prompts_as_text_and_admissions(small: Fleet) -> None:
    await node(small, "a", "bytes", "managed", tokenizer="bytes")
    await node(small, "b", "m", "reported")
    prompt = "ab" * (600 << 10)
    text = messages.RouteRequest(model="bytes", prompt=prompt, dry_run=True)
    most = small.client.max_payload
    admitted = min(1000, most // 16)
    hashes = block_hashes(list(prompt.encode()), SIZE)
    admit = messages.AdmitRequest(model="bytes", hashes=hashes[: 8 * admitted])
    await small.ask("coordinator.cache.admit", admit)
    answer = await small.ask("route", text, messages.RouteAnswer)
    assert (answer.tokens, answer.matched_blocks) == (len(prompt), admitted)
    with pytest.raises(NoTokenizer):
        await small.ask("route", msgspec.structs.replace(text, model="m"))
    # It fits into a message, and what becomes of it does not.
    large = messages.AdmitRequest(model="bytes", hashes=pack_hashes(range((most - 100) // 8)), node="a")
    with pytest.raises(Refused, match="does not fit into one commit.*ask for less at once"):
        await small.ask("coordinator.cache.admit", large)


def test_what_is_cut_is_the_same_in_parts() -> None:
    hashes = pack_hashes(range(1, 1001))
    stored = types.BlocksStored("a", 1, 7, hashes, parent=99, engine_hashes=list(range(1000)))
    parts = [codec.decode_body("cache", codec.join([part]))[0] for _, part in cut(stored, 3000)]
    assert all(isinstance(part, types.BlocksStored) and len(codec.encode_one(part)) <= 3000 for part in parts)
    parent, whole, names = 99, b"", list[types.EngineHash]()
    for part in parts:
        assert isinstance(part, types.BlocksStored)
        assert (part.parent, part.batch) == (parent, 7)
        whole += part.hashes
        names += part.engine_hashes or []
        parent = len(whole) // 8
    assert (whole, names) == (hashes, list(range(1000)))
    removed = types.BlocksRemoved("a", 1, 7, hashes, "cpu")
    parts = [codec.decode_body("cache", codec.join([part]))[0] for _, part in cut(removed, 3000)]
    assert b"".join(part.hashes for part in parts if isinstance(part, types.BlocksRemoved)) == hashes
    routed = types.RequestRouted("r", "m", "a", 1, 1000, 16000, hashes, exclude=["n" * 128] * 100)
    for space, expected in ((14000, (b"", routed.exclude)), (900, (b"", []))):
        event = codec.decode_body("access", codec.join([part for _, part in cut(routed, space)]))[0]
        assert isinstance(event, types.RequestRouted)
        assert (event.hashes, event.exclude, event.blocks) == (*expected, 1000)
    assert cut(stored, 1 << 20) == [(stored, codec.encode_one(stored))]
