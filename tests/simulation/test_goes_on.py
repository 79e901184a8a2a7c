"""A simulated node that is asked to go on with an answer says what the answer has not said yet, in all forms of asking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvplane.services.simulation.engine_api import WORDS
from tests.support.gateways import on_simulated

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

CHAT = [{"role": "user", "content": "Tell me"}]


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


@pytest.mark.parametrize("before", [1, 7, len(WORDS), len(WORDS) + 5])
async def test_it_goes_on_after_what_was_said(fleet: Fleet, before: int) -> None:
    async with on_simulated(fleet, 1) as scene:

        async def ask(path: str, count: int, **body: Any) -> str:
            answer = await scene.http.post(path, json={"model": "sim", "max_tokens": count, **body})
            assert answer.status_code == 200, answer.text
            return text_of(answer.json())

        whole = await ask("/v1/completions", before + 6, prompt="Tell me")
        begun = await ask("/v1/completions", before, prompt="Tell me")
        assert whole.startswith(begun)
        for prompt in ("Tell me" + begun, list(("Tell me" + begun).encode())):
            assert begun + await ask("/v1/completions", 6, prompt=prompt) == whole
        messages = [*CHAT, {"role": "assistant", "content": begun}]
        further = {"continue_final_message": True, "add_generation_prompt": False}
        assert begun + await ask("/v1/chat/completions", 6, messages=messages, **further) == whole
        # A further answer begins anew.
        anew = [*messages, {"role": "user", "content": "And then? "}]
        assert await ask("/v1/chat/completions", before, messages=anew) == begun
