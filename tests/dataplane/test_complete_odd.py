"""Requests and answers that are out of the ordinary, and what becomes of them on their way to an engine and back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from kvplane.services.protocol.errors import EngineFailed
from tests.support.completions import scene

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def test_images_are_routed_without_guessing_their_tokens(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000}}
        asked = [{"role": "user", "content": [{"type": "text", "text": "what is in this picture?"}, image]}]
        for _ in range(2):
            done = await on.complete(messages=asked)
            assert (done.decision.blocks, done.decision.tokens, done.recorded) == (0, 6, True)


async def test_a_prompt_that_the_engine_truncates_is_hashed_as_what_is_left(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        on.engines["a"].api.truncates = True
        for prompt in (list(range(60)), "a text of more than forty bytes, which is cut to that"):
            for cached in (0, 36):
                done = await on.complete(prompt=prompt, truncate_prompt_tokens=40)
                assert (done.decision.matched_tokens, done.usage.cached_tokens) == (cached, cached)
        done = await on.complete(prompt=list(range(60)), truncate_prompt_tokens=-1)
        assert (done.decision.blocks, done.decision.tokens) == (0, 60)


async def test_long_requests_are_sent_in_parts(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        done = await on.complete(prompt="a" * 1_200_000)
        assert (done.decision.tokens, done.usage.prompt_tokens) == (1_200_001, 1_200_001)


async def test_a_question_that_the_server_would_not_take_is_hashed_before_it_is_asked(fleet: Fleet) -> None:
    async with scene(fleet, "a") as on:
        done = await on.completer.complete({"model": "m", "prompt": [1 << 31] * 2_000_000})
        assert done.decision.tokens == 2_000_000


async def test_an_engine_that_sends_elsewhere_or_answers_no_stream_is_passed_over(fleet: Fleet) -> None:
    async with scene(fleet) as on:
        one, other = on.engines["a"].api, on.engines["b"].api
        one.moved_to = other.moved_to = on.engines["a"].url + "/tokenize"
        with pytest.raises(EngineFailed, match=r"a: answers 307.*; b: answers 307|b: answers 307.*; a: answers 307"):
            await on.complete(prompt=[1] * 20)
        one.moved_to = other.moved_to = ""
        one.streams = other.streams = False
        with pytest.raises(EngineFailed, match=r"no stream of events \(application/json\).*no stream"):
            await on.complete(prompt=[1] * 20)


async def test_a_request_is_over_with_its_last_chunk(fleet: Fleet) -> None:
    """However long the engine keeps the answer open: what is recorded is not the wait for its end."""
    async with scene(fleet, "a") as on:
        on.completer.end_seconds = 1.0
        on.engines["a"].api.lingers = 5.0
        begin = time.perf_counter()
        done = await on.completer.complete({"model": "m", "prompt": [1] * 20})
        assert done.duration < time.perf_counter() - begin - 0.9
