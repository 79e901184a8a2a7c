"""Sessions with a common beginning that send one request at a time: nothing is in flight when the next one is decided."""

from __future__ import annotations

from collections import Counter

import pytest

from kvplane.events.hashing import pack_hashes
from kvplane.services.simulation.results import summarize
from kvplane.services.simulation.trace import Work
from kvplane.services.simulation.world import Settings, World

SIZE = 512
NODES = 4
MINDFUL = ["ttft", "cascade", "threshold", "blocks", "e2"]
"""Policies that find a conversation by its blocks; `session` needs its name."""


def paced(sessions: int, turns: int, *, growth: int, named: bool) -> list[Work]:
    """Turns of all sessions in turn, each three seconds after the one before, with 16 common blocks."""
    work = []
    for number in range(sessions * turns):
        turn, session = divmod(number, sessions)
        own = range(1000 * (session + 1), 1000 * (session + 1) + growth * (turn + 1))
        hashes = pack_hashes([*range(1, 17), *own])
        work.append(Work(hashes, len(hashes) // 8 * SIZE + 9, 30, f"s{session}" if named else "", 3.0 * number))
    return work


def spread(policy: str, work: list[Work], *, ideal: float) -> None:
    """The sessions live on all nodes alike, and find what they had."""
    outcome = World(Settings(nodes=NODES, policy=policy, block_size=SIZE, capacity=6000), work).run()
    summary = summarize(outcome, policy, ideal)
    found = Counter(served.node for served in outcome.served)
    assert summary.imbalance <= 1.5, found
    assert summary.hit_rate >= 0.99 * ideal, found


@pytest.mark.parametrize(
    ("policy", "named"), [(policy, named) for policy in MINDFUL for named in (True, False)] + [("session", True)]
)
def test_a_common_beginning_does_not_decide_where_conversations_live(policy: str, named: bool) -> None:
    work = paced(8, 56, growth=2, named=named)
    total = sum(request.tokens for request in work)
    # All but what is new in each turn, and what each node has to compute of the beginning.
    spread(policy, work, ideal=1 - (8 * 56 * 2 + NODES * 16) * SIZE / total)


@pytest.mark.parametrize("policy", [*MINDFUL, "session"])
def test_contexts_that_are_too_many_for_one_node_are_on_all(policy: str) -> None:
    work = paced(96, 6, growth=20, named=True)
    total = sum(request.tokens for request in work)
    spread(policy, work, ideal=1 - (96 * 6 * 20 + NODES * 16) * SIZE / total)
