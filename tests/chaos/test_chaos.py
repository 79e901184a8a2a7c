"""Half a minute of chaos for each of few seeds. `make chaos` goes on for as long as you like.

A failure says its seed; `CHAOS_SEEDS=7 pytest tests/chaos/test_chaos.py` plays it again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.chaos.faults import Ground, schedule
from tests.chaos.report import PAGE, made, written
from tests.chaos.run import Run, Settings

if TYPE_CHECKING:
    from pathlib import Path

SEEDS = [int(seed) for seed in os.environ.get("CHAOS_SEEDS", "33").split(",")]
MINUTES = 0.25
GROUND = Ground(("nats-1", "nats-2", "nats-3"), ("router-1", "router-2", "historian"), cuts=True)


@pytest.mark.anyio
# nats-py forgets a connection on which a stopped server never said a word.
@pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")
@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_promised_is_broken_by_chaos(tmp_path: Path, seed: int) -> None:
    output: list[str] = []
    settings = Settings(seed=seed, minutes=MINUTES, round_seconds=MINUTES * 60)
    try:
        report = await Run(tmp_path, settings, output.append).go()
    except Exception as error:
        error.add_note("\n".join([f"CHAOS_SEEDS={seed}", *output]))
        raise
    assert report["violations"] == [], "\n".join(output)
    # Load got through and faults were played, or this attacked nothing.
    assert report["acknowledged"] > 50
    assert report["answers"] > 20
    assert report["routes"] > 20
    assert sum(report["faults"].values()) >= 3
    page = written(PAGE.read_text(), made([report]))
    assert f"--seed {seed} " in page
    assert written(page, made([report])) == page


def test_a_seed_gives_the_same_schedule_every_time() -> None:
    assert schedule(7, 0, 120, GROUND) == schedule(7, 0, 120, GROUND) != schedule(8, 0, 120, GROUND)


def test_one_server_at_a_time_but_for_a_phase_at_the_end() -> None:
    for seed in range(30):
        for number in range(4):
            free = 0.0
            faults = schedule(seed, number, 120, GROUND)
            for fault in faults:
                if fault.target in {"two", "all"}:
                    assert fault == faults[-1]
                elif fault.target in {*GROUND.servers, "leader"}:
                    assert fault.at >= free
                    free = fault.at + fault.seconds
