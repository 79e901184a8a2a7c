"""Streams whose engine dies in the middle: the client has one stream all the same, or an error, and the log has every leg."""

from __future__ import annotations

import json
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.services.gateway.legs import Legs
from kvplane.services.history.historian import Historian
from tests.support.gateways import on_engines
from tests.support.scripted_engine import MODEL
from tests.support.telling_engine import CLEAR, SINGLE, UNCLEAR, TellingEngine, Vocabulary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvplane.services.protocol.messages import RouteRequest
    from tests.support.fleet import Fleet
    from tests.support.gateways import Scene

pytestmark = pytest.mark.anyio
SEEDS = 20
"""Of each way to go on, with one death and with two."""
HOWS = ("eof", "reset", "half", "error", "bare")


class Told:
    """What a client makes of a stream."""

    def __init__(self, text: str, *, ids: bool) -> None:
        self.text, self.roles, self.events, self.ended = "", 0, 0, 0
        self.finish: list[str] = []
        self.usage: dict[str, Any] | None = None
        self.error: Any = None
        self.ids: set[object] = set()
        self.starts: list[str] = []
        for event in text.split("\n\n"):
            data = event.partition("data: ")[2]
            if not data:
                continue
            if data == "[DONE]":
                self.ended += 1
                continue
            self.events += 1
            body = json.loads(data)
            assert ids or 'token_ids":[' not in data, "ids that nobody asked for"
            self.error = body.get("error") or self.error
            if "type" in body:
                self._of_message(body)
            for choice in body.get("choices", ()):
                delta = choice.get("delta") or {}
                self.roles += "role" in delta
                self.text += delta.get("content") or choice.get("text") or ""
                self.finish += [choice["finish_reason"]] if choice["finish_reason"] else []
                self.ids.add((body["id"], body["created"], body["object"]))
            self.usage = body.get("usage") or self.usage

    def _of_message(self, body: dict[str, Any]) -> None:
        self.starts += [body["type"]] if body["type"].endswith(("_start", "_stop")) else []
        if body["type"] == "content_block_delta":
            self.text += body["delta"]["text"]
        if body["type"] == "message_delta":
            self.finish.append(body["delta"]["stop_reason"])
        self.ended += body["type"] == "message_stop"


class Engines:
    """Three engines that share their deaths, and a gateway in front."""

    def __init__(self, scene: Scene, engines: list[TellingEngine], deaths: list[int | None]) -> None:
        self.scene, self.engines, self.deaths = scene, engines, deaths

    async def ask(self, path: str, body: dict[str, Any], *deaths: int | None, how: str = "eof", **headers: str) -> Told:
        self.deaths[:] = deaths
        for engine in self.engines:
            engine.how = how
            engine.asked.clear()
        answer = await self.scene.http.post(path, json={"model": MODEL, "stream": True, **body}, headers=headers)
        assert answer.status_code == 200, answer.text
        return Told(answer.text, ids="return_token_ids" in body)

    @property
    def asked(self) -> list[tuple[str, dict[str, Any]]]:
        return [asked for engine in self.engines for asked in engine.asked]


@asynccontextmanager
async def telling(fleet: Fleet, pieces: list[str], *, gives_ids: bool, renders: bool = True) -> AsyncIterator[Engines]:
    deaths: list[int | None] = []
    vocabulary = Vocabulary(pieces)
    made = [TellingEngine(name, vocabulary, deaths, gives_ids=gives_ids, renders=renders) for name in "abc"]
    async with on_engines(fleet, *made) as scene:
        yield Engines(scene, made, deaths)


CHAT: tuple[str, dict[str, Any]] = (
    "/v1/chat/completions", {"messages": [{"role": "user", "content": "w1 w2 "}], "max_tokens": 30}
)  # fmt: skip
TEXT: tuple[str, dict[str, Any]] = ("/v1/completions", {"prompt": "w3 w4 w5 ", "max_tokens": 30})
IDS: tuple[str, dict[str, Any]] = ("/v1/completions", {"prompt": [7, 8, 9], "max_tokens": 30})
ANTHROPIC: tuple[str, dict[str, Any]] = (
    "/v1/messages", {"messages": [{"role": "user", "content": "w1 w2 "}], "max_tokens": 30, "system": "w9 "}
)  # fmt: skip
USAGE = {"stream_options": {"include_usage": True}}


async def check(engines: Engines, path: str, body: dict[str, Any], seed: int, *, exact: bool = True) -> int:
    """With one kill and with two, the client's stream is the one without; how many legs that took."""
    drawn, legs = random.Random(seed), 0
    whole = await engines.ask(path, body)
    assert (whole.error, len(engines.asked)) == (None, 1)
    for kills in (1, 2):
        deaths = [drawn.randrange(whole.events), *([drawn.randrange(6)] if kills > 1 else [])]
        told = await engines.ask(path, body, *deaths, how=drawn.choice(HOWS))
        legs += len(engines.asked)
        assert told.error is None, (told.error, deaths)
        assert told.text == whole.text, (deaths, repr((told.text, whole.text)), engines.asked)
        assert (told.roles, told.finish, told.ended, told.starts) == (whole.roles, whole.finish, 1, whole.starts), (
            deaths
        )
        assert len(told.ids) <= 1
        counted = ("prompt_tokens", "completion_tokens", "total_tokens")[: 3 if exact else 1]
        assert (told.usage is None) == (whole.usage is None)
        if told.usage is not None and whole.usage is not None and "prompt_tokens" in whole.usage:
            assert [told.usage[name] for name in counted] == [whole.usage[name] for name in counted], deaths
    return legs


def asked(kind: tuple[str, dict[str, Any]], seed: int, **more: Any) -> tuple[str, dict[str, Any]]:
    """A request of a kind; no two seeds have the same answer."""
    path, body = kind
    if "messages" in body:
        body = {**body, "messages": [{"role": "user", "content": f"w1 w{seed} "}]}
    elif isinstance(body["prompt"], str):
        body = {**body, "prompt": f"w3 w{seed} "}
    else:
        body = {**body, "prompt": [7, 8, 4 + seed % 8]}
    return path, {**body, "model": (MODEL, "lora")[seed % 2], **more}


@pytest.mark.parametrize("usage", [False, True], ids=["", "usage"])
async def test_an_engine_that_gives_token_ids(fleet: Fleet, usage: bool) -> None:
    async with telling(fleet, UNCLEAR, gives_ids=True) as engines:
        legs = 0
        for seed in range(SEEDS):
            legs += await check(engines, *asked((CHAT, TEXT, IDS)[seed % 3], seed, **(USAGE if usage else {})), seed)
        assert legs > 4 * SEEDS


@pytest.mark.parametrize("interval", [1, 3])
async def test_an_engine_that_gives_none(fleet: Fleet, interval: int) -> None:
    async with telling(fleet, CLEAR, gives_ids=False) as engines:
        legs = 0
        for engine in engines.engines:
            engine.interval = interval
        for seed in range(SEEDS):
            # How many tokens were made is guessed by the chunks: no bound cuts these answers.
            kind, least = (CHAT, TEXT, IDS, ANTHROPIC)[seed % 4], 400 if interval > 1 else 30
            legs += await check(engines, *asked(kind, seed, max_tokens=least, **USAGE), seed, exact=False)
        assert legs > 4 * SEEDS


async def test_several_tokens_a_chunk(fleet: Fleet) -> None:
    """Of such chunks it is not known which token their text ends with: it is cut into tokens anew."""
    async with telling(fleet, SINGLE, gives_ids=True) as engines:
        for engine in engines.engines:
            engine.interval, engine.lag = 3, 1
        for seed in range(SEEDS):
            await check(engines, *asked((CHAT, TEXT, IDS)[seed % 3], seed, **USAGE), seed)


async def test_stop_strings(fleet: Fleet) -> None:
    """Engines hold text back that may be the beginning of one: what goes on is the text that the client has."""
    async with telling(fleet, SINGLE, gives_ids=True) as engines:
        for seed in range(SEEDS):
            path, body = asked((CHAT, TEXT, IDS, ANTHROPIC)[seed % 4], seed, max_tokens=100)
            body["stop_sequences" if path == ANTHROPIC[0] else "stop"] = ["a", "€"]
            await check(engines, path, body, seed)


async def test_a_stop_string_that_may_have_begun(fleet: Fleet) -> None:
    async with telling(fleet, SINGLE, gives_ids=True) as engines:
        refused = 0
        for seed in range(SEEDS):
            path, body = asked((CHAT, TEXT)[seed % 2], seed, max_tokens=100, stop=["abc", "\n€"])
            whole = await engines.ask(path, body)
            told = await engines.ask(path, body, whole.events // 2)
            assert whole.text.startswith(told.text)
            if told.error is not None:
                assert "a stop string may have begun" in told.error["message"]
                assert told.text.endswith(("a", "ab", "\n"))
                refused += 1
            else:
                assert told.text == whole.text
        assert 0 < refused < SEEDS // 2


async def test_without_render_text_goes_to_the_end_of_the_prompt(fleet: Fleet) -> None:
    async with telling(fleet, CLEAR, gives_ids=False, renders=False) as engines:
        for seed in range(20):
            await check(engines, *asked((CHAT, TEXT)[seed % 2], seed), seed)
        path, body = asked(ANTHROPIC, 3)
        told = await engines.ask(path, body, 5)
        assert "are not known" in told.error["message"]


INELIGIBLE: list[tuple[tuple[str, dict[str, Any]], dict[str, Any], str]] = [
    (CHAT, {"n": 2}, "'n'"), (TEXT, {"best_of": 2}, "'best_of'"), (CHAT, {"logprobs": True}, "'logprobs'"),
    (TEXT, {"logprobs": 0}, "'logprobs'"), (TEXT, {"echo": True}, "'echo'"), (TEXT, {"suffix": "w1 "}, "'suffix'"),
    (CHAT, {"response_format": {"type": "json_object"}}, "'response_format'"),
    (CHAT, {"structured_outputs": {"regex": "a"}}, "'structured_outputs'"), (CHAT, {"guided_json": {}}, "'guided_json'"),
    (CHAT, {"seed": 3}, "'seed'"), (CHAT, {"seed": 3, "temperature": 0.5}, "'seed'"),
    (CHAT, {"presence_penalty": 0.5}, "'presence_penalty'"), (TEXT, {"frequency_penalty": 1}, "'frequency_penalty'"),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "required"}, "'tools'"),
    (TEXT, {"prompt": ["w1 ", "w2 "]}, "several prompts"), (TEXT, {"truncate_prompt_tokens": 5}, "'truncate_prompt_tokens'"),
    (TEXT, {"kv_transfer_params": {"a": 1}}, "'kv_transfer_params'"),
    (CHAT, {"a_field_of_tomorrow": 1}, "'a_field_of_tomorrow'"),
    (ANTHROPIC, {"tools": [{"name": "at"}]}, "'tools'"), (ANTHROPIC, {"thinking": {"type": "enabled"}}, "'thinking'"),
    (TEXT, {"max_tokens": 30.0}, "'max_tokens'"), (CHAT, {"return_token_ids": True}, ""),
]  # fmt: skip
HARMLESS: list[dict[str, Any]] = [
    {"n": 1}, {"seed": 3, "temperature": 0}, {"presence_penalty": 0.0, "frequency_penalty": 0}, {"logprobs": False},
    {"response_format": {"type": "text"}}, {"tools": [], "parallel_tool_calls": True}, {"metadata": {"a": "b"}, "user": "u"},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"guided_json": None}, {"min_tokens": 25},
    {"max_completion_tokens": 20},
]  # fmt: skip


async def test_what_is_not_continued_ends_with_an_error_that_says_why(fleet: Fleet) -> None:
    async with telling(fleet, CLEAR, gives_ids=True) as engines:
        for (path, body), more, why in INELIGIBLE:
            told = await engines.ask(path, {**body, **more}, 4)
            message = told.error["message"]
            assert "the engine broke off" in message
            assert why in message, message
            assert len(engines.asked) == 1
            # The engine's own last words, where it has some, are the client's.
            said = await engines.ask(path, {**body, **more}, 4, how="error")
            assert said.error["message"] == "EngineCore is dead"
        path, body = CHAT
        assert (await engines.ask(path, body, 4, **{"x-kvplane-continue": "0"})).error is not None
        for more in HARMLESS:
            await check(engines, path, {**body, **more}, 5)
        engines.scene.gateway.continues = False
        assert (await engines.ask(path, body, 4)).error is not None
        assert len(engines.asked) == 1
        assert engines.scene.gateway.kept.bytes == 0


async def test_legs_and_what_is_kept_are_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async with telling(fleet, CLEAR, gives_ids=True) as engines:
        path, body = CHAT
        told = await engines.ask(path, body, 3, 1, 1, 1, 1, 1)
        assert "no other goes on" in told.error["message"]
        assert len(engines.asked) == len(engines.engines)
        legs = engines.scene.gateway.measured.legs
        assert (legs["failed"], legs["no_node"]) == (2, 1)
        monkeypatch.setattr("kvplane.services.gateway.legs.LEGS", 2)
        told = await engines.ask(path, body, 3, 1)
        assert "it broke off 2 times" in told.error["message"]
        monkeypatch.setattr("kvplane.services.gateway.transcript.KEPT_BYTES", 20)
        told = await engines.ask(path, body, 20)
        assert "too much of it would have to be kept" in told.error["message"]
        assert engines.scene.gateway.kept.bytes == 0


async def test_every_leg_is_on_the_log_and_explained(fleet: Fleet, tmp_path: Path) -> None:
    async with telling(fleet, CLEAR, gives_ids=True) as engines, anyio.create_task_group() as group:
        historian = Historian(await fleet.connect("historian"), fleet.name, tmp_path / "history", servers=[fleet.url])
        await group.start(historian.run)
        path, body = CHAT
        whole = await engines.ask(path, {**body, **USAGE})
        told = await engines.ask(path, {**body, **USAGE}, 5, 3, **{"x-request-id": "mine"})
        assert told.text == whole.text
        await engines.scene.idle()
        routed, completed = await engines.scene.recorded()
        legs = [event for event in routed if "mine" in {event.request, event.origin}]
        assert [(event.request, event.origin, event.leg) for event in legs] == [
            ("mine", "", 0), ("mine.1", "mine", 1), ("mine.2", "mine", 2)
        ]  # fmt: skip
        assert len({event.node for event in legs}) == 3
        assert [sorted(event.exclude) for event in legs] == [
            [],
            [legs[0].node],
            sorted(event.node for event in legs[:2]),
        ]
        ends = {event.request: event for event in completed}
        assert [ends[event.request].status.partition(":")[0] for event in legs] == ["failed", "failed", "ok"]
        # The first had its role first, and each counts its own.
        assert told.usage is not None
        made = [ends[event.request].output_tokens for event in legs]
        assert made[:2] == [4, 3]
        assert sum(made) == told.usage["completion_tokens"]
        assert [event.tokens for event in legs] == [legs[0].tokens, legs[0].tokens + 4, legs[0].tokens + 7]
        explained = await historian.past.explain("mine.1", None)
        assert explained["recomputed"]["differences"] == []
        shown = [(row["request"], row["leg"], row["node"], row["output_tokens"]) for row in explained["attempts"]]
        assert shown == [(event.request, event.leg, event.node, ends[event.request].output_tokens) for event in legs]
        outcome = engines.scene.gateway.measured
        assert outcome.legs == {"failed": 1, "ok": 1}
        group.cancel_scope.cancel()


async def test_a_client_that_leaves_between_legs(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    between, left = anyio.Event(), anyio.Event()
    told = Legs.next

    async def waits(legs: Legs, question: RouteRequest) -> object:
        between.set()
        await left.wait()
        return await told(legs, question)

    monkeypatch.setattr(Legs, "next", waits)
    async with telling(fleet, CLEAR, gives_ids=True) as engines:
        engines.deaths[:] = [3]
        path, body = CHAT
        async with engines.scene.http.stream("POST", path, json={"model": MODEL, "stream": True, **body}) as answer:
            pieces = answer.aiter_bytes()
            await anext(pieces)
            await between.wait()
        await engines.scene.idle()
        left.set()
        routed, completed = await engines.scene.recorded()
        assert (len(routed), len(engines.asked)) == (1, 1)
        assert [event.status.partition(":")[0] for event in completed] == ["failed"]
        assert engines.scene.gateway.kept.bytes == 0
        assert engines.scene.gateway.measured.requests == {"cancelled": 1}


async def test_silence_counts_as_breaking_off(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplane.services.gateway.forward.IDLE_SECONDS", 0.2)
    monkeypatch.setattr("kvplane.services.http.pool.LOOK_SECONDS", 0.05)
    async with telling(fleet, CLEAR, gives_ids=True) as engines:
        path, body = TEXT
        whole = await engines.ask(path, body)
        assert (await engines.ask(path, body, 5, how="silent")).text == whole.text


async def test_calls_of_tools(fleet: Fleet) -> None:
    """A text whose engine looks for calls goes on at one that looks as well; a call under way does not."""
    async with telling(fleet, CLEAR, gives_ids=True) as engines:
        path, body = CHAT
        tools = {"tools": [{"type": "function", "function": {"name": "at"}}], "max_tokens": 400}
        await check(engines, path, {**body, **tools}, 3)
        told = await engines.ask(path, {**body, **tools}, 5)
        assert told.error is None
        assert {(path, "continue_final_message" in sent) for path, sent in engines.asked} == {
            (path, False),
            (path, True),
        }
        for engine in engines.engines:
            engine.calls_after = 3
        told = await engines.ask(path, {**body, **tools}, 6)
        assert "a tool call is under way" in told.error["message"]


@pytest.mark.parametrize("gives_ids", [True, False])
async def test_reasoning(fleet: Fleet, gives_ids: bool) -> None:
    """It is in no message; where all token ids are known it is in the prompt of the next leg."""
    async with telling(fleet, CLEAR, gives_ids=gives_ids) as engines:
        for engine in engines.engines:
            engine.reasons = 5
        path, body = CHAT
        whole = await engines.ask(path, body)
        for death, goes_on in ((0, True), (4, False), (10, gives_ids)):
            told = await engines.ask(path, body, death)
            assert (told.error is None) == goes_on, (death, told.error)
            assert told.error is not None or told.text == whole.text


async def test_an_event_that_broke_off_does_not_swallow_the_error(fleet: Fleet) -> None:
    async with telling(fleet, CLEAR, gives_ids=False) as engines:
        path, body = TEXT
        told = await engines.ask(path, {**body, **USAGE}, 4, how="half", **{"x-kvplane-continue": "no"})
        assert "broke off" in told.error["message"]
