"""Engines that misbehave after they have begun, and what clients and the log have of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import anyio

from tests.support.gateways import ANSWER, PROMPT, WORD, answers, on_engines
from tests.support.scripted_engine import EVENTS, MODEL, OK, ScriptedEngine, chunk, whole
from tests.support.waiting import until

if TYPE_CHECKING:
    import pytest
    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet

DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
ERROR = b'data: {"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}}\n\n'
QUOTED = b'data: {"choices": [{"index": 0, "text": "{\\"error\\": {\\"usage\\": 1}}"}]}\n\n'
COUNTED = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, '
    b'"prompt_tokens_details": {"cached_tokens": 8}}}\n\n'
)


def sends(*pieces: bytes) -> ScriptedEngine:
    async def script(stream: SocketStream) -> None:
        for piece in pieces:
            await stream.send(piece)

    return ScriptedEngine("a", script)


async def test_an_answer_that_trickles_byte_by_byte(fleet: Fleet) -> None:
    pieces = [EVENTS, *(chunk(bytes([byte])) for byte in WORD + QUOTED + COUNTED + DONE), LAST]
    async with on_engines(fleet, sends(*pieces)) as scene:
        answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True})
        # Nobody asked for usage, so that its event is taken out; what only looks like one stays.
        assert answer.content == WORD + QUOTED + DONE
        wanted = {**PROMPT, "stream": True, "stream_options": {"include_usage": True}}
        assert (await scene.http.post("/v1/completions", json=wanted)).content == WORD + QUOTED + COUNTED + DONE
        await scene.idle()
        _, completed = await scene.recorded()
        assert [(event.status, event.cached_tokens, event.output_tokens) for event in completed] == [("ok", 8, 2)] * 2


async def test_an_error_in_a_stream_is_passed_on_once_and_counts_as_one(fleet: Fleet) -> None:
    engine = sends()
    async with on_engines(fleet, engine) as scene:
        for ends in (DONE, b""):
            for usage in (True, False):
                engine.scripts = sends(EVENTS, chunk(WORD), chunk(ERROR + ends), LAST).scripts
                body = {**PROMPT, "stream": True, "stream_options": {"include_usage": usage}}
                assert (await scene.http.post("/v1/completions", json=body)).content == WORD + ERROR + ends
        await scene.idle()
        _, completed = await scene.recorded()
        assert [event.status for event in completed] == ["failed: its stream says: out of memory"] * 4


async def test_a_last_event_that_is_long_or_comes_in_parts(fleet: Fleet) -> None:
    begins, ends = b'event: response.completed\ndata: {"type": "response.completed", "response": {"text": "', b'"}}\n\n'
    last = begins + b"x" * 200_000 + ends
    scripts = [[last], [last[:10], last[10:30], last[30:]], [last[:100_000], last[100_000:]]]
    engine = sends()
    async with on_engines(fleet, engine) as scene:
        for pieces in scripts:
            engine.scripts = sends(EVENTS, *map(chunk, pieces), LAST).scripts
            answer = await scene.http.post("/v1/responses", json={"model": MODEL, "input": "x", "stream": True})
            assert answer.content == last


async def test_a_stream_that_counts_nothing(fleet: Fleet) -> None:
    async with on_engines(fleet, sends(EVENTS, chunk(WORD), chunk(QUOTED + DONE), LAST)) as scene:
        answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True})
        assert answer.content == WORD + QUOTED + DONE
        await scene.idle()
        _, completed = await scene.recorded()
        assert [(event.status, event.prompt_tokens, event.output_tokens) for event in completed] == [("ok", 0, 0)]


async def test_an_answer_of_another_kind_passes_as_it_is(fleet: Fleet) -> None:
    bodies = [
        b"<html>busy</html>",
        b"",
        b'{"usage": 5}',
        b'{"usage": {"prompt_tokens": "x"}}',
        b'\xff{"usage": {}}',
        b"[]",
    ]
    engine = sends()
    async with on_engines(fleet, engine) as scene:
        for body in bodies:
            head = OK + b"Content-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body)
            engine.scripts = sends(head + body).scripts
            answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True})
            assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, body, "text/html")
        await scene.idle()
        _, completed = await scene.recorded()
        assert [(event.status, event.prompt_tokens) for event in completed] == [("ok", 0)] * len(bodies)


async def test_an_engine_that_hangs_counts_as_one_that_broke_off(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplane.services.gateway.forward.FIRST_BYTE_SECONDS", 0.3)
    monkeypatch.setattr("kvplane.services.gateway.forward.IDLE_SECONDS", 0.3)
    monkeypatch.setattr("kvplane.services.http.pool.LOOK_SECONDS", 0.05)

    async def silent(_: SocketStream) -> None:
        await anyio.sleep_forever()

    async def stops(stream: SocketStream) -> None:
        await stream.send(EVENTS + chunk(WORD))
        await anyio.sleep_forever()

    hangs = ScriptedEngine("a", silent, answers, stops)
    async with on_engines(fleet, hangs, ScriptedEngine("b", answers)) as scene:
        asked = 0
        while not hangs.requests:
            asked += 1
            answer = await scene.http.post("/v1/completions", json={**PROMPT, "user": f"u{asked}"})
            # Another one answers it.
            assert (answer.status_code, answer.content) == (200, ANSWER)
        measured = scene.gateway.measured
        assert (measured.retries, measured.migrations, measured.queued) == (1, 1, 0)
        while len(hangs.requests) < 3:
            answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True})
        events = answer.content.split(b"\n\n")
        assert events[0] + b"\n\n" == WORD
        assert "said nothing for 0.3 s" in json.loads(events[1].removeprefix(b"data: "))["error"]["message"]


async def test_requests_that_wait_at_an_engine_are_queued(fleet: Fleet) -> None:
    go_on = anyio.Event()

    async def waits(stream: SocketStream) -> None:
        await go_on.wait()
        await stream.send(whole(ANSWER))

    async with on_engines(fleet, ScriptedEngine("a", waits)) as scene, anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(lambda: scene.http.post("/v1/completions", json=PROMPT))
        await until(lambda: scene.gateway.measured.queued == 3)
        go_on.set()
        await until(lambda: scene.gateway.measured.queued == 0)
