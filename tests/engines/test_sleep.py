"""An engine that sleeps: no candidate, its blocks gone, and back when it is awake."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvplane.services.protocol.messages import RouteRequest
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

STATES = ("awake", "weights_offloaded", "discard_all")


def shown(level: int | None) -> str:
    """vLLM's gauge; of a sleep at level 0 and of a released cache it shows the same."""
    values = {None: (1, 0, 0), 0: (0, 0, 0), 1: (0, 1, 0), 2: (0, 0, 1)}[level]
    return "".join(
        f'vllm:engine_sleep_state{{engine="0",sleep_state="{state}"}} {float(value)}\n'
        for state, value in zip(STATES, values, strict=True)
    )


def held(coordinator: Coordinator) -> set[int]:
    node = coordinator.state.nodes["a"]
    return set(coordinator.state.caches.index(node.model).held(node.slots["gpu"])) if node.slots else set()


@pytest.mark.parametrize("level", [0, 1, 2, None])
async def test_an_engine_that_sleeps_is_no_candidate_and_holds_nothing(fleet: Fleet, level: int | None) -> None:
    """By the gauge, or (none) by `/is_sleeping` alone, as of older ones."""
    coordinator, router = await fleet.coordinator(), await fleet.router()
    engine = FakeEngine()

    def sleep(*, asleep: bool) -> None:
        if level is None:
            engine.sleeping = asleep
        else:
            engine.more_metrics = shown(level if asleep else None)

    sleep(asleep=False)
    route = RouteRequest(model="m", tokens=[1] * 3 * engine.cache.size, dry_run=True)
    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        (adapter,) = live.service.adapters
        await until(lambda: adapter.published.live)
        engine.cache.request([1] * 3 * engine.cache.size)
        await engine.publish()
        await until(lambda: held(coordinator) == engine.cache.held())
        before = adapter.epoch
        sleep(asleep=True)
        await until(lambda: coordinator.state.nodes["a"].lost is not None)
        assert coordinator.state.nodes["a"].lost == "its engine sleeps"
        await until(lambda: router.state.sequence >= coordinator.state.sequence)
        assert await fleet.refused("route", route) == "no_node"
        await until(lambda: adapter.trouble() == "the engine sleeps")
        assert not adapter.track.translator.used()
        beats = coordinator.liveness.heartbeats["a"]
        # It goes on sleeping: nobody hears of it, and nobody takes it for alive.
        await until(lambda: not adapter.sleep.tells())
        assert beats.asleep
        assert coordinator.state.nodes["a"].lost is not None
        sleep(asleep=False)
        await until(lambda: adapter.epoch > before)
        await until(lambda: router.state.sequence >= adapter.epoch)
        answer = await fleet.ask("route", route)
        # Whatever the engine still held: nothing is promised that may be gone.
        assert (answer["node"], answer["matched_blocks"]) == ("a", 0)
        assert not adapter.trouble()
        engine.cache.request([2] * 3 * engine.cache.size)
        await engine.publish()
        await until(lambda: len(held(coordinator)) == 3)


async def test_an_adapter_that_starts_beside_a_sleeping_engine_waits_for_it(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    engine = FakeEngine()
    engine.more_metrics = shown(2)
    engine.cache.request([1] * 3 * engine.cache.size)
    async with running(engine), attaching(fleet, engine.url) as live:
        await engine.publish()
        await until(lambda: "a" in coordinator.state.nodes and coordinator.state.nodes["a"].lost is not None)
        assert held(coordinator) == set()
        engine.more_metrics = shown(None)
        await until(lambda: coordinator.state.nodes["a"].lost is None)
        (adapter,) = live.service.adapters
        await until(lambda: not adapter.trouble())
        assert held(coordinator) == set()


async def test_nonsense_about_sleep_changes_nothing(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    engine = FakeEngine()
    # Another rank's, no number, and a state that is not known.
    engine.more_metrics = (
        'vllm:engine_sleep_state{engine="1",sleep_state="awake"} 0.0\n'
        'vllm:engine_sleep_state{engine="0",sleep_state="awake"} NaN\n'
        'vllm:engine_sleep_state{engine="0",sleep_state="odd"} 0.0\n'
    )
    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        (adapter,) = live.service.adapters
        await until(lambda: adapter._gauges is not None and adapter._gauges.active)
        assert not adapter.sleep.asleep
        assert coordinator.state.nodes["a"].lost is None
