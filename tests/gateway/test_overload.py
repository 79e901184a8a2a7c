"""More requests than the fleet may run: who waits, who is refused and told when to come again, and that nobody starves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from kvplane.services.gateway import forward
from kvplane.services.gateway.guard import Guarded
from kvplane.services.protocol.messages import RegisterRequest
from kvplane.services.roles import places
from tests.support.gateways import PROMPT, answers, on_engines
from tests.support.keys import bearer, make_key
from tests.support.scripted_engine import MODEL, ScriptedEngine
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet
    from tests.support.gateways import Scene

BUSY = 2
"""Requests that the one engine may run at once."""


async def limited(scene: Scene, engine: ScriptedEngine) -> None:
    """Let the engine run few requests at once."""
    node = RegisterRequest(
        node=engine.name, address=f"http://127.0.0.1:{engine.port}", models=[MODEL], block_size=4,
        capacity_blocks={"gpu": 1000}, max_active=BUSY, replace=True,
    )  # fmt: skip
    await scene.fleet.ask("coordinator.node.register", node)
    nodes = scene.gateway.router.state.nodes
    await until(lambda: nodes[engine.name].registered.max_active == BUSY)


class Slow:
    """An engine's script: it answers as many requests as it is let."""

    def __init__(self) -> None:
        self.gate = anyio.Semaphore(0)

    async def __call__(self, stream: SocketStream) -> None:
        await self.gate.acquire()
        await answers(stream)

    def go(self, count: int) -> None:
        for _ in range(count):
            self.gate.release()


async def test_a_tenant_that_floods_starves_nobody(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "PLACE_SECONDS", 600)
    file = tmp_path / "keys"
    flood, calm = make_key(file, "flood"), make_key(file, "calm")
    slow = Slow()
    engine = ScriptedEngine("e", slow)
    async with on_engines(fleet, engine, guarded=Guarded(keys=file)) as scene, anyio.create_task_group() as group:
        await limited(scene, engine)
        waiting = scene.gateway.router.places

        async def ask(secret: str, **more: Any) -> None:
            body = {**PROMPT, **more}
            assert (await scene.http.post("/v1/completions", json=body, headers=bearer(secret))).status_code == 200

        for _ in range(30):
            group.start_soon(ask, flood)
        await until(lambda: waiting.waiting == 30 - BUSY)
        for tier in ("flex", "priority"):
            group.start_soon(partial(ask, calm, service_tier=tier))
            before = waiting.waiting
            await until(lambda before=before: waiting.waiting == before + 1)  # type: ignore[misc]
        group.start_soon(partial(ask, calm, priority=-5))
        await until(lambda: waiting.waiting == 33 - BUSY)
        for _ in range(33):
            done = len(engine.requests)
            slow.go(1)
            await until(lambda done=done: len(engine.requests) > done or waiting.waiting == 0)  # type: ignore[misc]
        slow.go(BUSY)
    routed, completed = await scene.recorded()
    assert len(routed) == len(completed) == 33
    order = [event.tenant for event in routed[BUSY:]]
    # One of its own for one of the flood's: whoever came after thirty others is served among the first.
    assert [at for at, tenant in enumerate(order) if tenant == "calm"][-1] <= 6
    bodies = [request for request in engine.requests if b"service_tier" in request or b'"priority"' in request]
    assert [b'priority"' in body for body in bodies] == [True, True, False]


async def test_who_must_wait_too_long_is_told_when_to_come_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PLACE_SECONDS", 0.2)
    monkeypatch.setattr(places, "WAITING_LIMIT", 3)
    slow = Slow()
    engine = ScriptedEngine("e", slow)
    async with on_engines(fleet, engine) as scene, anyio.create_task_group() as group:
        await limited(scene, engine)
        waiting = scene.gateway.router.places
        refused: list[tuple[int, str, int]] = []

        async def ask(scope: anyio.CancelScope) -> None:
            with scope:
                answer = await scene.http.post("/v1/completions", json=PROMPT)
                if answer.status_code != 200:
                    code = answer.json()["error"]["code"]
                    refused.append((answer.status_code, code, int(answer.headers["retry-after"])))

        scopes = [anyio.CancelScope() for _ in range(8)]
        for scope in scopes[:BUSY]:
            group.start_soon(ask, scope)
        await until(lambda: len(engine.requests) == BUSY)
        await ask(scopes[2])
        assert refused == [(429, "overloaded", 1)]
        monkeypatch.setattr(forward, "PLACE_SECONDS", 600)
        for at in range(3, 6):
            group.start_soon(ask, scopes[at])
        await until(lambda: waiting.waiting == 3)
        await ask(scopes[6])
        assert refused[1:] == [(503, "queue_full", 1)]
        # Who leaves makes room for another.
        scopes[3].cancel()
        await until(lambda: waiting.waiting == 2)
        group.start_soon(ask, scopes[7])
        await until(lambda: waiting.waiting == 3)
        # As fast as the queue drains it would take longer than anyone waits: that is said at once.
        monkeypatch.setattr(places.Places, "expected", lambda *_: 1000.0)
        await ask(anyio.CancelScope())
        assert refused[2:] == [(429, "overloaded", 60)]
        slow.go(10)
    assert not waiting
    assert len(engine.requests) == BUSY + 3
    assert waiting.refused == 1
