"""Conversations that wait for room: at the gateway, over NATS, and when their client or their router is gone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from kvplane.projections import held
from kvplane.services.dataplane.complete import Completer
from kvplane.services.gateway import forward
from kvplane.services.protocol import messages
from tests.support.gateways import answers, on_engines, on_simulated
from tests.support.scripted_engine import EVENTS, MODEL, ScriptedEngine, whole
from tests.support.waiting import until

if TYPE_CHECKING:
    from anyio.abc import SocketStream

    from kvplane.services.dataplane.complete import Completion
    from tests.support.fleet import Fleet
    from tests.support.gateways import Scene

pytestmark = pytest.mark.anyio

LONG = 1000
"""Tokens of a prompt of which the fleet has room for one."""


async def holding(scene: Scene, **parameters: float) -> None:
    policy = messages.PolicyRequest(policy="ttft", parameters={"hold": 1, **parameters})
    # In a log that can't hold, it is not silently without effect.
    assert await scene.fleet.refused("coordinator.policy.set", policy) == "bad_request"
    await scene.fleet.ask("coordinator.format.raise", messages.FormatRequest())
    await scene.fleet.ask("coordinator.policy.set", policy)
    await until(lambda: scene.gateway.router.state.holding)


def prompt(session: str, begin: int, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": list(range(begin, begin + LONG)), "max_tokens": 2, **more}
    return {"json": body, "headers": {"x-session-id": session}}


async def end(fleet: Fleet, session: str) -> None:
    await fleet.ask("coordinator.session.end", messages.SessionRequest(model=MODEL, session=session))


async def test_a_conversation_waits_until_another_has_ended(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "SILENT_SECONDS", 0.02)
    monkeypatch.setattr(forward, "ALIVE_SECONDS", 0.02)
    async with on_simulated(fleet, 1, model=MODEL, capacity_blocks=96) as scene:
        await holding(scene)
        router = scene.gateway.router
        answers: dict[str, str] = {}

        async def asks(session: str, begin: int, **more: Any) -> None:
            answer = await scene.http.post("/v1/completions", **prompt(session, begin, **more))
            assert answer.status_code == 200, answer.text
            answers[session] = answer.text

        await asks("first", 0)
        await until(lambda: len(router.state.load.contexts) == 1)
        async with anyio.create_task_group() as group:
            group.start_soon(asks, "second", 5000)
            await until(lambda: len(router.state.queue) == 1)
            # One that streams hears that it waits, and the first goes on all the while.
            group.start_soon(lambda: asks("third", 9000, stream=True))
            await until(lambda: len(router.state.queue) == 2)
            await asks("first", 0)
            assert answers.keys() == {"first"}
            # Its last turn is on the log before its end is, or else it would have begun anew.
            await router.writers.flush()
            await end(fleet, "first")
            await until(lambda: "second" in answers)
            await router.writers.flush()
            await end(fleet, "second")
        assert answers["third"].startswith(": waiting for room\n\n")
        assert answers["third"].rstrip().endswith("data: [DONE]")
        assert not router.state.queue
        assert (router.held.holds, router.held.released) == (2, {"room": 2})


async def test_who_leaves_gives_the_place_back(fleet: Fleet) -> None:
    async with on_simulated(fleet, 1, model=MODEL, capacity_blocks=96) as scene:
        await holding(scene)
        router = scene.gateway.router
        await scene.http.post("/v1/completions", **prompt("first", 0))
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: scene.http.post("/v1/completions", **prompt("second", 5000)))
            await until(lambda: len(router.state.queue) == 1)
            group.cancel_scope.cancel()
        await until(lambda: not router.state.queue)
        await scene.idle()
        assert router.held.released == {held.LEFT: 1}


async def test_over_nats_the_answer_says_hold_and_when_to_ask_again(fleet: Fleet) -> None:
    async with on_simulated(fleet, 1, model=MODEL, capacity_blocks=96) as scene:
        await holding(scene, hold_seconds=500)
        router = scene.gateway.router

        def asked(session: str, begin: int) -> messages.RouteRequest:
            return messages.RouteRequest(model=MODEL, tokens=list(range(begin, begin + LONG)), session=session)

        first = await fleet.ask("route", asked("first", 0), messages.RouteAnswer)
        await until(lambda: len(router.state.load.contexts) == 1)
        answer = await fleet.ask("route", asked("second", 5000), messages.RouteAnswer)
        assert (first.kind, first.held, answer.kind, answer.node) == ("miss", None, "hold", "")
        assert (answer.held.place, answer.held.expected) == (1, 500)
        assert 1 <= answer.held.ask_again <= 10
        assert "live conversations need 1,000 of" in answer.held.reason
        # Another router, as after this one was killed, knows it by its id, and its place.
        await router.writers.flush()
        other = await fleet.router()
        assert list(other.state.queue) == [answer.request]
        again = msgspec.structs.replace(asked("second", 5000), request=answer.request)
        assert other.route(again).kind == "hold"
        await fleet.ask("complete", messages.CompleteRequest(request=first.request, node=first.node))
        await end(fleet, "first")
        await until(lambda: not other.state.load.contexts)
        assert other.route(again).node == first.node
        other.record_pending()
        await until(lambda: not router.state.queue)


async def test_complete_asks_again_until_there_is_room(fleet: Fleet) -> None:
    async with (
        on_simulated(fleet, 1, model=MODEL, capacity_blocks=96) as scene,
        Completer(await fleet.connect("complete"), fleet.name) as completer,
    ):
        await holding(scene)
        router = scene.gateway.router
        await scene.http.post("/v1/completions", **prompt("first", 0))
        await until(lambda: len(router.state.load.contexts) == 1)
        completions: list[Completion] = []

        async def asks() -> None:
            completions.append(await completer.complete(prompt("", 5000)["json"]))

        async with anyio.create_task_group() as group:
            group.start_soon(asks)
            await until(lambda: len(router.state.queue) == 1)
            await until(lambda: completer.waits_for.startswith("room, at place 1"))
            await router.writers.flush()
            await end(fleet, "first")
        (completion,) = completions
        assert completion.decision.node == "sim-0"
        await router.writers.flush()
        # It was one request all the while.
        routed, _ = await scene.recorded()
        assert [event.request for event in routed][1:] == [completion.decision.request]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        pytest.param(whole(b'{"error": {"message": "too long"}}', b"400 Bad"), "too long", id="it refuses"),
        pytest.param(whole(b'{"error": {"message": "no memory"}}', b"500 No"), "no memory", id="it answers 500"),
        pytest.param(b"", "closed the connection", id="it closes"),
        pytest.param(EVENTS + b"0\r\n\r\n", "ended without its last event", id="its stream is empty"),
    ],
)  # fmt: skip
async def test_an_error_after_the_stream_was_kept_alive_is_an_event_of_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, answer: bytes, says: str
) -> None:
    monkeypatch.setattr(forward, "SILENT_SECONDS", 0.02)
    monkeypatch.setattr(forward, "ALIVE_SECONDS", 0.02)

    async def fails(stream: SocketStream) -> None:
        if answer:
            await stream.send(answer)
        await stream.aclose()

    # Room for one conversation of that length, in blocks of 4 tokens.
    engine = ScriptedEngine("a", answers, fails)
    engine.blocks = LONG * 3 // 2 // 4
    async with on_engines(fleet, engine) as scene:
        await holding(scene)
        router = scene.gateway.router
        first = {"model": MODEL, "prompt": list(range(LONG)), "max_tokens": 2}
        await scene.http.post("/v1/completions", json=first, headers={"x-session-id": "first"})
        await until(lambda: len(router.state.load.contexts) == 1)
        asked = prompt("second", 5000, stream=True)
        async with scene.http.stream("POST", "/v1/completions", **asked) as stream:
            pieces = stream.aiter_text()
            text = await anext(pieces)
            assert stream.status_code == 200
            await router.writers.flush()
            await end(fleet, "first")
            text += "".join([piece async for piece in pieces])
        comment = ": waiting for room"
        events = [event for event in text.strip().split("\n\n") if event != comment]
        assert text.startswith(comment)
        assert len(events) == 1, events
        assert says in json.loads(events[0].removeprefix("data: "))["error"]["message"]
