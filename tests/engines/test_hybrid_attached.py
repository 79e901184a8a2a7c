"""A hybrid model's engine with its adapter in a fleet: what is foretold before and after the log's format takes groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvplane.events.hashing import block_hashes
from kvplane.events.versions import FORMAT
from kvplane.services.protocol.messages import FormatRequest, ListRequest, LookupRequest, RouteRequest
from kvplane.services.rpc.client import ask
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

PROMPT = [*range(100, 124)]


async def computes(engine: FakeEngine, prompt: list[int], kept: int) -> None:
    """The engine computes a prompt, of which its sliding window keeps the last so many blocks."""
    engine.cache.request(prompt)
    (full,) = [event for event in engine.cache.queue if event["type"] == "BlockStored"]
    full |= {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    names = full["block_hashes"][-kept:]
    sliding = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 9}
    engine.cache.queue.insert(0, full | sliding | {"block_hashes": names, "extra_keys": None})
    await engine.publish()


async def test_a_hybrid_engine_is_foretold_exactly_once_the_log_takes_it(fleet: Fleet) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    engine = FakeEngine(buffer=1)
    size = engine.cache.size

    async def foretold(tokens: list[int]) -> tuple[int, int]:
        """What the log says of a prompt, and what a decision expects."""
        lookup = LookupRequest(model="m", hashes=block_hashes(tokens, size))
        answer: Any = await ask(fleet.client, "kv.default.coordinator.cache.lookup", lookup)
        await until(lambda: router.state.sequence >= coordinator.state.sequence)
        route = await fleet.ask("route", RouteRequest(model="m", tokens=[*tokens, 1], dry_run=True))
        return answer["matches"]["a"], route["matched_blocks"]

    async def row() -> dict[str, Any]:
        answer: Any = await ask(fleet.client, "kv.default.coordinator.node.list", ListRequest())
        return dict(answer["nodes"][0])

    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        (adapter,) = live.service.adapters
        await until(lambda: adapter.published.live)
        await computes(engine, PROMPT, kept=2)
        node = coordinator.state.nodes["a"]
        await until(lambda: coordinator.state.caches.held(node) == 6)
        assert await foretold(PROMPT[:-size]) == (5, 5)
        beats = coordinator.liveness.heartbeats
        await until(lambda: "a" in beats and beats["a"].inexact)
        assert "kvplane format raise" in (await row())["inexact"]
        await ask(fleet.client, "kv.default.coordinator.format.raise", FormatRequest())
        assert coordinator.state.format == FORMAT
        before = adapter.epoch
        adapter._models_at = 0.0
        await until(lambda: coordinator.state.nodes["a"].groups is not None)
        assert adapter.epoch > before
        await until(lambda: coordinator.state.caches.held(coordinator.state.nodes["a"]) == 6)
        # The window of 9 tokens needs two blocks before its end, and these two are there only for the whole prompt.
        assert await foretold(PROMPT[:-size]) == (0, 0)
        assert await foretold(PROMPT) == (6, 6)
        await until(lambda: beats["a"].epoch > before and not beats["a"].inexact)
        shown = await row()
        group = {"kind": "sliding", "window": 9, "span": 1, "held_blocks": 2}
        assert ("inexact" in shown, [*shown["groups"].values()]) == (False, [group])


async def test_the_next_adapter_knows_from_the_log_what_groups_hold(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator(newest=True)
    # Its replay buffer does not reach back.
    engine = FakeEngine(buffer=1)
    async with running(engine):
        epochs: list[int] = []
        for _ in range(2):
            async with attaching(fleet, engine.url) as live:
                await live.member()
                (adapter,) = live.service.adapters
                await until(lambda adapter=adapter: adapter.published.live)  # type: ignore[misc]
                if not epochs:
                    await computes(engine, PROMPT[:-4], kept=2)
                    await computes(engine, PROMPT, kept=1)
                    await until(lambda: coordinator.state.caches.held(coordinator.state.nodes["a"]) == 6)
                await until(lambda: coordinator.state.nodes["a"].groups is not None)
                node = coordinator.state.nodes["a"]
                await until(lambda node=node: coordinator.state.caches.groups.held(node, 0) == 3)  # type: ignore[misc]
                epochs.append(node.epoch)
        assert epochs[0] < epochs[1]
