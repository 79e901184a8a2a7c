"""How near one trace of agents' sessions is to another: the figures of both, beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from kvplane.services.simulation.fitting import common_beginnings, sessions_of
from kvplane.services.simulation.results import ideal_hit_rate
from kvplane.services.simulation.trace import Trace
from kvplane.services.simulation.workloads import TOKEN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvplane.services.simulation.trace import Work

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Figure(Struct, frozen=True, kw_only=True):
    """One figure of a given and a generated trace. `halves` are those of the given one's own halves, every second session."""

    name: str
    given: float
    generated: float
    halves: tuple[float, float]

    @property
    def ratio(self) -> float | None:
        """Generated over given; none when there is nothing to compare with."""
        return self.generated / self.given if self.given else None

    @property
    def own_ratio(self) -> float | None:
        """How far the given trace's halves are apart, as a factor of at least 1: what nobody can come nearer than."""
        low, high = sorted(self.halves)
        return high / low if low else None


def figures(trace: Trace) -> dict[str, float]:
    """What can be said of a trace of sessions in a closed loop. Lengths are tokens."""
    found = sessions_of(trace.work)
    everyone = list(found.values())
    roots = [each for each in everyone if not each.parent]
    agents = [each for each in everyone if each.parent]
    requests = [request for each in everyone for request in each.requests]
    turns = [len(each.requests) for each in roots]
    growths = [each.growth[~each.anew] for each in everyone]
    begun = [each.blocks * trace.block_size for each in common_beginnings(roots, everyone)]
    shared = [tokens for tokens in begun if tokens]
    between = sum(len(each.growth) for each in everyone)
    minutes = [(float(each.delays.sum()) + float(each.outputs.sum()) * TOKEN_SECONDS) / 60 for each in roots]
    return {
        **_spread("prompt", [request.tokens for request in requests]),
        **_spread("turns a session", turns),
        **_spread("growth a turn", np.concatenate(growths) if growths else []),
        **_spread("delay, s", np.concatenate([each.delays for each in everyone]) if everyone else []),
        **_spread("output", [request.output_tokens for request in requests]),
        **_spread("session, min", minutes),
        "contexts made anew, of turns": sum(int(each.anew.sum()) for each in everyone) / between if between else 0.0,
        "reusable share": ideal_hit_rate(requests, trace.block_size),
        "sub-agents a session": len(agents) / len(roots) if roots else 0.0,
        "turns a sub-agent, mean": sum(len(each.requests) for each in agents) / len(agents) if agents else 0.0,
        "sessions that begin as others": len(shared) / len(roots) if roots else 0.0,
        "common beginning, mean": sum(shared) / len(shared) if shared else 0.0,
    }  # fmt: skip


def _spread(name: str, values: Iterable[float]) -> dict[str, float]:
    found = np.array(list(values), np.float64)
    if not len(found):
        found = np.zeros(1)
    quantiles = {f"{name}, {label}": float(np.quantile(found, share)) for label, share in _QUANTILES.items()}
    return {f"{name}, mean": float(found.mean()), **quantiles}


def compare(given: Trace, generated: Trace) -> list[Figure]:
    """All figures of both."""
    first, second = (figures(half) for half in halves(given))
    own, made = figures(given), figures(generated)
    return [
        Figure(name=name, given=value, generated=made[name], halves=(first[name], second[name]))
        for name, value in own.items()
    ]  # fmt: skip


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Every second session of a trace, with its sub-agents, and the others."""
    half: dict[str, int] = {}
    parts: tuple[list[Work], list[Work]] = ([], [])
    count = 0
    for request in trace.work:
        if request.session not in half:
            half[request.session] = half[request.parent] if request.parent else count % 2
            count += not request.parent
        parts[half[request.session]].append(request)
    return Trace(parts[0], trace.block_size, trace.source), Trace(parts[1], trace.block_size, trace.source)


def furthest(found: Sequence[Figure]) -> list[Figure]:
    """The figures that are further apart than the given trace's own halves are, the worst first."""

    def apart(figure: Figure) -> float:
        ratio = figure.ratio
        return max(ratio, 1 / ratio) if ratio else 1.0

    beyond = [figure for figure in found if apart(figure) > max(1.1, figure.own_ratio or 1.1)]
    return sorted(beyond, key=apart, reverse=True)
