"""Requests for those who have no trace: four kinds of traffic, made from a seed, in the form of a trace.

Sessions begin as a Poisson process and go on in turns; a prompt is the whole conversation so far, so it continues the
chain of the prompt before. Lengths are log-normal, popularity of what is shared falls as 1/rank. Times are as if each
answer took what an idle node needs; how a fleet keeps up is what a simulation shows. Closed loops
are in `agents`.
"""

from __future__ import annotations

import math
import random
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from msgspec import Struct

from kvplane.services.protocol.errors import BadRequest
from kvplane.services.simulation.trace import TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

GENERATED_BLOCK_SIZE = 64
"""Tokens a block in generated workloads."""
GENERATED_REQUESTS = 6000
"""How many are made if nobody says it."""
TOKEN_SECONDS = 0.01
"""Time that a token of an answer takes here."""


class Kind(Struct, frozen=True, kw_only=True):
    """One kind of traffic. Lengths are medians in tokens; `spread` is the sigma of their logarithm."""

    summary: str
    rate: float
    """Requests per second."""
    shared: int
    """How many beginnings (system prompts, documents) the sessions share."""
    shared_tokens: int
    question: int
    answer: int
    turns: float = 1.0
    """Mean number of turns of a session."""
    pause: float = 0.0
    """Mean seconds between an answer and the next question."""
    fork: float = 0.0
    """Chance that a turn starts a second session that goes on from there."""
    spread: float = 0.7
    sessions: bool = True
    """Whether requests name their session."""
    seeded: str = ""
    """A former name, whose seeds make the same requests as ever."""


KINDS = {
    "multi-turn": Kind(
        summary="people who work on their texts: a few system prompts, about 6 turns, half a minute between them",
        rate=40, shared=8, shared_tokens=2000, question=2000, answer=250, turns=6, pause=30,
    ),
    "shared-prefix": Kind(
        summary="questions about long documents, some of them popular",
        rate=50, shared=300, shared_tokens=8000, question=1500, answer=150, spread=0.6, sessions=False,
    ),
    "tools": Kind(
        summary="programs that call tools, in an open loop: a long beginning, some 20 quick turns, some of which branch",
        rate=40, shared=6, shared_tokens=6000, question=700, answer=80, turns=20, pause=3, fork=0.03,
        seeded="agent",
    ),
    "single-turn": Kind(
        summary="prompts that share nothing but a short system prompt",
        rate=40, shared=4, shared_tokens=200, question=2500, answer=250, spread=0.9, sessions=False,
    ),
}  # fmt: skip


class _Text:
    """A prompt that grows: its tokens, and the ids of its full blocks."""

    __slots__ = ("ids", "tokens")

    def __init__(self, ids: list[int], tokens: int) -> None:
        self.ids = ids
        self.tokens = tokens

    def extend(self, tokens: int, fresh: Iterator[int]) -> None:
        self.tokens += tokens
        while len(self.ids) < self.tokens // GENERATED_BLOCK_SIZE:
            self.ids.append(next(fresh))


def generate(kind: str, requests: int, *, seed: int = 0, rate: float | None = None) -> list[TraceRequest]:
    """Requests of a kind, in order of time. `rate` is in requests per second. Raises `BadRequest`."""
    if kind not in KINDS:
        raise BadRequest(f"{kind!r} is no kind of workload; there are {', '.join(KINDS)}")
    form = KINDS[kind]
    rng = random.Random(f"{form.seeded or kind} {seed}")  # noqa: S311 - a repeatable workload, no secret
    fresh = count(1)

    def length(median: int) -> int:
        return max(1, round(rng.lognormvariate(math.log(median), form.spread)))

    beginnings = []
    for _ in range(form.shared):
        text = _Text([], 0)
        text.extend(length(form.shared_tokens), fresh)
        beginnings.append(text)
    weights = [1 / (rank + 1) for rank in range(form.shared)]
    # What branches off branches again.
    started = (rate or form.rate) / form.turns * (1 - form.fork * form.turns)
    waiting: list[tuple[float, int, _Text]] = []
    names = count(1)
    begin = 0.0
    made: list[TraceRequest] = []
    while len(made) < requests:
        while not waiting or begin <= waiting[0][0]:
            begin += rng.expovariate(started)
            beginning = rng.choices(beginnings, weights)[0]
            heappush(waiting, (begin, next(names), _Text(list(beginning.ids), beginning.tokens)))
        time, session, text = heappop(waiting)
        text.extend(length(form.question), fresh)
        answer = length(form.answer)
        made.append(
            TraceRequest(
                timestamp=round(time * 1000, 3), input_length=text.tokens, output_length=answer,
                hash_ids=list(text.ids), session=f"session-{session}" if form.sessions else "",
                block_size=GENERATED_BLOCK_SIZE,
            )
        )  # fmt: skip
        text.extend(answer, fresh)
        if form.fork and rng.random() < form.fork:
            branch = _Text(list(text.ids), text.tokens)
            heappush(waiting, (time + answer * TOKEN_SECONDS + 0.1, next(names), branch))
        if rng.random() < 1 - 1 / form.turns:
            pause = rng.expovariate(1 / form.pause)
            heappush(waiting, (time + answer * TOKEN_SECONDS + pause, session, text))
    return made
