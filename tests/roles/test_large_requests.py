"""Prompts of megabytes: others' routes don't wait for them, and their own answers are those of small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from kvplane.events.hashing import block_hashes
from kvplane.services.protocol import labels, messages
from kvplane.services.protocol.errors import Refused
from kvplane.services.roles import large
from kvplane.services.rpc import server as serving

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

LONG = 3_000_000


async def ready(fleet: Fleet) -> None:
    await fleet.coordinator()
    await fleet.router()
    await fleet.ask(
        "coordinator.node.register",
        messages.RegisterRequest(
            node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 1000},
            labels={labels.TOKENIZER: "bytes"},
        ),
    )  # fmt: skip


async def route(fleet: Fleet, **fields: Any) -> messages.RouteAnswer:
    answer: messages.RouteAnswer = await fleet.ask(
        "route", messages.RouteRequest(model="m", **fields), messages.RouteAnswer
    )
    return answer


async def test_others_do_not_wait_for_a_large_prompt(fleet: Fleet) -> None:
    await ready(fleet)
    order: list[str] = []
    async with anyio.create_task_group() as group:

        async def one(name: str, letter: str) -> None:
            answer = await route(fleet, prompt=letter * (LONG if name == "large" else 3))
            order.append(name)
            assert answer.tokens == (LONG if name == "large" else 3)

        for letter in "ab":
            group.start_soon(one, "large", letter)
        await anyio.lowlevel.checkpoint()
        for _ in range(5):
            group.start_soon(one, "small", "c")
    assert order == ["small"] * 5 + ["large"] * 2


async def test_a_large_request_is_answered_as_a_small_one(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    await ready(fleet)
    prompt, tokens = "what holds for one holds for the other " * 40, [*range(1000)]
    forms: list[dict[str, Any]] = [
        {"prompt": prompt, "salt": "s"}, {"tokens": tokens}, {"tokens": tokens, "adapter": "l"}, {"tokens": []},
        {"hashes": block_hashes(tokens, 16), "tokens_count": 1003}, {"prompt": ""},
    ]  # fmt: skip
    small = [await route(fleet, request=f"r{at}", dry_run=True, **form) for at, form in enumerate(forms)]
    wrong = {"tokens": [-1]}, {"tokens": [1], "prompt": "x"}, {"tokens": [1], "nonsense": 1}
    said = [await refused(fleet, form) for form in wrong]
    monkeypatch.setattr(serving, "LARGE_BYTES", 1)
    assert [await route(fleet, request=f"r{at}", dry_run=True, **form) for at, form in enumerate(forms)] == small
    assert [await refused(fleet, form) for form in wrong] == said
    assert {code for code, _ in said} == {"bad_request"}


async def refused(fleet: Fleet, fields: dict[str, Any]) -> tuple[str, str]:
    answer = await fleet.client.request("kv.default.route", msgspec.json.encode({"model": "m", **fields}), timeout=20)
    body = msgspec.json.decode(answer.data)
    return body["code"], body["error"]


async def test_large_requests_of_one_are_few(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    await ready(fleet)
    monkeypatch.setattr(large, "WAITING_OF_ONE", 2)
    codes: list[str] = []
    async with anyio.create_task_group() as group:

        async def one(number: int) -> None:
            try:
                await route(fleet, prompt=str(number) * LONG)
                codes.append("ok")
            except Refused as error:
                codes.append(error.code)

        for number in range(4):
            group.start_soon(one, number)
    assert sorted(codes) == ["ok", "ok", "overloaded", "overloaded"]
    # What nothing could mean is not even decoded.
    with pytest.raises(Refused, match="nothing here takes as many"):
        await fleet.ask("complete", messages.CompleteRequest(request="x" * LONG, node="a"))
