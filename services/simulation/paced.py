"""Sessions that send one request at a time, all with one beginning: nothing is in flight when the next one is decided.

So agents pace themselves, and their system prompts are common. Where the beginning decides, all of them live on one node.
"""

from __future__ import annotations

from typing import NamedTuple

from kvplane.events.hashing import pack_hashes
from kvplane.services.simulation.compare import parse_choice
from kvplane.services.simulation.results import Summary, summarize
from kvplane.services.simulation.trace import Work
from kvplane.services.simulation.world import Settings, World

SIZE = 512
NODES = 4
CAPACITY = 6000
COMMON = 16
"""Blocks of the beginning."""
PAUSE = 3.0
"""Seconds between two requests."""
MINDFUL = ("ttft", "session", "cascade", "threshold", "blocks", "e2")
"""Policies that keep a conversation where its blocks are; `session` needs its name."""


class Situation(NamedTuple):
    """So many sessions of so many turns, each of which adds so many blocks."""

    sessions: int
    turns: int
    growth: int

    @property
    def ideal(self) -> float:
        """The hit rate when only what is new is computed, and the beginning once on each node."""
        total = sum(request.tokens for request in paced(self, named=False))
        return 1 - (self.sessions * self.turns * self.growth + NODES * COMMON) * SIZE / total


SITUATIONS = {
    "8 sessions that fit into one cache": Situation(8, 56, 2),
    "96 sessions that need all caches": Situation(96, 6, 20),
}


def paced(situation: Situation, *, named: bool) -> list[Work]:
    """Turns of all sessions in turn."""
    work = []
    for number in range(situation.sessions * situation.turns):
        turn, session = divmod(number, situation.sessions)
        own = range(1000 * (session + 1), 1000 * (session + 1) + situation.growth * (turn + 1))
        hashes = pack_hashes([*range(1, COMMON + 1), *own])
        name = f"s{session}" if named else ""
        work.append(Work(hashes, len(hashes) // 8 * SIZE + 9, 30, name, PAUSE * number))
    return work


def serve_paced(name: str, policy: str) -> Summary:
    """One policy in one situation; sessions are named only where nothing else would find them."""
    situation, choice = SITUATIONS[name], parse_choice(policy)
    settings = Settings(
        nodes=NODES, policy=choice.policy, parameters=choice.parameters, block_size=SIZE, capacity=CAPACITY
    )
    work = paced(situation, named=choice.policy == "session")
    return summarize(World(settings, work).run(), policy, situation.ideal)
