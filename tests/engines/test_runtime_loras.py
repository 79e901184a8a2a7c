"""LoRAs that are loaded and unloaded while the engine is a node: known within a minute, and nothing of its cache is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvplane.services.protocol.messages import RouteRequest
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_what_is_served_follows_the_engine(fleet: Fleet, kind: str) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    engine = FakeEngine(kind)
    async with running(engine), attaching(fleet, engine.url, kind=kind) as live:
        await live.member()
        (adapter,) = live.service.adapters
        await until(lambda: adapter.published.live)
        engine.cache.request([1] * 3 * engine.cache.size)
        await engine.publish()

        def held() -> set[int]:
            node = coordinator.state.nodes["a"]
            return set(coordinator.state.caches.index(node.model).held(node.slots["gpu"])) if node.slots else set()

        def registered() -> list[str]:
            return coordinator.state.nodes["a"].registered.models

        await until(lambda: held() == engine.cache.held())
        base = {"id": "m", "parent": None}
        for loras in (["ad", "new"], ["new"], []):
            before = coordinator.state.nodes["a"].epoch
            engine.models = [base, *({"id": name, "parent": "m"} for name in loras)]
            adapter._models_at = 0.0
            await until(lambda loras=loras: set(registered()) == {"m", *loras}, 20)  # type: ignore[misc]
            node = coordinator.state.nodes["a"]
            assert node.epoch > before
            assert node.registered.labels.get("adapters_from") == ("1" if loras and kind == "vllm" else None)
            await until(lambda: held() == engine.cache.held())
            await until(lambda: router.state.sequence >= coordinator.state.sequence)
            for name in ("ad", "new"):
                request = RouteRequest(model=name, tokens=[1, 2, 3, 4, 5], dry_run=True)
                if name in loras:
                    assert (await fleet.ask("route", request))["node"] == "a"
                else:
                    assert await fleet.refused("route", request) == "unknown_model"
        assert adapter.track.gaps == 0


async def test_a_list_of_nothing_and_the_same_list_change_nothing(fleet: Fleet) -> None:
    await fleet.coordinator()
    engine = FakeEngine()
    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        (adapter,) = live.service.adapters
        before, models = adapter.epoch, engine.models
        for listed in ([], models[::-1], models):
            engine.models = listed
            adapter._models_at = 0.0
            await until(lambda: adapter._models_at > 0)
            assert adapter.life.reporting
        assert (adapter.epoch, adapter.member.registrations) == (before, 1)
        # The last one does show.
        engine.models = [*models, {"id": "more", "parent": "m"}]
        adapter._models_at = 0.0
        await until(lambda: adapter.epoch > before)
