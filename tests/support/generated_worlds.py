"""Simulated fleets under generated workloads."""

from __future__ import annotations

from typing import Any

import msgspec

from kvplane.services.simulation.trace import Work, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, generate
from kvplane.services.simulation.world import Change, Settings, World


def generated(kind: str, count: int, **options: Any) -> list[Work]:
    return [work_of(line, GENERATED_BLOCK_SIZE) for line in generate(kind, count, **options)]


def outcome_bytes(seed: int = 0) -> bytes:
    chosen = Settings(
        nodes=4, capacity=800, block_size=GENERATED_BLOCK_SIZE, routers=3, delay=0.05, seed=seed,
        changes=(Change(2.0, "node-2", joins=False), Change(4.0, "node-5", joins=True)),
    )  # fmt: skip
    return msgspec.json.encode(World(chosen, generated("tools", 250, seed=7)).run())
