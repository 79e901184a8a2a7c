"""What policies shall reach, and what they did in a report; beside that, what the oracle says of whether it can be reached."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct

from kvplane.services.routing.choice import parse
from kvplane.services.simulation import foresight
from kvplane.services.simulation.closed import ALONE, ROUTED
from kvplane.services.simulation.peer import POLICY as PEER
from kvplane.services.simulation.report import pairs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvplane.services.simulation.bound import Bound
    from kvplane.services.simulation.closed import Loop, LoopReport
    from kvplane.services.simulation.report import Report
    from kvplane.services.simulation.results import Summary

OWN = "ttft"
FLOOR = 1e-6
"""Times shorter than this are taken as this in ratios, in seconds."""
TOLERANCE = 1.03
MOST_BETTER = {"mean": 5, "p99": 10}
"""In so many open-loop cells another policy may be better by more than `TOLERANCE`."""
CLOSED = {8: {"mean": 0.9, "p99": 1.0}, 16: {"mean": 1.0, "p99": 1.0}}
"""By nodes: most of the best other policy's figure that may be seen, where caches hold all sessions."""
IMBALANCE = 1.5
OF_PEER = 0.3
OVERLOADED = 4
"""Nodes on which caches don't hold all sessions."""
HELD = {"makespan": 0.8, "mean": 0.5, "p99": 0.4}
"""With holding, most of the best figure without it, on `OVERLOADED` nodes."""
HELD_HITS = 0.95
ROUTERS = 1.1
PACED_HITS = 0.99

_CELL = re.compile(r"### (\S+), (\d+) nodes, (\w+) cache \(knee at speedup ([\d.]+)\)")


class Target(Struct, frozen=True, kw_only=True):
    """One target: what is measured, its limit (`>` for a least, `<` for a most), and what was seen.

    `schedule` and `bound` are the same figure for who knows the trace, and for what is proven; where there are any.
    """

    what: str
    sign: str
    limit: float
    seen: float
    schedule: float | None = None
    bound: float | None = None

    @property
    def held(self) -> bool:
        """Whether it is reached."""
        return self.seen >= self.limit if self.sign == ">" else self.seen <= self.limit


def ratio(one: float, other: float) -> float:
    """How many times the other."""
    return max(one, FLOOR) / max(other, FLOOR)


def holds(policy: str) -> bool:
    """Whether it holds sessions."""
    return bool(parse(policy).parameters.get("hold"))


def others(report: LoopReport, loop: Loop) -> dict[str, Summary]:
    """The runs of all policies on a load but those of `ttft`, with whatever parameters, and of who knows the trace."""
    return {
        policy: run
        for (at, policy), run in report.runs.items()
        if at == loop and policy != foresight.NAME and policy.partition(":")[0] != OWN
    }


def best(runs: Mapping[str, Summary], figure: str) -> str:
    """Who has least."""
    return min(runs, key=lambda policy: getattr(runs[policy], figure))


def where(loop: Loop) -> str:
    """A load in words."""
    return f"{loop.name}, {loop.nodes} nodes" + (f", seed {loop.seed}" if loop.seed != 1 else "")


def targets(report: Report, before: str = "") -> list[Target]:
    """All targets about policies that the report has runs for; `before` is an earlier page to compare with."""
    found = list(_open(report, before))
    for loop, bound in report.loops.bounds.items():
        found += _closed(report.loops, loop, bound)
    return [*found, *_routers(report), *_paced(report.loops)]


def _closed(report: LoopReport, loop: Loop, bound: Bound) -> Iterator[Target]:
    own, known = report.runs[loop, OWN], report.runs[loop, foresight.NAME]
    runs = others(report, loop)

    def against(policy: str, figure: str, limit: float, subject: Summary = own, name: str = OWN) -> Target:
        base = getattr(runs[policy], figure)
        return Target(
            what=f"{where(loop)}: {figure} of {name} over that of {policy}", sign="<", limit=limit,
            seen=ratio(getattr(subject, figure), base), schedule=ratio(getattr(known, figure), base),
            bound=ratio(getattr(bound, figure), base),
        )  # fmt: skip

    for figure, limit in CLOSED.get(loop.nodes, {}).items():
        yield against(best(runs, figure), figure, limit)
    if loop.nodes in CLOSED:
        if loop.nodes == max(CLOSED):
            yield Target(
                what=f"{where(loop)}: imbalance",
                sign="<",
                limit=IMBALANCE,
                seen=own.imbalance,
                schedule=known.imbalance,
            )
        if PEER in runs:
            yield against(PEER, "mean", OF_PEER)
    if loop.nodes != OVERLOADED:
        return
    yield against(best(runs, "makespan"), "makespan", TOLERANCE)
    runs = {policy: run for (at, policy), run in report.runs.items() if at == loop and policy != foresight.NAME}
    holding = {policy: run for policy, run in runs.items() if holds(policy)}
    runs = {policy: run for policy, run in runs.items() if policy not in holding}
    for policy, run in holding.items():
        for figure, limit in HELD.items():
            yield against(best(runs, figure), figure, limit, run, policy)
        yield Target(
            what=f"{where(loop)}: hits of {policy} over the ideal", sign=">", limit=HELD_HITS, seen=run.ideal_share,
            schedule=known.ideal_share,
        )  # fmt: skip


def _open(report: Report, before: str) -> Iterator[Target]:
    cells = list(pairs(report))
    for figure, most in MOST_BETTER.items():
        better = sum(
            ratio(getattr(own, figure), min(getattr(run, figure) for run in runs.values())) > TOLERANCE
            for _, _, own, runs in cells
            if runs
        )
        what = f"open loops: of {len(cells)} cells those where another policy is better by over {TOLERANCE - 1:.0%} by {figure}"
        yield Target(what=what, sign="<", limit=most, seen=better)
    known = earlier(before)
    worst = [
        ratio(own.mean, mean)
        for cell, name, own, _ in cells
        if (found := known.get((cell.name, cell.nodes, cell.cache, name))) is not None
        and found[0] == f"{report.knees[cell]:.3f}"
        for mean in (found[1],)
    ]
    if worst:
        what = (
            f"open loops: largest mean of {OWN} over the earlier page's, in {len(worst)} cells whose load is the same"
        )
        yield Target(what=what, sign="<", limit=TOLERANCE, seen=max(worst))


def earlier(page: str) -> dict[tuple[str, int, str, str], tuple[str, float]]:
    """What an earlier page has of `ttft`: by trace, nodes, cache and load the knee, as it is written, and the mean."""
    found = {}
    cell: tuple[str, int, str] | None = None
    knee = ""
    for line in page.splitlines():
        if line.startswith("#"):
            head = _CELL.match(line)
            cell = None if head is None else (head[1], int(head[2]), head[3])
            knee = "" if head is None else head[4]
        row = re.match(rf"\| (\w+), {OWN} \| ([\d.]+) \|", line)
        if cell is not None and row is not None:
            found[(*cell, row[1])] = knee, float(row[2])
    return found


def _routers(report: Report) -> Iterator[Target]:
    delay, count = ROUTED
    what = f"mean with {count} routers and {delay * 1000:g} ms over that with one and none"
    for trace in dict.fromkeys(cell.trace for cell in report.knees):
        run, base = report.overlay.get((trace, delay, count)), report.overlay.get((trace, *ALONE))
        if run is not None and base is not None:
            name = next(cell.name for cell in report.knees if cell.trace == trace)
            yield Target(what=f"{name}, open loop: {what}", sign="<", limit=ROUTERS, seen=ratio(run.mean, base.mean))
    runs = {(job.loop, job.delay, job.routers): run for job, run in report.loops.routed.items()}
    for (loop, *how), run in runs.items():
        if tuple(how) == ROUTED:
            seen = ratio(run.mean, runs[(loop, *ALONE)].mean)
            yield Target(what=f"{where(loop)}, closed loop: {what}", sign="<", limit=ROUTERS, seen=seen)


def _paced(report: LoopReport) -> Iterator[Target]:
    for situation in dict.fromkeys(name for name, _ in report.paced):
        runs = {policy: run for (name, policy), run in report.paced.items() if name == situation}
        most = max(run.hit_rate for run in runs.values())
        least = min(run.hit_rate for run in runs.values())
        what = f"paced, {situation}:"
        yield Target(what=f"{what} least hits over the best", sign=">", limit=PACED_HITS, seen=ratio(least, most))
        worst = max(run.imbalance for run in runs.values())
        yield Target(what=f"{what} largest imbalance", sign="<", limit=IMBALANCE, seen=worst)
