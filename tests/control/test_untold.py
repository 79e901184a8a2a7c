"""Completions on the log of nodes that tell nothing of their caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender
from kvplane.services.protocol import messages

if TYPE_CHECKING:
    from tests.conftest import Fleet

pytestmark = pytest.mark.anyio


async def until_unheard(fleet: Fleet, **wanted: bool) -> None:
    with anyio.fail_after(20):
        while True:
            nodes = (await fleet.ask("coordinator.node.list", messages.ListRequest()))["nodes"]
            if {row["node"]: row["unheard"] for row in nodes} == wanted:
                return
            await anyio.sleep(0.05)


async def test_who_completes_prompts_and_tells_nothing_is_named(fleet: Fleet) -> None:
    await fleet.coordinator()
    await fleet.router()
    epochs = {}
    for node, mode in (("short", "reported"), ("quiet", "reported"), ("told", "reported"), ("managed", "managed")):
        request = messages.RegisterRequest(
            node=node, address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 4}, cache_mode=mode
        )
        epochs[node] = (await fleet.ask("coordinator.node.register", request))["epoch"]
    appender = Appender(fleet.client, fleet.name, "w")

    async def tells(node: str) -> None:
        stored = types.BlocksStored(node, epochs[node], 1, pack_hashes([7]))
        await appender.append(f"kv.{fleet.name}.cache.{node}", [stored])

    async def completed(node: str, prompt: int, cached: int = 0) -> None:
        done = messages.CompleteRequest(request=f"{node}-1", node=node, prompt_tokens=prompt, cached_tokens=cached)
        await fleet.ask("complete", done)

    await tells("told")
    await completed("short", 16)
    await completed("short", 64, 48)
    await completed("told", 64)
    await completed("managed", 64)
    await completed("quiet", 17)
    await until_unheard(fleet, short=False, quiet=True, told=False, managed=False)
    # Another coordinator reads the same of the log.
    await fleet.coordinator()
    await until_unheard(fleet, short=False, quiet=True, told=False, managed=False)
    await tells("quiet")
    await until_unheard(fleet, short=False, quiet=False, told=False, managed=False)
