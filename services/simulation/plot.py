"""Several runs as one picture: how long first tokens take, load over time, hit rate over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvplane.services.simulation.results import ttft

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from kvplane.services.simulation.world import Outcome

POINTS = 120
"""Moments that curves over time have."""


def load(outcome: Outcome, moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Requests at each node at each moment, as an array of nodes by moments."""
    found = np.zeros((len(outcome.names), len(moments)))
    for node in range(len(outcome.names)):
        here = [served for served in outcome.served if served.node == node]
        arrived = np.sort([served.arrival for served in here])
        ended = np.sort([served.end for served in here])
        found[node] = np.searchsorted(arrived, moments, "right") - np.searchsorted(ended, moments, "right")
    return found


def hits(outcome: Outcome, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hit rate in tokens of the requests that arrived between each pair of edges; NaN where there were none."""
    arrivals = [served.arrival for served in outcome.served]
    tokens, _ = np.histogram(arrivals, edges, weights=[served.tokens for served in outcome.served])
    cached, _ = np.histogram(arrivals, edges, weights=[served.cached for served in outcome.served])
    rate: NDArray[np.float64] = np.divide(cached, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
    return rate


def draw(path: Path, title: str, runs: Sequence[tuple[str, Outcome]]) -> None:
    """Write the picture; the ending of the name says in which form (png, svg, pdf). Raises `OSError`."""
    # Drawing is seldom asked for and slow to load. No figure manager, so no display is looked for.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 11), layout="constrained")
    distribution, loads, rates = figure.subplots(3, 1)
    end = max(served.end for _, outcome in runs for served in outcome.served)
    last = max(served.arrival for _, outcome in runs for served in outcome.served)
    moments = np.linspace(0, end, POINTS)
    edges = np.linspace(0, last * (1 + 1e-9), POINTS // 3 + 1)
    for name, outcome in runs:
        times = np.sort(ttft(outcome))
        (line,) = distribution.plot(np.maximum(times, 1e-3), np.arange(1, len(times) + 1) / len(times), label=name)
        running = load(outcome, moments)
        loads.plot(moments, running.mean(axis=0), color=line.get_color(), label=name)
        loads.fill_between(moments, running.min(axis=0), running.max(axis=0), color=line.get_color(), alpha=0.15)
        rates.plot((edges[:-1] + edges[1:]) / 2, hits(outcome, edges), color=line.get_color(), label=name)
    distribution.set(xscale="log", xlabel="time to first token (s)", ylabel="share of requests", title=title)
    loads.set(xlabel="time (s)", ylabel="requests on a node: mean, min to max")
    rates.set(xlabel="time (s)", ylabel="hit rate (tokens)", ylim=(0, 1))
    for axes in (distribution, loads, rates):
        axes.grid(alpha=0.3)
    distribution.legend()
    figure.savefig(path, dpi=110)
