"""What tests of recorded fleets begin with: requests, runs, and what came of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE
from kvplane.services.simulation.world import START, Settings, World
from kvplane.services.whatif.recorded import (
    Recorded,
    RecordedChange,
    RecordedRequest,
    recorded_from,
    run_recorded,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.simulation.trace import Work

import math
from pathlib import Path

from kvplane.services.simulation.trace import Work, work_of
from kvplane.services.simulation.workloads import generate
from kvplane.services.simulation.world import Outcome
from kvplane.services.whatif.recorded import (
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


SMALL = Settings(nodes=3, capacity=400, block_size=GENERATED_BLOCK_SIZE, policy="blocks")


def cut(work: Sequence[Work], at: int, settings: Settings = SMALL, *, with_used: bool = True) -> tuple[World, Recorded]:
    """A simulated fleet that has served requests up to one, and what is recorded of it and of those that follow."""
    world = World(settings, work[:at])
    outcome = finished(world)
    begin = at * GAP
    names = {served.request: outcome.names[served.node] for served in outcome.served}
    used = [(names[f"0.{number}"], request.hashes) for number, request in enumerate(work[:at])]
    follow = [
        RecordedRequest(
            request.hashes, request.tokens, request.output_tokens, request.session, request.arrival - begin,
            request=f"0.{number}", model="sim",
        )
        for number, request in enumerate(work[at:], at)
    ]  # fmt: skip
    start = int((START + begin) * 10**9)
    return world, recorded_from(world.state, follow, used=used if with_used else (), start=start)


def recorded_bytes() -> bytes:
    """A run whose caches are of the index alone, with failures and two routers."""
    _, recorded = cut(spaced(120), 80, replace(SMALL, policy="ttft"), with_used=False)
    changes = (RecordedChange(100.0, types.NodeLost("node-2", "")), RecordedChange(400.0, recorded.nodes[1].registered))
    quick = tuple(replace(request, arrival=request.arrival / 60) for request in recorded.requests)
    recorded = replace(recorded, changes=changes, requests=quick)
    return msgspec.json.encode([msgspec.to_builtins(recorded), run_recorded(recorded, routers=2, delay=0.05)])
