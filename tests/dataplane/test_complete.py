"""Requests that go where the router says: engines of real sockets, their adapters, a router, and the log in the end."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from structlog.testing import capture_logs

from kvplane.services.dataplane import openai
from kvplane.services.dataplane.complete import Completer
from kvplane.services.dataplane.prompts import Lacking
from kvplane.services.process import logs
from kvplane.services.protocol.errors import BadRequest, EngineFailed, EngineRefused, UnknownModel
from tests.support.commands import run
from tests.support.completions import chat, scene
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.services.dataplane.openai import Body
    from tests.support.fleet import Fleet


async def test_conversations_find_what_was_predicted(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        conversations: dict[str, list[str]] = {name: ["you are short and helpful"] for name in ("one", "two")}
        nodes: dict[str, set[str]] = {name: set() for name in conversations}
        outcomes = []
        for turn in range(4):
            for name, contents in conversations.items():
                chunks: list[Body] = []
                done = await on.send(
                    {"model": "m", "messages": chat(*contents), "reasoning_effort": "low", "tools": [{"type": "function"}]},
                    session=name, on_chunk=chunks.append,
                )  # fmt: skip
                outcomes.append((done.decision.matched_tokens, done.usage.cached_tokens))
                nodes[name].add(done.decision.node)
                assert done.text == ["one two three"]
                assert "".join(text for chunk in chunks for text in openai.text(chunk).values()) == done.text[0]
                assert 0 < done.ttft <= done.duration
                contents += [done.text[0], f"and then {turn} {name}?"]
        assert all(predicted == cached for predicted, cached in outcomes)
        assert sum(cached or 0 for _, cached in outcomes) > 300
        assert all(len(each) == 1 for each in nodes.values())
        await until(lambda: len(on.completed) == len(outcomes))
        assert [event.cached_tokens for event in on.completed] == [cached for _, cached in outcomes]
        assert all(event.status == "ok" and event.prompt_tokens and event.output_tokens == 3 for event in on.completed)


async def test_adapters_and_salts_have_caches_of_their_own(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        prompt = list(range(40))
        for body in ({"model": "m"}, {"model": "ad"}, {"model": "m", "cache_salt": "s"}):
            for cached in (0, 36):
                done = await on.send({**body, "prompt": prompt})
                assert (done.decision.matched_tokens, done.usage.cached_tokens) == (cached, cached), body


async def test_a_prompt_is_tokenized_as_the_engine_does(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        for body in (
            {"prompt": "an old story of the sea"},
            {"prompt": "another one, of the land", "add_special_tokens": False},
            {"messages": chat("what is deeper than the sea?"), "add_generation_prompt": False},
            {"messages": chat("what?"), "reasoning_effort": "none", "documents": [{"title": "a long one"}]},
            {"messages": chat("what?"), "reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
        ):
            first, second = await on.complete(**body), await on.complete(**body)
            assert first.usage.prompt_tokens == first.decision.tokens
            assert second.usage.cached_tokens == second.decision.matched_tokens > 16


async def test_a_prompt_is_rendered_by_an_engine_that_can(fleet: Fleet) -> None:
    reasoned = {"role": "assistant", "content": "It is.", "reasoning_content": "The user asks of the sea. " * 3}
    asked = [{"role": "user", "content": "Is the sea deep?"}, reasoned, {"role": "user", "content": "How deep?"}]
    async with scene(fleet, "a") as on:
        api = on.engines["a"].api
        for api.without_render in (404, 403):
            on.completer._lacking = Lacking()
            without = await on.complete(messages=asked)
            assert 50 < without.decision.tokens < without.usage.prompt_tokens, "what /tokenize leaves out"
        api.renders = True
        # That it could not is not believed for ever.
        on.completer._lacking = Lacking()
        for body in ({"messages": asked}, {"prompt": "an old story of the sea"}):
            rendered = api.rendered
            first, second = await on.complete(**body), await on.complete(**body)
            assert first.usage.prompt_tokens == first.decision.tokens
            assert second.usage.cached_tokens == second.decision.matched_tokens > 16
            assert api.rendered == rendered + 2


async def test_an_engine_that_is_down_is_passed_over(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        first = await on.complete(prompt=list(range(40)))
        await on.engines[first.decision.node].kill()
        on.engines = {name: engine for name, engine in on.engines.items() if name != first.decision.node}
        again = await on.complete(prompt=list(range(40)))
        assert [attempt.node for attempt in again.failed] == [first.decision.node]
        assert again.decision.node in on.engines
        await until(lambda: len(on.completed) == 3)
        states = {event.request: (event.node, event.status) for event in on.completed}
        assert len(states) == 3
        (failed,) = [state for state in states.values() if state[1] != "ok"]
        assert failed[0] == first.decision.node
        # Gateways leave a node out by statuses that begin so.
        assert failed[1].startswith("failed: does not answer")
        # Nor is it asked for tokens.
        assert (await on.complete(prompt="text instead")).decision.node in on.engines
        for engine in on.engines.values():
            await engine.kill()
        with pytest.raises(EngineFailed, match=r"no engine completed the request \(.: .*; .: "):
            await on.completer.complete({"model": "m", "prompt": [1, 2, 3]})
        await until(lambda: not on.router.state.load.running and not on.router.overlay.pending)


async def test_an_answer_that_breaks_off_is_begun_elsewhere_unless_it_was_heard(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        first = await on.complete(prompt=list(range(40)))
        for engine in on.engines.values():
            engine.api.breaks_after = 2
        chunks: list[Body] = []
        with pytest.raises(EngineFailed, match="broke off"):
            await on.send({"model": "m", "prompt": list(range(40))}, on_chunk=chunks.append)
        assert len(chunks) == 2
        with pytest.raises(EngineFailed, match=r"\(.: broke off .*; .: broke off "):
            await on.complete(prompt=list(range(40)))
        on.engines[first.decision.node].api.breaks_after = None
        again = await on.complete(prompt=list(range(40)))
        assert (again.decision.node, again.text) == (first.decision.node, ["one two three"])
        await until(lambda: len(on.completed) == 5 + len(again.failed))
        assert sorted(event.status.split(" (")[0] for event in on.completed)[3 + len(again.failed) :] == ["ok", "ok"]


@pytest.mark.parametrize("status", [400, 401, 422])
async def test_what_an_engine_refuses_is_not_tried_elsewhere(fleet: Fleet, status: int) -> None:
    async with scene(fleet) as on:
        for engine in on.engines.values():
            engine.api.status = status
        with pytest.raises(EngineRefused, match=f"answers {status}: no, {status}") as caught:
            await on.complete(prompt=[1] * 20)
        assert caught.value.status == status
        await on.rest()
        (refused,) = [event.status for event in on.completed]
        assert refused.startswith("refused: ")
        assert refused.endswith(f"no, {status}")


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_an_engine_is_too_busy_for_is_tried_elsewhere(fleet: Fleet, status: int) -> None:
    async with scene(fleet) as on:
        first = await on.complete(prompt=[1] * 20)
        on.engines[first.decision.node].api.status = status
        again = await on.complete(prompt=[1] * 20)
        assert again.decision.node != first.decision.node
        assert f"answers {status}" in again.failed[0].reason


async def test_a_request_that_is_given_up_leaves_no_load(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        on.engines["a"].api.hangs = True
        async with anyio.create_task_group() as group:
            group.start_soon(on.completer.complete, {"model": "m", "prompt": [1] * 20})
            await until(lambda: on.engines["a"].api.requests and on.router.state.load.running)
            group.cancel_scope.cancel()
        await on.rest()
        assert [(event.status, event.prompt_tokens) for event in on.completed] == [("cancelled", 0)]


async def test_a_caller_that_fails_is_not_taken_for_an_engine_that_does(fleet: Fleet) -> None:
    async with scene(fleet) as on:

        def fail(_: Body) -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            await on.send({"model": "m", "prompt": [1] * 20}, on_chunk=fail)
        await on.rest()
        assert [event.status for event in on.completed] == ["cancelled"]


async def test_what_the_engine_does_not_tell_is_not_made_up(fleet: Fleet) -> None:
    logs.configure("warning")
    async with scene(fleet, "a") as on:
        with capture_logs() as logged:
            on.engines["a"].api.reports_cached = False
            for _ in range(2):
                done = await on.complete(prompt=[1] * 20)
            assert done.usage == openai.Usage(20, None, 3)
            await until(lambda: len(on.completed) == 2)
            assert {(event.prompt_tokens, event.cached_tokens, event.output_tokens) for event in on.completed} == {
                (0, 0, 3)
            }
            on.engines["a"].api.tokenizes = False
            for _ in range(2):
                done = await on.complete(messages=chat("a story of some length, please, and a good one"))
            assert (done.decision.matched_blocks, done.decision.blocks) == (0, 0)
            assert done.decision.tokens > 10
        counts = Counter(entry["event"] for entry in logged)
        assert (counts["cached_tokens_not_told"], counts["tokens_not_known"]) == (1, 1)
        assert any("/tokenize answers 404" in entry.get("hint", "") for entry in logged)


async def test_an_engine_that_says_nothing_of_no_hit_is_understood_once_it_had_one(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        on.engines["a"].api.reports_zero_cached = False
        cached = [(await on.complete(prompt=[token] * 20)).usage.cached_tokens for token in (1, 1, 2, 2, 3)]
        assert cached == [None, 16, 0, 16, 0]
        await until(lambda: len(on.completed) == 5)
        assert [event.prompt_tokens for event in on.completed] == [0, 20, 20, 20, 20]


@pytest.mark.parametrize("answer", ["never", {}, [], {"tokens": [-1]}, {"tokens": [1 << 70]}, {"tokens": "abc"}])
async def test_an_engine_that_can_not_tokenize_is_passed_over(fleet: Fleet, answer: Any) -> None:
    async with scene(fleet) as on:
        on.completer.tokenize_seconds = 0.3
        for engine in on.engines.values():
            engine.api.answers_tokens = answer
        with pytest.raises(EngineFailed, match=r"\(.: .*; .: "):
            await on.complete(prompt="a text")
        on.engines["a"].api.answers_tokens = None
        assert (await on.complete(prompt="a text")).decision.tokens == 7


async def test_whenever_a_request_is_given_up_it_leaves_no_load(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        for step in range(30):
            with anyio.move_on_after(step * 0.0005):
                await on.completer.complete({"model": "m", "prompt": [step] * 20})
        await on.rest()


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": "text"}, {"choices": {"index": 0}}, {"choices": [1]}, {"choices": None}, {"choices": [{"index": "a"}]},
        {"choices": [{"index": -1, "text": "x"}]}, {"choices": [{"index": 1 << 60, "text": "x"}]},
        {"choices": [{"delta": None}]}, {"usage": {"prompt_tokens": "many"}}, {"usage": {"prompt_tokens": -5}},
        {"usage": [1]}, {"usage": {"prompt_tokens": 1 << 70}},
        {"usage": {"prompt_tokens_details": {"cached_tokens": []}}},
    ],
)  # fmt: skip
async def test_what_is_odd_in_an_answer_does_no_harm(fleet: Fleet, chunk: Any) -> None:
    async with scene(fleet, "a") as on:
        on.engines["a"].api.says = [chunk]
        done = await on.complete(prompt=[1] * 20)
        assert (done.text, done.usage.prompt_tokens, done.recorded) == (["one two three"], 20, True)


async def test_a_complaint_that_is_no_text_is_recorded_all_the_same(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        on.engines["a"].api.says = [{"error": {"message": "bad \ud83d"}}]
        with pytest.raises(EngineFailed, match="bad"):
            await on.complete(prompt=[1] * 20)
        await on.rest()
        assert [event.status for event in on.completed if "bad" in event.status]


async def test_a_trace_goes_along_and_keys_do(fleet: Fleet) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with scene(fleet, "a") as on, Completer(fleet.client, fleet.name, api_key="k") as completer:
        await completer.complete({"model": "m", "prompt": [1] * 20, "stream": False}, traceparent=trace)
        ((body, headers),) = on.engines["a"].api.requests
        assert body["stream"] is True
        assert (headers["traceparent"], headers["Authorization"]) == (trace, "Bearer k")
        await until(lambda: on.completed)
        assert on.completed[0].trace == trace


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model": "m"}, "messages"),
        ({"model": "m", "prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a"}, "model"),
        ({"model": 3, "prompt": "a"}, "model"),
        ({"model": "m", "prompt": ["a", "b"]}, "token ids"),
        ({"model": "m", "prompt": [[1, 2]]}, "token ids"),
        ({"model": "m", "prompt": [-1]}, "token ids"),
        ({"model": "m", "prompt": []}, "token ids"),
        ({"model": "m", "prompt": None}, "token ids"),
        ({"model": "m", "prompt": [1 << 70]}, "token ids"),
        ({"model": "m", "prompt": "a", "stream_options": "x"}, "stream_options"),
        ({"model": "m", "messages": [], "chat_template_kwargs": 3}, "chat_template_kwargs"),
    ],
)
async def test_bad_requests_are_named(fleet: Fleet, body: Body, says: str) -> None:
    async with Completer(fleet.client, fleet.name) as completer:
        with pytest.raises(BadRequest, match=says):
            await completer.complete(body)


async def test_models_that_nobody_serves_and_nodes_without_an_engine(fleet: Fleet) -> None:
    from kvplane.services.simulation.simnode import NodeConfig  # noqa: PLC0415

    await fleet.coordinator()
    router = await fleet.router()
    await fleet.nodes(NodeConfig(name="s", model="sim"))
    await until(lambda: router.state.nodes)
    async with Completer(fleet.client, fleet.name) as completer:
        with pytest.raises(BadRequest, match="simulated"):
            await completer.complete({"model": "sim", "prompt": "a"})
        with pytest.raises(Exception, match="no node serves") as caught:
            await completer.complete({"model": "other", "prompt": "a"})
        assert caught.value.code == UnknownModel.code  # type: ignore[attr-defined]


async def test_the_command(fleet: Fleet, tmp_path: Path) -> None:
    async with scene(fleet, "a") as on:

        async def command(*arguments: str) -> tuple[int, str, str]:
            ended = await anyio.to_thread.run_sync(lambda: run("complete", *arguments, "--server", fleet.url))
            return ended.returncode, ended.stdout, " ".join(ended.stderr.split())

        code, out, stderr = await command(
            "m", "Tell me of the sea, at length", "--system", "Be brief.", "--session", "s"
        )
        assert (code, out) == (0, "one two three\n")
        assert "node a: 0 of " in stderr
        on.engines["a"].api.breaks_after = 3
        code, out, stderr = await command(
            "m", "Tell me of the sea, at length", "--system", "Be brief.", "--session", "s"
        )
        assert (code, out) == (1, "one two \n")
        assert "broke off" in stderr
        on.engines["a"].api.breaks_after = None
        file = tmp_path / "body.json"
        file.write_text(json.dumps({"prompt": list(range(40)), "max_tokens": 1, "n": 1}))
        code, out, _ = await command("ad", "--body", str(file), "--max-tokens", "2", "--json")
        outcome = json.loads(out)
        assert code == 0
        assert (outcome["text"], outcome["usage"]["output_tokens"], outcome["recorded"]) == (["one two "], 2, True)
        assert outcome["decision"]["node"] == "a"
        for arguments, says in (
            (("m",), "say what to complete"),
            (("m", "a", "--prompt", "b"), "say what to complete"),
            (("m", "--prompt", "b", "--system", "c"), "goes before a message"),
            (("m", "--body", str(tmp_path)), "can't be read"),
            (("--body", str(file)), "names its model"),
            (("nobody", "Hello"), "no node serves model"),
        ):
            code, out, stderr = await command(*arguments)
            assert (code, out) == (1, ""), arguments
            assert says in stderr
