"""A profile of agents' sessions, fitted to a trace of them.

What is taken from the trace are quantiles, shares and correlations of ranks, of all sessions together: no session of it is
kept, nor any of its prompts.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from kvplane.services.protocol.errors import BadTrace
from kvplane.services.simulation.agents import QUANTILES, PerTurn, Profile, Shape, Spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvplane.services.simulation.trace import Trace, Work

LEAST_SESSIONS = 4
"""A spread can't be told from fewer."""
LEAST_WEIGHT = 0.1
"""Sessions that have nearly the same number of turns say nothing of what goes with it."""
SHRINK = 4
"""Correlations of so many sessions count half: few sessions say little of what goes together."""


class Turns(Struct):
    """One session of a trace, turn by turn; times in seconds. What is between turns has one value less."""

    requests: list[Work]
    hashes: list[NDArray[np.uint64]]
    growth: NDArray[np.float64]
    """Tokens from one prompt to the next."""
    kept: NDArray[np.int64]
    """Leading blocks of each prompt that the one before it had."""
    anew: NDArray[np.bool_]
    """Whether a prompt gave up more than the last block of the one before it."""

    @property
    def parent(self) -> str:
        """The session that it is a sub-agent of."""
        return self.requests[0].parent

    @property
    def delays(self) -> NDArray[np.float64]:
        """From each answer to the next request."""
        return np.array([request.delay for request in self.requests[1:]], np.float64)

    @property
    def outputs(self) -> NDArray[np.float64]:
        """Tokens of the answers."""
        return np.array([request.output_tokens for request in self.requests], np.float64)


def sessions_of(work: Iterable[Work]) -> dict[str, Turns]:
    """The sessions of a closed loop by name, in the order in which they begin in the trace."""
    found: dict[str, list[Work]] = {}
    for request in work:
        if request.session:
            found.setdefault(request.session, []).append(request)
    return {
        name: _turns(requests)
        for name, requests in found.items()
        if all(request.delay is not None for request in requests[1:])
    }


def _turns(requests: list[Work]) -> Turns:
    hashes = [np.frombuffer(request.hashes, "<u8") for request in requests]
    kept = np.array([_same(*pair) for pair in pairwise(hashes)], np.int64)
    before = np.array([len(each) for each in hashes[:-1]], np.int64)
    tokens = np.array([request.tokens for request in requests], np.float64)
    return Turns(requests, hashes, np.diff(tokens), kept, kept < before - 1)


def _same(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
    """How many leading blocks two prompts have in common."""
    shorter = min(len(first), len(second))
    different = first[:shorter] != second[:shorter]
    return int(different.argmax()) if different.any() else shorter


class Common(Struct, frozen=True):
    """How a session begins: its first block, and how many leading blocks of its first prompt another session has, too."""

    first: int
    blocks: int


def common_beginnings(sessions: Sequence[Turns], others: Iterable[Turns]) -> list[Common]:
    """Of each session; `others` are those in which its beginning is looked for, the sessions among them."""
    whole = [np.unique(np.concatenate(each.hashes)) for each in others]
    several: NDArray[np.uint64] = np.zeros(0, np.uint64)
    if whole:
        values, counts = np.unique(np.concatenate(whole), return_counts=True)
        several = values[counts > 1]
    found = []
    for each in sessions:
        first = each.hashes[0]
        alone = ~np.isin(first, several)
        found.append(
            Common(int(first[0]) if len(first) else 0, int(alone.argmax()) if alone.any() else len(first))
        )  # fmt: skip
    return found


def fit(trace: Trace) -> Profile:
    """The profile of a trace's sessions. Raises `BadTrace` when it has too few that are a closed loop."""
    found = sessions_of(trace.work)
    roots = [each for each in found.values() if not each.parent]
    agents = [each for each in found.values() if each.parent]
    if len(roots) < LEAST_SESSIONS:
        raise BadTrace(
            f"the trace has {len(roots)} sessions with delays (delay, in ms, on all lines of a session but its first); to be "
            f"like it takes at least {LEAST_SESSIONS}"
        )
    begins = np.sort([each.requests[0].arrival for each in roots])
    # Those that begin late are few: the first half says how often one begins.
    span = float(begins[len(begins) // 2] - begins[0])
    turns = sum(len(each.requests) for each in roots)
    spawned: dict[tuple[str, bytes], int] = {}
    for begun in _spawning(trace.work, found):
        spawned[begun] = spawned.get(begun, 0) + 1
    everyone = list(found.values())
    return Profile(
        block_size=trace.block_size,
        rate=(len(begins) // 2) / span if span > 0 else 1.0,
        session=_shape(roots, everyone, trace.block_size),
        agent=_shape(agents, everyone, trace.block_size) if agents else None,
        spawning=len(spawned) / turns, beside=_spread(spawned.values()) if spawned else _spread([1.0]),
        agent_delay=_spread(each.requests[0].delay or 0.0 for each in agents),
    )  # fmt: skip


def _spawning(work: Iterable[Work], found: dict[str, Turns]) -> Iterable[tuple[str, bytes]]:
    """Of each sub-agent, its parent and the parent's turn that it came after."""
    last: dict[str, int] = {}
    seen: set[str] = set()
    for request in work:
        if request.session in found and request.session not in seen and request.parent:
            yield request.parent, str(last.get(request.parent, 0)).encode()
        seen.add(request.session)
        last[request.session] = last.get(request.session, 0) + 1


def _spread(values: Iterable[float]) -> Spread:
    found = np.array(list(values), np.float64)
    if not len(found):
        found = np.zeros(1)
    return Spread(tuple(round(max(0.0, float(value)), 6) for value in np.quantile(found, QUANTILES)))


def _per_turn(values: Sequence[NDArray[np.float64]]) -> tuple[PerTurn, NDArray[np.float64]]:
    """A figure of turns, and the level of each session: the mean of its turns' normal numbers."""
    everything = np.concatenate(values)
    if not len(everything):
        return PerTurn(spread=_spread([])), np.zeros(len(values))
    # Equal values have one rank, so that a common one is no noise.
    _, place, counts = np.unique(everything, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2) / len(everything)
    scores = np.split(_normal(ranks)[place], np.cumsum([len(each) for each in values])[:-1])
    levels = np.array([each.mean() if len(each) else 0.0 for each in scores])
    several = [each for each in scores if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    within = sum(float(((each - each.mean()) ** 2).sum()) for each in several) / freedom if freedom else 1.0
    # A mean of few turns is apart from others by chance as well.
    chance = within * float(np.mean([1 / len(each) for each in scores if len(each)]))
    between = max(0.0, float(levels.var()) - chance)
    found = PerTurn(
        spread=_spread(everything), middle=round(float(levels.mean()), 4), between=round(math.sqrt(between), 4),
        within=round(math.sqrt(within), 4),
    )  # fmt: skip
    return found, levels


def _shape(sessions: Sequence[Turns], everyone: Sequence[Turns], size: int) -> Shape:
    growth, growths = _per_turn([np.maximum(each.growth[~each.anew], 0.0) for each in sessions])
    delay, delays = _per_turn([each.delays for each in sessions])
    output, outputs = _per_turn([each.outputs for each in sessions])
    prompts = [np.array([request.tokens for request in each.requests], np.float64) for each in sessions]
    turns = np.array([len(each) for each in prompts], np.float64)
    longest = np.array([each.max() for each in prompts])
    start = np.array([each[0] for each in prompts]) / np.maximum(longest, 1)
    old = np.concatenate([each[:-1][turn.anew] for each, turn in zip(prompts, sessions, strict=True)])
    new = np.concatenate([each[1:][turn.anew] for each, turn in zip(prompts, sessions, strict=True)])
    kept = np.concatenate([each.kept[each.anew] for each in sessions]) * float(size)
    between = sum(len(each.growth) for each in sessions)
    begun = common_beginnings(sessions, everyone)
    # Who has a short first prompt has less of it than there is.
    shared: dict[int, list[int]] = {}
    for each in begun:
        if each.blocks:
            shared.setdefault(each.first, []).append(each.blocks * size)
    return Shape(
        turns=_spread(turns), longest=_spread(longest), start=_spread(start), growth=growth, delay=delay, output=output,
        correlations=_correlations([turns, longest, start, growths, delays, outputs]),
        anew=len(new) / between if between else 0.0,
        anew_size=_spread(new / np.maximum(old, 1)), anew_kept=_spread(kept),
        common=sum(map(len, shared.values())) / len(sessions), beginnings=max(1, len(shared)),
        beginning=_spread(float(np.median(lengths)) for lengths in shared.values()),
    )  # fmt: skip


def _normal(shares: Iterable[float]) -> NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf(float(share)) for share in shares])


def _correlations(values: Sequence[NDArray[np.float64]]) -> tuple[tuple[float, ...], ...]:
    """Of the ranks, as those of normal numbers. The first value is turns.

    Those with turns are such that the mean over all turns comes out right, not that over sessions: a request of a long session
    counts as much as one of a short session.
    """
    turns = values[0]
    length = len(turns)
    scores = _normal((np.arange(length) + 0.5) / length)
    ranked = np.array([scores[np.argsort(np.argsort(each, kind="stable"), kind="stable")] for each in values])
    found = np.corrcoef(ranked)
    weighted = ranked @ turns / turns.sum()
    if weighted[0] > LEAST_WEIGHT:
        found[0] = found[:, 0] = np.clip(weighted / weighted[0], -0.95, 0.95)
    found *= length / (length + SHRINK)
    np.fill_diagonal(found, 1.0)
    return tuple(tuple(round(float(value), 4) for value in row) for row in found)


def count(trace: Trace) -> int:
    """How many sessions a profile is fitted to, their sub-agents not counted."""
    return sum(not each.parent for each in sessions_of(trace.work).values())
