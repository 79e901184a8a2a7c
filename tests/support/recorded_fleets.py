"""What tests of recorded fleets begin with: requests, runs, and what came of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from kvplane.events.hashing import pack_hashes
from kvplane.services.simulation.trace import Work, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, generate
from kvplane.services.simulation.world import Outcome, Settings, World
from kvplane.services.whatif.recorded import (
    Recorded,
    RecordedRequest,
    RecordedWorld,
)

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
GAP = 31.0
CHAINS = [(1, 2, 3, 4, 5, 6), (1, 2, 13, 14), (1, 2, 3, 24), (31, 32, 33)]
"""Seconds after which nothing runs any more and all predictions are forgotten."""


def asks(arrival: float, name: str, *blocks: int, size: int = SIZE, **options: Any) -> RecordedRequest:
    options = {"model": "m", "output_tokens": 20, **options}
    return RecordedRequest(
        hashes=pack_hashes(blocks), tokens=len(blocks) * size + 5, arrival=arrival, request=name, **options
    )


def world_of(recorded: Recorded, policy: str = "blocks", *, follow: bool = False, **paces: float) -> RecordedWorld:
    return RecordedWorld(recorded, Settings(policy=policy, delay=0.002), paces, follow=follow)


def finished(world: World) -> Outcome:
    """The outcome, with everything that was said on the log."""
    outcome = world.run()
    world._see(math.inf)
    return outcome


def held(world: World, node: str) -> set[int]:
    known = world.state.nodes[node]
    return set(world.state.caches.index(known.model).held(known.slots["gpu"]))


def engine_holds(world: World, node: str) -> set[int]:
    return set(world._engines[world._alive[node]].cache.blocks)


def went(outcome: Outcome) -> dict[str, tuple[str, int]]:
    """Node and cached tokens of every request that was served."""
    return {served.request: (outcome.names[served.node], served.cached) for served in outcome.served}


def nodes_of(outcome: Outcome) -> dict[str, str]:
    return {request: node for request, (node, _) in went(outcome).items()}


def spaced(count: int) -> list[Work]:
    """Requests that come one after another."""
    made = [work_of(line, GENERATED_BLOCK_SIZE) for line in generate("multi-turn", count, seed=5)]
    return [replace(work, arrival=at * GAP) for at, work in enumerate(made)]
