"""An endpoint where nobody publishes is named within seconds; an engine without a replay endpoint is told of once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from kvplane.services.process import logs
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.http_of_services import observed
from tests.support.listeners import listening
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("there", ["", "http"])
async def test_nobody_publishes_at_the_endpoint(fleet: Fleet, tmp_path: Path, there: str) -> None:
    """It need not serve for that. Something else that listens there is nobody as well."""
    await fleet.coordinator()
    async with running(FakeEngine()) as engine, listening("http", tmp_path) as taken:
        endpoint = f"tcp://*:{taken if there else free_port()}"
        logs.configure("info")
        with capture_logs() as lines:
            async with attaching(fleet, engine.url, events=endpoint) as live, observed(live.service) as http:
                await live.member()
                await until(lambda: live.service.readiness().reason == f"node a: nobody publishes at {endpoint}", 20)
                status, _, body = await http.get("/readyz")
                assert (status, f"nobody publishes at {endpoint}" in body) == (503, True)
                assert (await http.metrics())("kvplane_adapter_publishers", node="a") == 0
                # Another one that does is enough.
                live.service.adapters[0].published._socket.connect(f"tcp://127.0.0.1:{engine.ports[1]}")
                await until(lambda: not live.service.readiness().reason, 20)
        (warning,) = [line for line in lines if line["event"] == "nobody_publishes"]
    assert (warning["log_level"], warning["node"], warning["endpoint"]) == ("warning", "a", endpoint)
    assert "--kv-events-config" in warning["hint"]


async def test_an_engine_without_a_replay_endpoint_is_told_of_once(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    engine = FakeEngine(replays=False)
    logs.configure("info")
    with capture_logs() as lines:
        async with running(engine), attaching(fleet, engine.url) as live:
            await live.member()
            (adapter,) = live.service.adapters
            looks = adapter._looks
            looks._idle_seconds = 0.1
            await until(lambda: adapter.published.live)
            for _ in range(5):
                before = looks._idle_at = 0.0
                await until(lambda before=before: looks._idle_at > before)  # type: ignore[misc]
            assert (adapter.repeated_reports, adapter.track.gaps) == (0, 1)
            engine.cache.request([1] * 3 * engine.cache.size)
            await engine.publish()
            await until(lambda: adapter.track.applied)
            node = coordinator.state.nodes["a"]
            index = coordinator.state.caches.index(node.model)
            await until(lambda: set(index.held(node.slots["gpu"])) == engine.cache.held())
    assert [line["event"] for line in lines].count("no_replay_endpoint") == 1
    assert "learned_anew" not in [line["event"] for line in lines]
