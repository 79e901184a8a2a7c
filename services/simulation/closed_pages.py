"""The closed-loop part of the report, its targets, and the oracle, as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.simulation import foresight
from kvplane.services.simulation.closed import BLIND, CAPACITY, COPIES, PEER_PLACES, ROUTED, SESSIONS, SPAN_SECONDS
from kvplane.services.simulation.peer import POLICY as PEER
from kvplane.services.simulation.tables import table
from kvplane.services.simulation.targets import OWN, best, others, ratio, targets, where

if TYPE_CHECKING:
    from kvplane.services.simulation.bound import Bound
    from kvplane.services.simulation.closed import LoopReport
    from kvplane.services.simulation.report import Report
    from kvplane.services.simulation.results import Summary

HEAD = [
    "policy", "mean", "p50", "p90", "p99", "hit rate", "imbalance", "makespan", "session", "recomputed", "moves"
]  # fmt: skip
BOUND = "*bound*"
SCHEDULE = "*schedule*"
PEER_NAME = "Dynamo's selector"


def aims(report: Report, before: str) -> list[str]:
    """The section on targets."""
    found = targets(report, before)
    held = sum(target.held for target in found)
    rows = [
        [
            target.what, f"{'>=' if target.sign == '>' else '<='} {target.limit:g}", f"{target.seen:.3g}",
            "yes" if target.held else "**no**", _figure(target.schedule), _figure(target.bound),
        ]
        for target in found
    ]  # fmt: skip
    return [
        "## Targets", "",
        (f"{held} of {len(found)} are held. *Schedule* is the same figure for one who knows the whole trace, *bound* for what "
        "is proven (see [the oracle](#closed-loops)): a target below the bound can't be reached, one above the schedule can, "
        "by somebody who knows the future."), "",
        *table(["target", "limit", "seen", "held", "schedule", "bound"], rows),
    ]  # fmt: skip


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def closed(report: Report) -> list[str]:
    """The section in short."""
    loops = report.loops
    rows = []
    for loop, bound in loops.bounds.items():
        own, known, runs = loops.runs[loop, OWN], loops.runs[loop, foresight.NAME], others(loops, loop)
        if not runs:
            continue
        first, last = best(runs, "mean"), best(runs, "p99")
        rows.append(
            [
                where(loop), f"{own.mean:.2f}", f"{ratio(own.mean, runs[first].mean):.2f} of {_name(first)}",
                f"{own.p99:.1f}", f"{ratio(own.p99, runs[last].p99):.2f} of {_name(last)}", f"{own.imbalance:.2f}",
                f"{ratio(own.mean, known.mean):.2f}", f"{ratio(own.mean, bound.mean):.2f}",
            ]
        )  # fmt: skip
    head = [
        "load",
        "mean",
        "of the best other",
        "p99",
        "of the best other",
        "imbalance",
        "mean over the schedule's",
        "over the bound's",
    ]
    delay, routers = ROUTED
    return [
        "## Closed loops", "",
        (f"A session's next request comes a pause after its last answer. Nodes keep {CAPACITY:,} tokens. Given agents are "
        f"taken by halves: constants were chosen on the first, the second is what counts. Each half comes {COPIES} times, "
        f"begun within {SPAN_SECONDS / 60:g} minutes, as do {SESSIONS} generated agents with their sub-agents; chats "
        "(`multi-turn`) begin as often as at the knee. On 4 nodes caches do not hold all sessions. Makespan and session time "
        "are in seconds, recomputed tokens in millions."), "",
        ("*The oracle* is two rows. *Bound* is proven: no placement, order, waiting or eviction has less, or more hits; nobody "
        "reaches it. *Schedule* is made by one who knows the whole trace: sessions are placed as a whole, evicted is what is "
        "used last, sessions that do not fit are held, and wait for their first token. It is not the optimum, which is between "
        "both."), "",
        *table(head, rows),
        (f"{' and '.join(f'`{name}`' for name in BLIND)} ask neither for caches nor for sessions, and are left out of the "
        f"first half and of further seeds; {PEER_NAME} runs on {len(PEER_PLACES)} loads, as it takes five times as long."), "",
        *(_routed(loops, delay, routers) if loops.routed else []), *(_paced(loops) if loops.paced else []),
    ]  # fmt: skip


def _name(policy: str) -> str:
    return PEER_NAME if policy == PEER else policy


def _routed(report: LoopReport, delay: float, routers: int) -> list[str]:
    rows = [
        [
            f"{where(job.loop)}: {job.routers} at {job.delay * 1000:g} ms", f"{run.mean:.3f}", f"{run.p99:.2f}",
            f"{run.hit_rate:.3f}", f"{run.imbalance:.2f}",
        ]
        for job, run in report.routed.items()
    ]  # fmt: skip
    return [
        f"`ttft` with {routers} routers, each of which learns of the others after {delay * 1000:g} ms:", "",
        *table(["routers", "mean", "p99", "hit rate", "imbalance"], rows),
    ]  # fmt: skip


def _paced(report: LoopReport) -> list[str]:
    rows = [
        [situation, policy, f"{run.hit_rate:.3f}", f"{run.ideal_share:.3f}", f"{run.imbalance:.2f}", f"{run.mean:.3f}"]
        for (situation, policy), run in report.paced.items()
    ]
    return [
        (
            "Sessions with a common beginning, one request at a time: nothing is in flight when the next is decided. They "
            "have no names but for `session`:"
        ),
        "",
        *table(["situation", "policy", "hit rate", "of ideal", "imbalance", "mean TTFT"], rows),
    ]


def every(report: LoopReport) -> list[str]:
    """All runs in closed loops."""
    lines: list[str] = []
    for loop, bound in report.bounds.items():
        lines += [f"### {where(loop)}, closed loop", ""]
        runs = {policy: run for (at, policy), run in report.runs.items() if at == loop}
        known = runs.pop(foresight.NAME)
        rows = [_row(_name(policy), run) for policy, run in runs.items()]
        lines += table(HEAD, [*rows, _row(SCHEDULE, known), _least(bound)])
    return lines


def _row(name: str, run: Summary) -> list[str]:
    session = "" if run.session is None else f"{run.session:.0f}"
    return [
        name, f"{run.mean:.3f}", f"{run.p50:.3f}", f"{run.p90:.3f}", f"{run.p99:.2f}", f"{run.hit_rate:.3f}",
        f"{run.imbalance:.2f}", f"{run.makespan:,.0f}", session, f"{run.recomputed / 1e6:.1f}", f"{run.moves:,}",
    ]  # fmt: skip


def _least(bound: Bound) -> list[str]:
    session = "" if bound.session is None else f"{bound.session:.0f}"
    return [
        BOUND, f"{bound.mean:.3f}", f"{bound.p50:.3f}", f"{bound.p90:.3f}", f"{bound.p99:.2f}", f"{bound.hit_rate:.3f}",
        "1.00", f"{bound.makespan:,.0f}", session, "0.0", "0",
    ]  # fmt: skip
