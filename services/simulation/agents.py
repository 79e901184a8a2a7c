"""Sessions of coding agents as a closed loop, made from a seed by what a `Profile` says of such traffic.

A session begins with a context, its first part perhaps common with other sessions, and each turn adds to it: an answer, what
a tool said, what a person wrote. Now and then, and when it would become longer than the session's contexts do, it is made
anew and only its beginning is kept. After some turns sub-agents begin, and the session waits for them. What sessions differ
in (turns, lengths, and whether their growth, pauses and answers are large or small) is drawn together, so that those that go
together in the fitted traffic do so here.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate, count
from statistics import NormalDist
from typing import TYPE_CHECKING

from msgspec import Struct

from kvplane.services.simulation.trace import TraceRequest
from kvplane.services.simulation.workloads import KINDS, TOKEN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "agent"
WORKLOADS = (*KINDS, NAME)
"""All that can be generated."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0)
_NORMAL = NormalDist()
_MOST_TURNS = 100_000
_GOLDEN = 1.1127756842787055
"""x^7 = x + 1: steps of its powers fill six dimensions evenly (an additive recurrence, as the golden ratio fills one)."""
MOST_SHIFT = 2.0
"""How far a session's growth is shifted at the most, in standard deviations between sessions, so that its contexts become as
long as they are to be."""
HALVINGS = 7


class Spread(Struct, frozen=True):
    """How a figure spreads: its values at `QUANTILES`. What lies between two is drawn evenly on a scale of logarithms."""

    values: tuple[float, ...]

    def at(self, share: float) -> float:
        """The value that this share of all stays below."""
        place = min(bisect_right(QUANTILES, share), len(QUANTILES) - 1)
        low, high = QUANTILES[place - 1], QUANTILES[place]
        logarithms = _logarithms(self.values)
        first, second = logarithms[place - 1], logarithms[place]
        return math.expm1(first + (second - first) * (share - low) / (high - low))

    @property
    def mean(self) -> float:
        """The mean of what is drawn."""
        return sum(self.at((step + 0.5) / 1000) for step in range(1000)) / 1000


@lru_cache(maxsize=256)
def _logarithms(values: tuple[float, ...]) -> list[float]:
    return [math.log1p(value) for value in values]


NONE = Spread((0.0,) * len(QUANTILES))
ONE = Spread((1.0,) * len(QUANTILES))
TOGETHER = ("turns", "longest", "start", "growth", "delay", "output")
"""What a session has one of, and what is drawn together."""


class PerTurn(Struct, frozen=True, kw_only=True):
    """A figure that each turn has: how it spreads over all turns, and how much of that is between sessions.

    `middle`, `between` and `within` are in standard deviations of a normal number of which the value is the quantile.
    """

    spread: Spread
    middle: float = 0.0
    """Mean of the sessions' own means; not 0 where sessions with few turns are unlike those with many."""
    between: float = 0.0
    """How far sessions are apart."""
    within: float = 1.0
    """How far the turns of a session are apart."""

    def at(self, session: float, turn: float) -> float:
        """The value of a turn; both are normal numbers."""
        return self.spread.at(_NORMAL.cdf(self.middle + self.between * session + self.within * turn))


class Shape(Struct, frozen=True, kw_only=True):
    """How sessions of one kind are. Lengths are tokens."""

    turns: Spread
    longest: Spread
    """The longest prompt of a session."""
    start: Spread
    """Its first prompt, as a share of that."""
    growth: PerTurn
    """From one prompt to the next, the answer included."""
    delay: PerTurn
    """Seconds from an answer to the next request: tools, or a person who thinks."""
    output: PerTurn
    correlations: tuple[tuple[float, ...], ...] = ()
    """Of `TOGETHER`, by rank; none when they are independent."""
    anew: float = 0.0
    """Share of turns whose context is made anew before it is at its longest."""
    anew_size: Spread = ONE
    """Length of such a context, over that of the one before."""
    anew_kept: Spread = NONE
    """Tokens that it keeps from the beginning."""
    common: float = 0.0
    """Share of sessions that begin as others do."""
    beginnings: int = 1
    """How many such beginnings there are; their popularity falls as 1/rank."""
    beginning: Spread = NONE
    """Their length."""


class Profile(Struct, frozen=True, kw_only=True):
    """Traffic of coding agents."""

    block_size: int
    rate: float
    """Sessions that begin a second."""
    session: Shape
    agent: Shape | None = None
    """Sub-agents; none when there are none."""
    spawning: float = 0.0
    """Share of a session's turns after which sub-agents begin."""
    beside: Spread = ONE
    """How many begin at once."""
    agent_delay: Spread = NONE
    """Seconds from the session's answer to the first request of a sub-agent."""

    @property
    def requests(self) -> float:
        """Mean requests of a session with its sub-agents."""
        agents = self.spawning * self.beside.mean * self.agent.turns.mean if self.agent is not None else 0.0
        return self.session.turns.mean * (1 + agents)


DEFAULT_SESSIONS = 100
DEFAULT = Profile(
    block_size=512, rate=0.055,
    session=Shape(
        turns=Spread((3, 10, 22, 48, 100, 190, 380, 560, 1000)),
        longest=Spread((10304, 35000, 65600, 115008, 149632, 200000, 400000, 550000, 785280)),
        start=Spread((0.03, 0.09, 0.12, 0.18, 0.5, 0.9, 0.97, 0.99, 1)),
        growth=PerTurn(spread=Spread((0, 150, 300, 600, 1300, 3200, 8000, 16000, 60000)), between=0.5, within=0.87),
        delay=PerTurn(spread=Spread((0, 2, 4, 8, 25, 110, 250, 300, 300)), between=0.5, within=0.87),
        output=PerTurn(spread=Spread((1, 60, 120, 230, 500, 1100, 2600, 5000, 16000)), between=0.4, within=0.92),
        anew=0.01, anew_size=Spread((0.05, 0.15, 0.25, 0.4, 0.7, 0.95, 1, 1, 1)),
        anew_kept=Spread((10000, 10500, 11500, 12500, 13500, 14000, 14500, 15000, 15000)),
        correlations=(
            (1, 0.6, 0, -0.3, 0, 0), (0.6, 1, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0), (-0.3, 0, 0, 1, 0, 0), (0, 0, 0, 0, 1, 0),
            (0, 0, 0, 0, 0, 1),
        ),
        common=0.9, beginnings=6, beginning=Spread((10000, 10500, 11500, 12500, 13500, 14000, 14500, 15000, 15000)),
    ),
    agent=Shape(
        turns=Spread((1, 3, 6, 12, 22, 38, 60, 80, 150)),
        longest=Spread((8000, 14000, 20000, 32000, 50000, 80000, 120000, 150000, 200000)),
        start=Spread((0.1, 0.25, 0.35, 0.5, 0.7, 0.9, 1, 1, 1)),
        growth=PerTurn(spread=Spread((0, 200, 450, 1000, 2300, 5000, 10000, 16000, 40000)), between=0.4, within=0.92),
        delay=PerTurn(spread=Spread((0, 1, 2, 3, 6, 14, 40, 90, 300)), between=0.4, within=0.92),
        output=PerTurn(spread=Spread((1, 60, 110, 200, 400, 900, 2000, 3500, 8000)), between=0.3, within=0.95),
        common=0.95, beginnings=4, beginning=Spread((5000, 6000, 7000, 8500, 10000, 11000, 12000, 12500, 13000)),
    ),
    spawning=0.008, beside=Spread((1, 1, 1, 1, 2, 3, 4, 4, 6)),
)  # fmt: skip
"""Without a trace to be like. Longest prompts, first prompts, and the tokens of tools and system prompt (a common beginning)
are those that kv-cache-tester's docs/trace_replay_tester.md has of 642 sessions. Means of turns and answers are near those of
TraceLab (arXiv 2606.30560): 84 turns a session and 523 tokens an answer in 4,265 sessions. How growth and pauses spread, and
how often sub-agents begin, is assumed."""


class _Context:
    """A prompt that grows: its tokens, and the ids of its full blocks."""

    __slots__ = ("_fresh", "_size", "ids", "tokens")

    def __init__(self, size: int, fresh: Iterator[int], ids: list[int]) -> None:
        self._size = size
        self._fresh = fresh
        self.ids = ids
        self.tokens = len(ids) * size

    def to(self, tokens: int, *, kept: int | None = None) -> None:
        """Make it so long. Only so many tokens of it stay as they are; all that fit if not given."""
        blocks = tokens // self._size
        stay = min(len(self.ids), blocks, *([] if kept is None else [kept // self._size]))
        self.ids = self.ids[:stay]
        self.ids += [next(self._fresh) for _ in range(blocks - stay)]
        self.tokens = tokens


class _Kind:
    """Sessions of one shape, with the beginnings that they share."""

    def __init__(self, shape: Shape, size: int, fresh: Iterator[int], rng: random.Random) -> None:
        self.shape = shape
        self._lower = _cholesky(shape.correlations)
        self._shifts = [rng.random() for _ in TOGETHER]
        self.beginnings: list[list[int]] = []
        shares = [(rank + 0.5) / shape.beginnings for rank in range(shape.beginnings if shape.common else 0)]
        rng.shuffle(shares)
        for share in shares:
            context = _Context(size, fresh, [])
            context.to(round(shape.beginning.at(share)))
            self.beginnings.append(context.ids)
        self._weights = list(accumulate(1 / (rank + 1) for rank in range(len(self.beginnings))))

    def drawn(self, rng: random.Random, number: int | None = None) -> dict[str, float]:
        """Normal numbers for what is drawn together; those of numbered sessions are spread as evenly as few can be."""
        free = [rng.gauss(0, 1) for _ in TOGETHER]
        if number is not None:
            shares = ((shift + number * _GOLDEN ** -(place + 1)) % 1 for place, shift in enumerate(self._shifts))
            free = [_NORMAL.inv_cdf(min(max(share, 1e-9), 1 - 1e-9)) for share in shares]
        rows = self._lower or [[float(row == column) for column in range(len(free))] for row in range(len(free))]
        return {name: sum(map(float.__mul__, row, free)) for name, row in zip(TOGETHER, rows, strict=True)}

    def beginning(self, rng: random.Random) -> list[int]:
        """The blocks that a session begins with, as others do."""
        if rng.random() >= self.shape.common or not self.beginnings:
            return []
        return rng.choices(self.beginnings, cum_weights=self._weights)[0]


def _cholesky(matrix: tuple[tuple[float, ...], ...]) -> list[list[float]]:
    """The lower triangle whose product with its transpose is the matrix."""
    lower = [[0.0] * len(matrix) for _ in matrix]
    for row in range(len(matrix)):
        for column in range(row + 1):
            rest = matrix[row][column] - sum(lower[row][k] * lower[column][k] for k in range(column))
            lower[row][column] = math.sqrt(max(rest, 1e-9)) if row == column else rest / lower[column][column]
    return lower


class _Made(Struct):
    """The requests of a session with its sub-agents, and the time of its last answer, in seconds."""

    lines: list[tuple[float, TraceRequest]]
    end: float


class _Maker:
    def __init__(self, profile: Profile, seed: int) -> None:
        self._profile = profile
        self._seed = seed
        self._fresh = count(1)
        rng = self.rng("beginnings")
        self.sessions = _Kind(profile.session, profile.block_size, self._fresh, rng)
        self._agents = None if profile.agent is None else _Kind(profile.agent, profile.block_size, self._fresh, rng)

    def rng(self, what: str) -> random.Random:
        """Numbers of one session: the others stay the same, whatever it draws."""
        return random.Random(f"{NAME} {self._seed} {what}")  # noqa: S311 - a repeatable workload, no secret

    def session(
        self, kind: _Kind, name: str, begin: float, rng: random.Random, *, parent: str = "", delay: float | None = None,
        number: int | None = None,
    ) -> _Made:  # fmt: skip
        shape, size = kind.shape, self._profile.block_size
        drawn = kind.drawn(rng, number)
        turns, longest, start = (
            getattr(shape, name).at(_NORMAL.cdf(drawn[name])) for name in ("turns", "longest", "start")
        )
        turns, longest, first = round(turns), round(longest), max(1, round(longest * start))
        growth = _Growth(shape, min(_MOST_TURNS, max(1, turns)) - 1, first, longest, drawn["growth"], rng)
        context = _Context(size, self._fresh, kind.beginning(rng)[: first // size])
        context.to(first)
        made = _Made([], begin)
        time, agents = begin, 0
        for turn, step in enumerate([None, *growth.steps]):
            if step is not None:
                delay = shape.delay.at(drawn["delay"], rng.gauss(0, 1))
                time = made.end + delay
                context.to(growth.after(step, context.tokens), kept=step.kept)
            output = max(1, round(shape.output.at(drawn["output"], rng.gauss(0, 1))))
            line = TraceRequest(
                timestamp=round(time * 1000), input_length=context.tokens,
                output_length=output, hash_ids=context.ids.copy(), session=name,
                delay=None if delay is None else round(delay * 1000), parent="" if turn else parent, block_size=size,
            )  # fmt: skip
            made.lines.append((time, line))
            answered = made.end = time + line.output_length * TOKEN_SECONDS
            if kind is self.sessions and self._agents is not None and rng.random() < self._profile.spawning:
                for _ in range(round(self._profile.beside.at(rng.random()))):
                    agents += 1
                    after = self._profile.agent_delay.at(rng.random())
                    agent = self.session(
                        self._agents, f"{name}/{agents}", answered + after, rng, parent=name, delay=after
                    )
                    made.lines += agent.lines
                    made.end = max(made.end, agent.end)
        return made


class _Step(Struct):
    """What becomes of a context from one turn to the next: it grows, or is made anew in a size over that of before."""

    turn: float
    """Normal number of its growth."""
    size: float
    kept: int | None
    """Tokens that a context that is made anew keeps; none when it grows."""


class _Growth:
    """How a session's context goes on, such that it comes to be as long as it is to be."""

    def __init__(
        self, shape: Shape, count: int, first: int, longest: int, level: float, rng: random.Random
    ) -> None:  # fmt: skip
        self._shape = shape
        self._longest = longest
        self._little = shape.growth.spread.at(0.5)
        """What a context grows by that is as long as it is to be."""
        self.steps = [
            _Step(
                rng.gauss(0, 1), shape.anew_size.at(rng.random()),
                round(shape.anew_kept.at(rng.random())) if rng.random() < shape.anew else None,
            )
            for _ in range(count)
        ]  # fmt: skip
        low, high = level - MOST_SHIFT, level + MOST_SHIFT
        for _ in range(HALVINGS):
            self._level = (low + high) / 2
            low, high = (low, self._level) if self._reaches(first) else (self._level, high)

    def after(self, step: _Step, tokens: int) -> int:
        """The length of the next prompt."""
        if step.kept is None:
            growth = self._shape.growth.at(self._level, step.turn)
            return tokens + round(growth if tokens + growth <= self._longest else min(growth, self._little))
        return max(1, min(self._longest, round(tokens * step.size)))

    def _reaches(self, tokens: int) -> bool:
        for step in self.steps:
            tokens = self.after(step, tokens)
            if tokens >= self._longest:
                return True
        return False


def generate_agents(
    profile: Profile = DEFAULT, *, sessions: int | None = None, requests: int | None = None, seed: int = 0,
    rate: float | None = None,
) -> list[TraceRequest]:  # fmt: skip
    """So many sessions, or so many requests of whole sessions, the last of which is cut; in order of time.

    Without either there are `DEFAULT_SESSIONS`.

    `rate` is in requests a second in the long run. Times are as if each answer took what an idle node needs.
    """
    maker = _Maker(profile, seed)
    started = profile.rate if rate is None else rate / profile.requests
    begins = maker.rng("begins")
    begin = 0.0
    found: list[tuple[float, TraceRequest]] = []
    if sessions is None and requests is None:
        sessions = DEFAULT_SESSIONS
    for number in count(1):
        if (sessions is not None and number > sessions) or (requests is not None and len(found) >= requests):
            break
        begin += begins.expovariate(started)
        made = maker.session(maker.sessions, f"session-{number}", begin, maker.rng(str(number)), number=number)
        # A session's sub-agents stand between its turns, at the end of which is the one that is cut.
        lines = sorted(made.lines, key=lambda line: line[0])
        found += lines if requests is None else lines[: requests - len(found)]
    return [line for _, line in sorted(found, key=lambda line: line[0])]
