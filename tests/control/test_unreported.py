"""Completions on the log of nodes that report nothing of their caches."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING

import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender
from kvplane.services.protocol import messages
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def unheard_nodes(fleet: Fleet) -> list[str]:
    nodes = (await fleet.ask("coordinator.node.list", messages.ListRequest()))["nodes"]
    return [row["node"] for row in nodes if row["unheard"]]


async def test_who_completes_prompts_and_tells_nothing_is_named(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.router()
    epochs = {}
    for node, mode in (("short", "reported"), ("quiet", "reported"), ("heard", "reported"), ("managed", "managed")):
        request = messages.RegisterRequest(
            node=node, address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 4}, cache_mode=mode
        )
        epochs[node] = (await fleet.ask("coordinator.node.register", request))["epoch"]
    appender = Appender(fleet.client, fleet.name, "w")

    async def report(node: str) -> None:
        stored = types.BlocksStored(node, epochs[node], 1, pack_hashes([7]))
        await appender.append(f"kv.{fleet.name}.cache.{node}", [stored])

    async def completed(node: str, prompt: int, cached: int = 0) -> None:
        done = messages.CompleteRequest(request=f"{node}-1", node=node, prompt_tokens=prompt, cached_tokens=cached)
        await fleet.ask("complete", done)

    await report("heard")
    await completed("short", 16)
    await completed("short", 64, 48)
    await completed("heard", 64)
    await completed("managed", 64)
    await completed("quiet", 17)
    await until(lambda: coordinator.unreported.silent("quiet", time.monotonic()))
    assert await unheard_nodes(fleet) == ["quiet"]
    # Another coordinator reads the same of the log.
    second = await fleet.coordinator()
    await until(lambda: second.unreported.silent("quiet", time.monotonic()))
    assert await unheard_nodes(fleet) == ["quiet"]
    await report("quiet")
    await until(lambda: not (second.unreported.silent("quiet", inf) or coordinator.unreported.silent("quiet", inf)))
    assert await unheard_nodes(fleet) == []
