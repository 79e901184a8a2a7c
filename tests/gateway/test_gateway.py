"""The gateway between clients that others wrote and engines that misbehave."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import anthropic
import anyio
import openai
import pytest

from kvplane.services.gateway import forward
from kvplane.services.protocol.messages import RegisterRequest
from tests.support.gateways import ANSWER, PROMPT, WORD, answers, made, on_engines, on_simulated
from tests.support.scripted_engine import EVENTS, MODEL, ScriptedEngine, chunk, whole
from tests.support.waiting import until

if TYPE_CHECKING:
    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet


async def test_the_openai_package_gets_what_it_asks_for(fleet: Fleet) -> None:
    async with on_simulated(fleet) as scene, made(base_url=f"{scene.url}/v1", api_key="x") as client:
        assert [model.id async for model in client.models.list()] == ["sim"]
        conversation: list[dict[str, str]] = [{"role": "user", "content": "Tell me of caches. " * 100}]
        cached = []
        for _ in range(3):
            done = await client.chat.completions.create(model="sim", messages=conversation, max_tokens=5)
            text = done.choices[0].message.content
            assert len(text.split()) == 5
            assert done.usage.completion_tokens == 5
            cached.append(done.usage.prompt_tokens_details.cached_tokens)
            conversation += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
        assert cached[0] == 0 < cached[1] < cached[2]
        parts, usages = [], []
        stream = await client.chat.completions.create(model="sim", messages=conversation, max_tokens=5, stream=True)
        async for part in stream:
            usages.append(part.usage)
            assert part.choices, "a chunk that only the gateway asked for"
            parts.append(part.choices[0].delta.content or "")
        assert len("".join(parts).split()) == 5
        assert not any(usages)
        stream = await client.completions.create(
            model="sim", prompt="one two", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        counted = [part.usage async for part in stream if part.usage]
        assert [usage.completion_tokens for usage in counted] == [3]
        response = await client.responses.create(model="sim", input="hello", max_output_tokens=16)
        assert response.usage is not None
        assert response.usage.output_tokens == 16
        vectors = await client.embeddings.create(model="sim", input=["a", "bcd"], encoding_format="float")
        assert [each.embedding[0] for each in vectors.data] == [1.0, 3.0]
        with pytest.raises(openai.NotFoundError, match="no node serves model 'other'"):
            await client.chat.completions.create(model="other", messages=conversation)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.chat.completions.create(model="sim", messages=conversation, max_tokens=-1)
        await scene.idle()
        routed, completed = await scene.recorded()
        assert [event.status for event in completed] == ["ok"] * 6 + ["refused: 400"]
        assert {event.request for event in routed} == {event.request for event in completed}
        # What was predicted is what was found.
        found = {event.request: event.cached_tokens for event in completed}
        assert [event.match * 16 for event in routed[:4]] == [found[event.request] for event in routed[:4]]
        assert [found[event.request] for event in routed[:3]] == cached


async def test_the_anthropic_package_gets_what_it_asks_for(fleet: Fleet) -> None:
    async with on_simulated(fleet) as scene, anthropic.AsyncAnthropic(base_url=scene.url, api_key="x") as client:
        messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "hello"}]
        done = await client.messages.create(model="sim", max_tokens=4, messages=messages)
        assert isinstance(done.content[0], anthropic.types.TextBlock)
        assert len(done.content[0].text.split()) == 4
        async with client.messages.stream(model="sim", max_tokens=4, messages=messages) as stream:
            assert len("".join([text async for text in stream.text_stream]).split()) == 4
            assert (await stream.get_final_message()).usage.output_tokens == 4
        assert (await client.messages.count_tokens(model="sim", messages=messages)).input_tokens > 5
        with pytest.raises(anthropic.NotFoundError, match="no node serves"):
            await client.messages.create(model="other", max_tokens=4, messages=messages)
        await scene.idle()
        _, completed = await scene.recorded()
        assert [(event.status, event.output_tokens) for event in completed] == [("ok", 4), ("ok", 4)]


async def test_a_conversation_stays_where_it_is_without_a_word(fleet: Fleet) -> None:
    async with on_simulated(fleet, 4) as scene:
        begun = [{"role": "user", "content": "hello " * 300}, {"role": "assistant", "content": "yes?"}]
        nodes = []
        for turn in range(4):
            conversation = [*begun, *({"role": "user", "content": f"go on {at}"} for at in range(turn + 1))]
            answer = await scene.http.post(
                "/v1/chat/completions", json={"model": "sim", "messages": conversation, "max_tokens": 2}
            )
            nodes.append(answer.headers["x-kvplane-node"])
        assert len(set(nodes)) == 1
        routed, _ = await scene.recorded()
        assert len({event.session for event in routed}) == 1
        assert routed[0].session.startswith("~")


async def test_what_only_the_engine_knows_the_blocks_of_is_routed_without_guessing(fleet: Fleet) -> None:
    words = {"type": "text", "text": 'What is an "image_url"? ' * 20}
    others = {"type": "text", "text": 'Is there no "image_url" here? ' * 20}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000}}
    async with on_simulated(fleet, 1) as scene:
        for parts, known in (([words, image], False), ([others], True)):
            for again in (False, True):
                body = {"model": "sim", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
                answer = await scene.http.post("/v1/chat/completions", json=body)
                predicted = int(answer.headers["x-kvplane-match"].partition("/")[0])
                assert (predicted > 100) == (known and again), answer.headers


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param(b"", id="closes at once"), pytest.param(whole(b'{"error": "full"}', b"503 Full"), id="503"),
        pytest.param(whole(b"{}", b"429 Busy"), id="429"), pytest.param(b"nonsense\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", id="breaks off"),
    ],
)  # fmt: skip
async def test_an_engine_that_fails_before_its_answer_is_replaced(fleet: Fleet, fails: bytes) -> None:
    async def failing(stream: SocketStream) -> None:
        if fails:
            await stream.send(fails)
        await stream.aclose()

    bad, good = ScriptedEngine("bad", failing), ScriptedEngine("good", answers)
    async with on_engines(fleet, bad, good) as scene:
        # The bad one has the session, so it is asked first.
        await scene.gateway.router.replica.reached(2)
        tried = 0
        for number in range(12):
            # Others' prompts, which nobody holds: they are spread.
            prompt = {**PROMPT, "prompt": [number] * 9, "user": f"u{number}"}
            answer = await scene.http.post("/v1/completions", json=prompt)
            assert (answer.status_code, answer.content) == (200, ANSWER)
            assert answer.headers["x-kvplane-node"] == "good"
            tried = len(bad.requests)
        assert tried
        routed, completed = await scene.recorded()
        assert [event.node for event in completed if event.status == "ok"] == ["good"] * 12
        failed = [event for event in completed if event.status.startswith("failed: ")]
        assert len(failed) == tried
        assert all(event.node == "bad" for event in failed)
        assert sorted(event.request for event in routed) == sorted(event.request for event in completed)


async def test_a_node_that_fails_is_left_out_for_a_while(fleet: Fleet) -> None:
    async def failing(stream: SocketStream) -> None:
        await stream.send(whole(b"{}", b"500 No"))

    bad, good = ScriptedEngine("bad", failing), ScriptedEngine("good", answers)
    async with on_engines(fleet, bad, good) as scene:
        for number in range(200):
            assert (await scene.http.post("/v1/completions", json={**PROMPT, "user": f"u{number}"})).status_code == 200
            if scene.gateway.breaker.tripped:
                break
        assert scene.gateway.breaker.tripped
        tried = len(bad.requests)
        for number in range(10):
            await scene.http.post("/v1/completions", json={**PROMPT, "user": f"v{number}"})
        assert len(bad.requests) <= tried + 1


async def test_when_all_nodes_are_left_out_none_is_and_one_that_comes_back_is_not(fleet: Fleet) -> None:
    async with on_engines(fleet, ScriptedEngine("a", answers)) as scene:
        breaker = scene.gateway.breaker
        for _ in range(3):
            breaker.saw("a", "failed: no", time.monotonic())
        assert breaker.left_out(time.monotonic()) == ["a"]
        # Also who is asked for the prompt's tokens.
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        assert (await scene.http.post("/v1/chat/completions", json=chat)).content == ANSWER
        for _ in range(3):
            breaker.saw("a", "failed: no", time.monotonic())
        again = RegisterRequest(
            node="a",
            address="http://127.0.0.1:1",
            models=[MODEL],
            block_size=4,
            capacity_blocks={"gpu": 9},
            replace=True,
        )
        await fleet.ask("coordinator.node.register", again)
        await until(lambda: not breaker.left_out(time.monotonic()))


async def test_all_engines_fail(fleet: Fleet) -> None:
    async def failing(stream: SocketStream) -> None:
        await stream.send(whole(b'{"error": {"message": "out of memory"}}', b"500 No"))

    async with on_engines(fleet, ScriptedEngine("a", failing), ScriptedEngine("b", failing)) as scene:
        answer = await scene.http.post("/v1/completions", json=PROMPT)
        assert answer.status_code == 502
        message = answer.json()["error"]["message"]
        assert "a: it answers 500" in message
        assert "b: it answers 500" in message
        assert "out of memory" in message


async def test_a_request_that_the_engine_refuses_is_tried_once(fleet: Fleet) -> None:
    body = b'{"error": {"message": "too long", "type": "BadRequestError"}}'

    async def refuses(stream: SocketStream) -> None:
        await stream.send(whole(body, b"400 Bad Request"))

    one, two = ScriptedEngine("a", refuses), ScriptedEngine("b", refuses)
    async with on_engines(fleet, one, two) as scene:
        answer = await scene.http.post("/v1/completions", json=PROMPT)
        assert (answer.status_code, answer.content) == (400, body)
        assert len(one.requests) + len(two.requests) == 1


async def test_a_stream_that_breaks_off_ends_with_an_error_that_is_seen(fleet: Fleet) -> None:
    async def breaks(stream: SocketStream) -> None:
        await stream.send(EVENTS + chunk(WORD) + chunk(WORD[:10]))
        await stream.aclose()

    async with on_engines(fleet, ScriptedEngine("a", breaks)) as scene:
        answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True})
        assert answer.status_code == 200
        events = [line for line in answer.text.split("\n") if line.startswith("data: ")]
        assert "the engine broke off" in json.loads(events[-1][6:])["error"]["message"]
        async with made(base_url=f"{scene.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.completions.create(model=MODEL, prompt=PROMPT["prompt"], stream=True)
            with pytest.raises(openai.APIError, match="broke off"):
                [part async for part in stream]
        await scene.idle()
        _, completed = await scene.recorded()
        assert [event.status.split(":")[0] for event in completed] == ["failed", "failed"]


async def test_a_stream_without_its_last_event_is_no_whole_one(fleet: Fleet) -> None:
    async def ends_early(stream: SocketStream) -> None:
        await stream.send(EVENTS + chunk(WORD) + b"0\r\n\r\n")

    async with on_engines(fleet, ScriptedEngine("a", ends_early)) as scene:
        answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True})
        assert "error" in answer.text.split("\n\n")[-2]


async def test_bytes_pass_as_they_come(fleet: Fleet) -> None:
    """Half a character, an event of a megabyte, comments, and carriage returns."""
    pieces = [
        b": hello\n\n",
        b'data: {"a": "\xe2\x82',
        b'\xac"}\r\n\r\n',
        b"data: " + b"x" * (1 << 20) + b"\n\n",
        b"data: [DONE]\n\n",
    ]

    async def odd(stream: SocketStream) -> None:
        await stream.send(EVENTS)
        for piece in pieces:
            await stream.send(chunk(piece))
        await stream.send(b"0\r\n\r\n")

    async with on_engines(fleet, ScriptedEngine("a", odd)) as scene:
        for options in ({}, {"stream_options": {"include_usage": True}}):
            answer = await scene.http.post("/v1/completions", json={**PROMPT, "stream": True, **options})
            assert answer.content == b"".join(pieces)


async def test_a_client_that_leaves_ends_its_request_at_the_engine(fleet: Fleet) -> None:
    async def endless(stream: SocketStream) -> None:
        await stream.send(EVENTS)
        while True:
            await stream.send(chunk(WORD))
            await anyio.sleep(0.01)

    engine = ScriptedEngine("a", endless)
    async with on_engines(fleet, engine) as scene:
        async with scene.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                break
        await until(lambda: engine.closed, 5)
        await scene.idle()
        _, completed = await scene.recorded()
        assert [event.status for event in completed] == ["cancelled"]


async def test_a_client_that_leaves_before_the_answer(fleet: Fleet) -> None:
    async def silent(_: SocketStream) -> None:
        await anyio.sleep_forever()

    engine = ScriptedEngine("a", silent)
    async with on_engines(fleet, engine) as scene:
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.5):
                await scene.http.post("/v1/completions", json=PROMPT)
        await until(lambda: engine.closed, 5)
        await scene.idle()
        _, completed = await scene.recorded()
        assert [event.status for event in completed] == ["cancelled"]


async def test_a_slow_client_holds_up_its_engine_and_nobody_else(fleet: Fleet) -> None:
    sent = 0

    async def fast(stream: SocketStream) -> None:
        nonlocal sent
        await stream.send(EVENTS)
        for _ in range(400):
            await stream.send(chunk(b"data: " + b"y" * 100_000 + b"\n\n"))
            sent += 1
        await stream.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with on_engines(fleet, ScriptedEngine("a", fast, answers)) as scene:
        async with scene.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as slow:
            pieces = slow.aiter_bytes()
            await anext(pieces)
            before = -1
            while sent != before:
                # As long as the engine gets rid of anything, buffers are not full.
                before = sent
                await anyio.sleep(0.3)
            assert sent < 400
            for _ in range(3):
                assert (await scene.http.post("/v1/completions", json=PROMPT)).content == ANSWER
            assert sent == before
            size = sum([len(piece) async for piece in pieces])
        assert sent == 400
        assert size > 39_000_000


async def test_deadlines(fleet: Fleet) -> None:
    async def slow(stream: SocketStream) -> None:
        await stream.send(EVENTS + chunk(WORD))
        await anyio.sleep_forever()

    async def silent(_: SocketStream) -> None:
        await anyio.sleep_forever()

    async with on_engines(fleet, ScriptedEngine("a", silent, slow)) as scene:
        answer = await scene.http.post("/v1/completions", json=PROMPT, headers={"x-request-timeout": "0.3"})
        assert answer.status_code == 504
        answer = await scene.http.post(
            "/v1/completions", json={**PROMPT, "stream": True}, headers={"x-request-timeout": "0.3"}
        )
        assert answer.status_code == 200
        assert "did not end within 0.3 s" in answer.text
        answer = await scene.http.post("/v1/completions", json=PROMPT, headers={"x-request-timeout": "soon"})
        assert answer.status_code == 400


async def test_what_the_answer_says_of_the_decision(fleet: Fleet) -> None:
    async with on_engines(fleet, ScriptedEngine("a", answers)) as scene:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        headers = {"x-request-id": "mine", "traceparent": trace, "x-kvplane-explain": "1", "x-session-id": "s 1"}
        answer = await scene.http.post("/v1/completions", json=PROMPT, headers=headers)
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["traceparent"] == trace
        assert answer.headers["x-kvplane-match"] == "0/9"
        decision = json.loads(answer.headers["x-kvplane-decision"])
        assert (decision["request"], decision["node"], decision["session"]) == ("mine", "a", "new")
        routed, completed = await scene.recorded()
        assert [(event.request, event.session, event.trace) for event in routed] == [("mine", "s 1", trace)]
        assert [(event.request, event.cached_tokens, event.prompt_tokens) for event in completed] == [("mine", 4, 9)]


async def test_bad_requests_are_told_what_is_wrong(fleet: Fleet) -> None:
    async with on_engines(fleet, ScriptedEngine("a", answers)) as scene:
        for path, body, status, sentence in (
            ("/v1/completions", b"{", 400, "not a JSON object"), ("/v1/completions", b"[]", 400, "not a JSON object"),
            ("/v1/completions", b'{"prompt": "a"}', 400, "names no model"),
            ("/v1/completions", b'{"model": 5}', 400, "names no model"),
            ("/v1/completions", b'{"model": "m", "prompt": [-1]}', 400, "token ids"),
            ("/nothing", b"", 404, "there is no /nothing"),
            ("/v1/completions", b"{" * 100_000, 400, "not a JSON object"),
        ):  # fmt: skip
            answer = await scene.http.post(path, content=body)
            assert answer.status_code == status, body[:20]
            assert sentence in answer.json()["error"]["message"]


async def test_a_decision_without_nats(fleet: Fleet) -> None:
    async with on_engines(fleet, ScriptedEngine("a", answers)) as scene:
        answer = await scene.http.post("/route", json={"model": MODEL, "tokens": [1, 2, 3], "dry_run": True})
        assert answer.json()["node"] == "a"
        answer = await scene.http.post("/route", json={"model": "other", "tokens": [1]})
        assert answer.status_code == 404
        assert (await scene.http.get("/health")).json()["ready"]


async def test_a_request_gets_the_place_of_the_one_that_is_over(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not refused, nor does it wait for longer than until the log has it."""
    monkeypatch.setattr(forward, "PLACE_SECONDS", 600)
    async with on_simulated(fleet, 1, max_active=1) as scene:
        answers: list[int] = []

        async def ask() -> None:
            body = {"model": "sim", "prompt": [len(answers), 2, 3], "max_tokens": 2}
            answers.append((await scene.http.post("/v1/completions", json=body)).status_code)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for _ in range(6):
                    group.start_soon(ask)
        assert answers == [200] * 6
        await scene.idle()
