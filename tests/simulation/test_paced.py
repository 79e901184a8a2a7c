"""Sessions with a common beginning that send one request at a time: nothing is in flight when the next one is decided."""

from __future__ import annotations

from collections import Counter

import pytest

from kvplane.services.simulation.paced import CAPACITY, MINDFUL, NODES, SITUATIONS, SIZE, Situation, paced, serve_paced
from kvplane.services.simulation.results import summarize
from kvplane.services.simulation.world import Settings, World

FEW, MANY = SITUATIONS.values()


def spread(policy: str, situation: Situation, *, named: bool) -> None:
    """The sessions live on all nodes alike, and find what they had."""
    work = paced(situation, named=named)
    outcome = World(Settings(nodes=NODES, policy=policy, block_size=SIZE, capacity=CAPACITY), work).run()
    summary = summarize(outcome, policy, situation.ideal)
    found = Counter(served.node for served in outcome.served)
    assert summary.imbalance <= 1.5, found
    assert summary.hit_rate >= 0.99 * situation.ideal, found


@pytest.mark.parametrize(
    ("policy", "named"),
    [(policy, named) for policy in MINDFUL for named in (True, False) if named or policy != "session"],
)
def test_a_common_beginning_does_not_decide_where_conversations_live(policy: str, named: bool) -> None:
    spread(policy, FEW, named=named)


@pytest.mark.parametrize("policy", MINDFUL)
def test_contexts_that_are_too_many_for_one_node_are_on_all(policy: str) -> None:
    spread(policy, MANY, named=True)


def test_all_but_what_is_new_is_found_when_it_is_spread() -> None:
    assert serve_paced("8 sessions that fit into one cache", "session").ideal_share == pytest.approx(1.0, abs=1e-3)
