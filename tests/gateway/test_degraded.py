"""The gateway while the log is away: it goes on, however many requests come and go meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from kvplane.services.embedded.server import start_server
from kvplane.services.history.historian import Historian
from kvplane.services.protocol.messages import RegisterRequest
from tests.support.gateways import PROMPT, answers, on_engines
from tests.support.scripted_engine import MODEL, ScriptedEngine
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

MOST = 3


async def test_what_has_ended_is_no_load_though_nobody_can_read_of_it(fleet: Fleet, server: Server) -> None:
    engine = ScriptedEngine("a", answers)
    async with on_engines(fleet, engine) as scene:
        again = RegisterRequest(
            node="a", address=f"http://127.0.0.1:{engine.port}", models=[MODEL], block_size=4, capacity_blocks={"gpu": 99},
            max_active=MOST, replace=True,
        )  # fmt: skip
        await fleet.ask("coordinator.node.register", again)
        router = scene.gateway.router
        await until(lambda: router.state.nodes["a"].registered.max_active == MOST)
        server.kill()
        await server.process.wait()
        await until(lambda: router.degraded)
        for _ in range(4 * MOST):
            answer = await scene.http.post("/v1/completions", json=PROMPT)
            assert answer.status_code == 200, answer.text
        assert not router.overlay.pending


async def test_what_was_decided_while_the_log_was_away_is_explained_when_it_is_back(
    fleet: Fleet, server: Server, tmp_path: Path
) -> None:
    """In the order in which it was decided and ended, which the log keeps, though it was on the log much later."""
    engine = ScriptedEngine("a", answers)
    another = ScriptedEngine("b", answers)
    async with on_engines(fleet, engine, another) as scene:
        router = scene.gateway.router
        url, data = server.url, tmp_path / "data"
        port = int(url.rpartition(":")[2])
        server.kill()
        await server.process.wait()
        await until(lambda: router.degraded)
        requests = []
        for at in range(12):
            prompt = {**PROMPT, "prompt": [at % 3] * 9}
            answer = await scene.http.post("/v1/completions", json=prompt)
            assert answer.status_code == 200, answer.text
            requests.append(answer.headers["x-request-id"])
        again = await start_server(data, port=port)
        try:
            await until(lambda: not router.degraded)
            await router.writers.flush()
            async with anyio.create_task_group() as group:
                historian = Historian(await fleet.connect("historian"), fleet.name, tmp_path / "history", servers=[url])
                await group.start(historian.run)
                explained = [await historian.past.explain(request, None) for request in requests]
                group.cancel_scope.cancel()
        finally:
            await again.stop()
    assert [each["recomputed"]["differences"] for each in explained] == [[]] * 12
