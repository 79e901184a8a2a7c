"""What one node says of its prefill: it moves its own pace, and that of the fleet by a step that the others make up for."""

from __future__ import annotations

import pytest

from kvplane.events import types
from kvplane.projections.digest import digest
from kvplane.projections.snapshot import dump, load
from tests.support.fold_given import Given, registered, replayed

NODES = "abcd"


def fleet(in_force: int) -> Given:
    """Four nodes that are as fast as they say, measured for a while."""
    given = Given()
    if in_force > 1:
        assert given.put("control", "", types.FormatRaised(in_force)) is None
    for name in NODES:
        given.node(registered(name, capacity=1_000_000, speed=1600))
    for at in range(60):
        prefill(given, NODES[at % 4], at)
    return given


def prefill(given: Given, node: str, at: int, seconds: float = 1.0) -> None:
    """A prompt of 1,600 tokens is computed, which should take a second."""
    blocks = range(1000 * at + 1, 1000 * at + 101)
    given.routes(f"q{at}", node, *blocks, after=0)
    given.now += int((seconds - 1) * 1e9)
    given.stores(node, *blocks)


@pytest.mark.parametrize("in_force", [1, 2])
def test_one_late_report_makes_nobody_else_slow(in_force: int) -> None:
    given = fleet(in_force)
    state = given.state.load
    assert 0.9 < state.ratio < 1.1
    prefill(given, "d", 1000, 800)
    own = state.pace[state.ordinal["d"]] / state.speed[state.ordinal["d"]]
    if in_force == 1:
        # As such logs were always read.
        assert state.ratio < 0.1
    else:
        assert 0.9 < state.ratio < 1.1
        assert own < 0.2
        # It is not for ever.
        for at in range(400):
            prefill(given, "d", 2000 + at)
        assert state.pace[state.ordinal["d"]] / state.speed[state.ordinal["d"]] > 0.8
    assert digest(given.state) == digest(replayed(given.messages))
    again = load("f", dump(given.state))
    assert again.load.bounded is (in_force == 2)


def test_one_that_always_reports_late_is_outweighed() -> None:
    given = fleet(2)
    for at in range(400):
        for name in NODES:
            prefill(given, name, 10_000 + 4 * at + NODES.index(name), 50 if name == "d" else 1)
    state = given.state.load
    assert 0.5 < state.ratio < 1.1
    for name in "abc":
        # Its pace and the fleet's together are what it takes.
        assert 0.5 < state.ratio * state.pace[state.ordinal[name]] / state.speed[state.ordinal[name]] < 1.2


def test_a_fleet_that_really_is_slower_is_believed() -> None:
    given = fleet(2)
    for at in range(600):
        prefill(given, NODES[at % 4], 10_000 + at, 5)
    assert 0.15 < given.state.load.ratio < 0.3
