"""The gateway while the log is away: it goes on, however many requests come and go meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.protocol.messages import RegisterRequest
from tests.support.gateways import PROMPT, answers, on_engines
from tests.support.scripted_engine import MODEL, ScriptedEngine
from tests.support.waiting import until

if TYPE_CHECKING:
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
