"""Traffic to play with: people who talk to the simulated nodes, for as long as `kvplane up --traffic` runs."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import structlog

from kvplane.events.hashing import block_hashes
from kvplane.services.demo.traffic import Traffic
from kvplane.services.protocol.errors import StepFailed
from kvplane.services.simulation.trace import Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nats.aio.client import Client

PEOPLE_A_NODE = 8
"""How many people there are for each node. Each is a session, so that sessions don't pile up over the days."""
TALKING_A_NODE = 2
"""How many of them talk at the same time."""
PAUSE_SECONDS = 3.0
"""Mean time between an answer and the next question."""
SYSTEM_PROMPTS = 4
SYSTEM_TOKENS = 1024
TURNS = (3, 8)
QUESTION_TOKENS = (40, 200)
ANSWER_TOKENS = (16, 96)
"""Least and most. A conversation stays below 3,500 tokens."""

_log = structlog.get_logger("kvplane.traffic")


class People:
    """People of a fleet with so many simulated nodes, whose blocks have `block_size` tokens; `pause` in seconds."""

    def __init__(
        self, client: Client, fleet: str, model: str, *, nodes: int, block_size: int, pause: float = PAUSE_SECONDS
    ) -> None:
        self.traffic = Traffic(client, fleet, model)
        self.talking = TALKING_A_NODE * nodes
        self._block_size = block_size
        self._pause = pause
        self._names = [f"person-{number + 1}" for number in range(PEOPLE_A_NODE * nodes)]
        self._rng = random.Random()  # noqa: S311 - play, no secret
        # The same whenever they come back.
        seeded = random.Random(15)  # noqa: S311 - the same
        self._systems = [_text(seeded, SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]

    async def run(self) -> None:
        """Talk until cancelled."""
        async with anyio.create_task_group() as group:
            for place in range(self.talking):
                group.start_soon(self._talk, self._names[place :: self.talking])

    async def _talk(self, names: list[str]) -> None:
        """One conversation after the other, each of the next person."""
        while True:
            for name in names:
                await anyio.sleep(self._rng.expovariate(1 / self._pause))
                try:
                    for work in self._conversation(name):
                        await self.traffic.send(work)
                        await anyio.sleep(self._rng.expovariate(1 / self._pause))
                except StepFailed as error:
                    _log.warning("conversation_given_up", session=name, error=str(error))

    def _conversation(self, session: str) -> Iterator[Work]:
        rng = self._rng
        # Popularity falls as 1/rank.
        (system,) = rng.choices(self._systems, [1 / (rank + 1) for rank in range(SYSTEM_PROMPTS)])
        tokens = list(system)
        for _ in range(rng.randint(*TURNS)):
            tokens += _text(rng, rng.randint(*QUESTION_TOKENS))
            answer = rng.randint(*ANSWER_TOKENS)
            yield Work(block_hashes(tokens, self._block_size), len(tokens), answer, session)
            tokens += _text(rng, answer)


def _text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(32_000) for _ in range(length)]
