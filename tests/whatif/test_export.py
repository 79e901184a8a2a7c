"""`kvplane trace export`: what a fleet really served, as a trace, and a simulation of it."""

from __future__ import annotations

import gzip
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec
import pytest

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import subject
from kvplane.services.cli import main
from kvplane.services.cli.trace import writing
from kvplane.services.demo.traffic import Traffic
from kvplane.services.history.client import table
from kvplane.services.protocol.errors import BadRequest, Refused
from kvplane.services.simulation.simnode import NodeConfig
from kvplane.services.simulation.trace import TraceRequest, Work, read_trace
from kvplane.services.simulation.world import Settings, World
from kvplane.services.whatif.export import UNKNOWN_OUTPUT, Exported, chosen, export
from tests.support.historians import historian, messages_of
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

SIZE = 16
BEGIN = list(range(900, 908))
"""What sessions begin with."""
PAUSES = {"alice": (0.05, 0.2), "bob": (0.1, 0.02)}
"""Seconds that each thinks before its second and third turn."""


def turns(name: str) -> list[Work]:
    own = 1000 * (1 + list(PAUSES).index(name))
    return [
        Work(pack_hashes([*BEGIN, *range(own, own + 3 * turn)]), (8 + 3 * turn) * SIZE + 5, 4 + turn, name)
        for turn in (1, 2, 3)
    ]


async def talk(traffic: Traffic, name: str) -> None:
    first, *others = turns(name)
    await traffic.send(first)
    for pause, work in zip(PAUSES[name], others, strict=True):
        await anyio.sleep(pause)
        await traffic.send(work)


async def exported(client: Client, **options: object) -> tuple[list[TraceRequest], Exported]:
    found = [line async for line in export(client, "default", **options)]  # type: ignore[arg-type]
    return [line for line, _ in found], found[-1][1]


def by_session(lines: list[TraceRequest]) -> dict[str, list[TraceRequest]]:
    found: dict[str, list[TraceRequest]] = defaultdict(list)
    for line in lines:
        found[line.session].append(line)
    return found


async def events_of(client: Client) -> tuple[dict[str, types.RequestRouted], dict[str, types.RequestCompleted]]:
    """Decisions and ends of the whole log, by request."""
    routed, completed = {}, {}
    for message in await messages_of(client):
        if message.subject.split(".")[2] != "access":
            continue
        for event in codec.decode_body("access", message.body):
            if isinstance(event, types.RequestRouted):
                routed[event.request] = event
            elif isinstance(event, types.RequestCompleted):
                completed[event.request] = event
    return routed, completed


async def test_sessions_and_delays_are_those_that_were_sent(
    fleet: Fleet, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fleet.coordinator()
    fast = {"prefill_speed": 1e6, "decode_speed": 500.0}
    await fleet.nodes(*(NodeConfig(name=f"node-{name}", **fast) for name in "ab"))  # type: ignore[arg-type]
    await fleet.router()
    traffic = Traffic(fleet.client, "default", "sim")
    async with historian(server.url, tmp_path / "h"):
        async with anyio.create_task_group() as group:
            for name in PAUSES:
                group.start_soon(talk, traffic, name)
            group.start_soon(traffic.send, Work(pack_hashes(BEGIN[:4]), 4 * SIZE + 1, 2))

        async def stored() -> bool:
            found = await table(fleet.client, "default", "SELECT count(*) AS n FROM completions WHERE status = 'ok'")
            return bool(found["n"].to_pylist() == [7])

        await until(stored, 20, every=0.05)
        lines, made = await exported(fleet.client)
        assert (made.requests, made.sessions, made.alone, made.block_size) == (7, 2, 1, SIZE)
        assert (made.unanswered, made.overlapping, made.unrecorded) == (0, 0, 0)
        assert await exported(fleet.client, piece=250) == (lines, made)
        path = tmp_path / "yesterday.jsonl.gz"
        arguments = ["trace", "export", "--server", server.url]
        await anyio.to_thread.run_sync(main, [*arguments, "--out", str(path)])
        assert "7 requests in 2 sessions, 1 of them without a session, over " in capsys.readouterr().err
        await anyio.to_thread.run_sync(main, arguments)
        out = capsys.readouterr().out
    assert gzip.decompress(path.read_bytes()).decode() == out
    assert [msgspec.json.decode(line, type=TraceRequest) for line in out.splitlines()] == lines
    for word in ("alice", "bob", "node-", "sim", "900"):
        assert word not in out
    # The same blocks have the same numbers, and no others.
    routed, completed = await events_of(fleet.client)
    order = sorted(routed.values(), key=lambda event: event.decided)
    numbers: dict[int, int] = {}
    for line, event in zip(sorted(lines, key=lambda line: line.timestamp or 0), order, strict=True):
        assert (line.input_length, line.block_size) == (event.tokens, SIZE)
        for number, block in zip(line.hash_ids, unpack_hashes(event.hashes), strict=True):
            assert numbers.setdefault(block, number) == number
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))
    # Each session's turns, and the times between them, are those of the log.
    found = by_session(lines)
    del found[""]
    for name, pauses in PAUSES.items():
        own = [event for event in order if event.session == name]
        (session,) = [each for each in found.values() if [line.input_length for line in each] == [e.tokens for e in own]
                      and [numbers[b] for b in unpack_hashes(own[-1].hashes)] == each[-1].hash_ids]  # fmt: skip
        assert [line.output_length for line in session] == [work.output_tokens for work in turns(name)]
        assert session[0].delay is None
        for (before, after), line, pause in zip(pairwise(own), session[1:], pauses, strict=True):
            assert line.delay is not None
            ended = before.decided + round(completed[before.request].duration * 1e6)
            assert line.delay == pytest.approx((after.decided - ended) / 1000, abs=0.002)
            assert line.delay >= pause * 1000
    # A simulation sends them just so.
    trace = read_trace(path)
    assert trace.block_size == SIZE
    served = World(Settings(nodes=2, capacity=4096, block_size=SIZE), trace.work).run().served
    for session in found.values():
        sent = sorted((each for each in served if each.session == session[0].session), key=lambda each: each.arrival)
        assert [each.tokens for each in sent] == [line.input_length for line in session]
        for (earlier, later), line in zip(pairwise(sent), session[1:], strict=True):
            assert later.arrival - earlier.end == pytest.approx((line.delay or 0) / 1000)


class Log:
    """A log that is written by hand, a second after the other."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._counter = 0

    async def put(self, topic: str, name: str, *events: types.Event) -> int:
        self._counter += 1
        body = codec.encode(events)
        headers = {
            codec.WRITER: name, codec.WRITER_SEQ: str(self._counter), codec.CRC32: codec.checksum(body),
        }  # fmt: skip
        await open_stream(self._client.jetstream(), "default", create=True)
        stored = await self._client.jetstream().publish(subject("default", topic, name), body, headers=headers)  # type: ignore[arg-type]
        return stored.seq

    async def routes(
        self, request: str, at: float, session: str = "", *, model: str = "m", node: str = "a", blocks: int = 2,
        recorded: int | None = None,
    ) -> int:  # fmt: skip
        hashes = pack_hashes(range(50, 50 + (blocks if recorded is None else recorded)))
        event = types.RequestRouted(
            request, model, node, 0, blocks, blocks * SIZE + 3, hashes, session, decided=round(1.7e15 + at * 1e6)
        )
        return await self.put("access", "router", event)

    async def ends(self, request: str, seconds: float, status: str = "ok", *, node: str = "a", output: int = 9) -> int:
        event = types.RequestCompleted(request, node, status, 35, 0, output, 0.1, seconds)
        return await self.put("access", "router", event)


async def test_requests_that_went_wrong(server: Server, client: Client, tmp_path: Path) -> None:
    """Sent again, without an end, before the last answer, without recorded blocks: each is one line that can be simulated."""
    log = Log(client)
    for node, model in (("a", "m"), ("b", "m"), ("c", "n")):
        size = 32 if model == "n" else SIZE
        await log.put("node", node, types.NodeRegistered(node, "host:1", [model], size, {"gpu": 64}))
    before = await log.routes("early", 0.0, "s", blocks=1)
    await log.ends("early", 1.0)
    since = await log.routes("again", 4.0, "s")
    await log.ends("again", 0.5, "node lost", output=0)
    await log.routes("again", 5.0, "s", node="b")
    await log.routes("else", 5.5, "t", blocks=3)
    await log.ends("again", 2.0, node="b", output=7)
    # Its session's answer before it ended at 7.
    await log.routes("after", 7.25, "s")
    await log.routes("over", 7.5, "s")
    await log.ends("over", 1.0)
    await log.ends("after", 1.0, "abandoned", output=0)
    await log.routes("bare", 9.0, "t", blocks=4, recorded=0)
    await log.ends("bare", 1.0)
    await log.routes("other", 9.5, "s", model="n", node="c")
    last = await log.ends("other", 0.5, node="c")
    async with historian(server.url, tmp_path / "h") as running:
        assert await running.ingest.reached(last, seconds=20)
        with pytest.raises(BadRequest, match="one block size, and there were blocks of 16 and 32 tokens"):
            await exported(client, models=["m", "n"])
        lines, made = await exported(client, models=["m"])
        assert await exported(client, models=["m"], piece=250) == (lines, made)
        s, t = by_session(lines).values()
        assert [(line.timestamp, line.delay, line.output_length) for line in s] == [
            (0, None, 9), (4000, 3000, 7), (7250, 250, UNKNOWN_OUTPUT), (7500, 250, 9),
        ]  # fmt: skip
        assert [(line.timestamp, line.delay, line.output_length) for line in t] == [
            (5500, None, UNKNOWN_OUTPUT), (9000, 3500, 9),
        ]  # fmt: skip
        assert [line.hash_ids for line in t] == [[1, 2, 3], [4, 5, 6, 7]]
        assert (made.requests, made.unanswered, made.overlapping, made.unrecorded) == (6, 2, 0, 1)
        # What was sent before the span and again within it counts from there.
        later, _ = await exported(client, models=["m"], since=str(since))
        assert [(line.timestamp, line.session, line.delay) for line in later][:2] == [
            (0, "session-1", None),
            (500, "session-2", None),
        ]
        (one,), _ = await exported(client, models=["n"], since=str(before))
        assert (one.timestamp, one.session, one.block_size) == (0, "session-1", 32)
        for options, says in (
            ({"until": "3"}, "the span is empty: it begins after sequence 3 and ends at 3; choose"),
            ({"since": str(last - 1)}, "no request was routed from sequence"),
            ({"since": "1h", "until": "2h"}, "before the history begins"),
        ):
            with pytest.raises((BadRequest, Refused), match=says):
                await exported(client, **options)


def test_a_choice_of_models_that_is_none_is_refused() -> None:
    found = [
        {"model": "m", "requests": 7, "smallest": 16, "largest": 16},
        {"model": "n", "requests": 1, "smallest": None, "largest": None},
    ]  # fmt: skip
    for models, says in (
        ([], r"several models: choose with --model, of m \(7\), n \(1\)"),
        (["x"], r"no request for model 'x' was routed in the span; there are requests for m \(7\), n"),
        (["n"], "nobody recorded the block size"),
    ):
        with pytest.raises(BadRequest, match=says):
            chosen(found, models)
    assert chosen(found, ["m", "n", "m"]) == Exported(block_size=16, models=["m", "n"])
    assert chosen(found[:1], []) == Exported(block_size=16, models=["m"])


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    with pytest.raises(BadRequest, match="no/made.jsonl can't be written"), writing(tmp_path / "no" / "made.jsonl"):
        pass
    with pytest.raises(KeyError), writing(path) as write:
        write(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with writing(path) as write:
        write(b"whole")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("made.jsonl", b"whole")]
