"""What the packages of OpenAI and Anthropic do beside asking: tools, images, time-outs, and retries of their own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anthropic
import anyio
import openai
import pytest

from tests.support.gateways import made, on_engines, on_simulated
from tests.support.scripted_engine import MODEL, ScriptedEngine, whole
from tests.support.waiting import until

if TYPE_CHECKING:
    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet

TOOL = {
    "name": "weather",
    "description": "Of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLED = {
    "id": "x", "object": "chat.completion", "created": 1, "model": MODEL,
    "choices": [{
        "index": 0, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
    }],
    "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25},
}  # fmt: skip
IMAGE = "data:image/png;base64,iVBORw0KGgo="


async def calls(stream: SocketStream) -> None:
    await stream.send(whole(json.dumps(CALLED).encode()))


def body_of(request: bytes) -> Any:
    return json.loads(request.partition(b"\r\n\r\n")[2])


async def test_tools_and_images_reach_the_engine_as_they_were_sent(fleet: Fleet) -> None:
    engine = ScriptedEngine("a", calls)
    async with on_engines(fleet, engine) as scene, made(base_url=f"{scene.url}/v1", api_key="k") as client:
        content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]
        messages = [{"role": "user", "content": content}]
        tools = [{"type": "function", "function": TOOL}]
        done = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools, tool_choice="auto")
        (call,) = done.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
        assert body_of(engine.requests[0]) == {
            "model": MODEL, "messages": messages, "tools": tools, "tool_choice": "auto",
        }  # fmt: skip
        assert b"authorization: bearer k\r\n" in engine.requests[0].lower()


async def test_anthropics_tools_find_their_conversation_cached(fleet: Fleet) -> None:
    async with on_simulated(fleet) as scene, anthropic.AsyncAnthropic(base_url=scene.url, api_key="x") as client:
        messages: list[Any] = [{"role": "user", "content": "Read the long file of everything. " * 20}]
        # A tool's `file_path` is no file.
        tools: Any = [
            {"name": "read", "input_schema": {"type": "object", "properties": {"file_path": {"type": "string"}}}}
        ]
        matches = []
        for turn in range(3):
            raw = await client.messages.with_raw_response.create(
                model="sim", max_tokens=4, messages=messages, system="You read files.", tools=tools
            )
            matches.append(int(raw.headers["x-kvplane-match"].partition("/")[0]))
            parsed: Any = await raw.parse()
            assert parsed.usage.cache_read_input_tokens == matches[-1]
            use = {"type": "tool_use", "id": f"t{turn}", "name": "read", "input": {"file_path": "x"}}
            result = {"type": "tool_result", "tool_use_id": f"t{turn}", "content": "all of it"}
            messages += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        assert matches[0] == 0 < matches[1] <= matches[2]
        response = await scene.http.post("/v1/responses", json={"model": "sim", "input": "a long question " * 40})
        again = await scene.http.post("/v1/responses", json={"model": "sim", "input": "a long question " * 40})
        assert response.headers["x-kvplane-match"].startswith("0/")
        assert int(again.headers["x-kvplane-match"].partition("/")[0]) > 300
        assert scene.gateway.measured.sources == {"render": 5}


async def test_a_client_that_loses_patience_leaves_nothing_behind(fleet: Fleet) -> None:
    async def silent(_: SocketStream) -> None:
        await anyio.sleep_forever()

    engine = ScriptedEngine("a", silent)
    async with (
        on_engines(fleet, engine) as scene,
        made(base_url=f"{scene.url}/v1", api_key="k", timeout=0.3, max_retries=0) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model=MODEL, prompt=[1, 2, 3])
        await until(lambda: engine.closed)
        await scene.idle()
        _, completed = await scene.recorded()
        assert [event.status for event in completed] == ["cancelled"]
        assert scene.gateway.measured.queued == 0


async def test_the_packages_ask_again_by_themselves(fleet: Fleet) -> None:
    async def fails(stream: SocketStream) -> None:
        await stream.send(whole(b'{"error": {"message": "not yet"}}', b"503 Busy"))

    engine = ScriptedEngine("a", fails, calls)
    async with (
        on_engines(fleet, engine) as scene,
        made(base_url=f"{scene.url}/v1", api_key="k", max_retries=2) as client,
    ):
        done = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
        assert done.choices[0].finish_reason == "tool_calls"
        assert len(engine.requests) == 2
        await scene.idle()
        routed, completed = await scene.recorded()
        assert [event.status.partition(":")[0] for event in completed] == ["failed", "ok"]
        # Two requests of the client, each with an id of its own.
        assert len({event.request for event in routed}) == 2
    engine = ScriptedEngine("b", fails)
    async with (
        on_engines(fleet, engine) as scene,
        anthropic.AsyncAnthropic(base_url=scene.url, api_key="x", max_retries=0) as other,
    ):
        with pytest.raises(anthropic.InternalServerError, match="not yet"):
            await other.messages.create(model=MODEL, max_tokens=4, messages=[{"role": "user", "content": "hello"}])
