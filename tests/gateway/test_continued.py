"""Streams whose engine dies in the middle: the client has one stream all the same, or an error, and the log has every leg."""

from __future__ import annotations

import json
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gateways import on_engines
from tests.support.scripted_engine import MODEL
from tests.support.telling_engine import CLEAR, SINGLE, UNCLEAR, TellingEngine, Vocabulary
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.fleet import Fleet
    from tests.support.gateways import Scene

pytestmark = pytest.mark.anyio
SEEDS = 50
HOWS = ("eof", "reset", "half", "error", "bare")


class Told:
    """What a client makes of a stream."""

    def __init__(self, text: str) -> None:
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
            assert 'token_ids":[' not in data, "ids that nobody asked for"
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
        return Told(answer.text)

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
        assert told.text == whole.text, (deaths, told.text, whole.text, engines.asked)
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
async def test_an_engine_that_gives_token_ids(fleet: Fleet, usage: bool) -> None:  # noqa: FBT001
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
    async with telling(fleet, CLEAR, gives_ids=True) as engines:
        for engine in engines.engines:
            engine.interval = 3
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
