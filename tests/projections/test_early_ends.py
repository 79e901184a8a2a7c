"""Ends of requests that are on the log before their decisions: nodes and routers write by themselves."""

from __future__ import annotations

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections.load import EARLY_LIMIT, Early, Load
from tests.support.fold_given import Given, registered


def active(given: Given, node: str) -> float:
    load = given.state.load.of(node)
    assert load is not None
    return load.active


def test_a_request_whose_end_came_first_does_not_run_for_ever() -> None:
    given = Given()
    given.node(registered("a"))
    given.node(registered("b"))
    given.completes("q", "a")
    given.routes("q", "a", 1, 2)
    assert active(given, "a") == 0
    assert given.state.load.running == {}
    # Sent again it runs, and so does what ended elsewhere.
    given.routes("q", "a", 1, 2)
    assert active(given, "a") == 1
    given.completes("r", "b")
    given.routes("r", "a", 3)
    assert active(given, "a") == 2


def test_an_earlier_try_on_the_same_node_does_not_end_a_later_one() -> None:
    given = Given()
    given.node(registered("a"))
    given.completes("q", "a")
    decided = given.now // 1000 + 1
    again = types.RequestRouted("q", "m", "a", 0, 1, 17, pack_hashes([1]), decided=decided)
    assert given.put("access", "w", again) is None
    assert active(given, "a") == 1


def test_what_is_remembered_of_ends_is_bounded() -> None:
    load = Load()
    for number in range(EARLY_LIMIT + 10):
        load.ended_early(f"q{number}", Early("a", number, served=True))
    assert len(load.early) == EARLY_LIMIT
    assert "q0" not in load.early
    assert f"q{EARLY_LIMIT + 9}" in load.early
