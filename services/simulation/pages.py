"""The report on policies as Markdown."""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import TYPE_CHECKING

from kvplane.services.routing.policies import POLICIES
from kvplane.services.simulation import closed_pages
from kvplane.services.simulation.hardware import Hardware
from kvplane.services.simulation.report import (
    BURST,
    BURST_NODES,
    BURST_TOKENS,
    KNEE_SECONDS,
    REQUESTS_A_NODE,
    SEED,
    pairs,
)
from kvplane.services.simulation.tables import table
from kvplane.services.simulation.targets import TOLERANCE, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplane.services.simulation.bound import Bound
    from kvplane.services.simulation.report import Report
    from kvplane.services.simulation.results import Summary


def page(report: Report, command: str, before: str = "") -> str:
    """The whole report; `before` is an earlier one to compare with."""
    names = ", ".join(dict.fromkeys(cell.name for cell in report.knees))
    caches, loads = report.plan.caches, report.plan.loads
    lines = [
        "# Policies, measured", "",
        (f"Made by `{command}`, which makes it again byte for byte. Seed {SEED}. Traces: {names}; of each the first "
        f"{REQUESTS_A_NODE} requests a node. Nodes are {Hardware().name}, with a cache of "
        f"{caches['small']:,} tokens (small: the GPU's memory) or {caches['large']:,} (large: some of the host's, too). "
        f"The knee is the highest load at which `ttft` keeps the p99 of TTFT under {KNEE_SECONDS:g} s; light is "
        f"{loads['light']:g} of it, overload {loads['overload']:g}. A commit is seen by the router after 2 ms. TTFT is in "
        "seconds; hit rates are shares of prompt tokens; *of ideal* compares with one cache without limit; *imbalance* "
        "is the busiest node's time of prefill over the mean. *Bound* is what no schedule can do better than, proven "
        "from the whole trace."), "",
        "## In short", "",
        *_short(report), *closed_pages.aims(report, before), *closed_pages.closed(report), *_worst(report), *_overlay(report),
        *_burst(report), *_parameters(),
        "## Every cell", "",
    ]  # fmt: skip
    for cell, speedup in report.knees.items():
        lines += [f"### {cell.name}, {cell.nodes} nodes, {cell.cache} cache (knee at speedup {speedup:.3f})", ""]
        head = ["load, policy", "mean", "p50", "p90", "p99", "hit rate", "of ideal", "imbalance", "rejected"]
        rows = []
        for name in report.plan.loads:
            rows += [_row(f"{name}, {policy}", report.runs[cell, name, policy]) for policy in report.plan.judged]
            rows.append(_least(f"{name}, *bound*", report.bounds[cell, name]))
        lines += table(head, rows)
    lines += closed_pages.every(report.loops)
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, run: Summary) -> list[str]:
    return [
        name, f"{run.mean:.3f}", f"{run.p50:.3f}", f"{run.p90:.3f}", f"{run.p99:.3f}", f"{run.hit_rate:.3f}",
        f"{run.ideal_share:.3f}", f"{run.imbalance:.2f}", str(run.rejected),
    ]  # fmt: skip


def _least(name: str, bound: Bound) -> list[str]:
    return [
        name, f"{bound.mean:.3f}", f"{bound.p50:.3f}", f"{bound.p90:.3f}", f"{bound.p99:.3f}", f"{bound.hit_rate:.3f}",
        "", "1.00", "0",
    ]  # fmt: skip


def _short(report: Report) -> list[str]:
    """`ttft` against each other policy at the knee."""
    rows = []
    others = [policy for policy in report.plan.judged if policy != "ttft"]
    for policy in others:
        means = {(cell, name): ratio(own.mean, all_[policy].mean) for cell, name, own, all_ in pairs(report, "knee")}
        tails = {(cell, name): ratio(own.p99, all_[policy].p99) for cell, name, own, all_ in pairs(report, "knee")}
        rows.append(_against(policy, means.values(), tails.values()))
    if report.peer:
        own = {cell: report.runs[cell, "knee", "ttft"] for cell in report.peer}
        rows.append(
            _against(
                "Dynamo's selector (8 nodes)",
                [ratio(own[cell].mean, run.mean) for cell, run in report.peer.items()],
                [ratio(own[cell].p99, run.p99) for cell, run in report.peer.items()],
            )
        )
    head = ["`ttft` at the knee, as a multiple of", "mean TTFT", "its worst cell", "p99", "its worst cell"]
    large = [
        (cell.name, run.ideal_share)
        for (cell, name, policy), run in report.runs.items()
        if (cell.nodes, cell.cache, name, policy) == (8, "large", "knee", "ttft")
    ]
    hits = ", ".join(f"{name} {share:.3f}" for name, share in large)
    return [
        *table(head, rows),
        "Ratios are geometric means over all cells at the knee; 0.5 is half the time.", "",
        f"Hit rate of `ttft` as a share of the ideal, on 8 nodes with the large cache at the knee: {hits}.", "",
    ]  # fmt: skip


def _against(name: str, means: Iterable[float], tails: Iterable[float]) -> list[str]:
    means, tails = list(means), list(tails)
    return [
        name, f"{geometric_mean(means):.2f}", f"{max(means):.2f}", f"{geometric_mean(tails):.2f}", f"{max(tails):.2f}"
    ]  # fmt: skip


def _worst(report: Report) -> list[str]:
    """Cells in which another policy is better."""
    found = []
    for cell, name, own, others in pairs(report):
        for what in ("mean", "p99"):
            best = min(others, key=lambda policy, what=what: getattr(others[policy], what))  # type: ignore[misc]
            value = ratio(getattr(own, what), getattr(others[best], what))
            if value > TOLERANCE:
                where = f"{cell.name}, {cell.nodes} nodes, {cell.cache} cache, {name}"
                found.append((value, [where, what, best, f"{getattr(others[best], what):.3f}", f"{value:.2f}"]))
    count = sum(1 for _ in pairs(report))
    means = sum(row[1] == "mean" for _, row in found)
    lines = [
        "## Where another policy is better", "",
        (f"Of {count} cells, the best of the other policies beats `ttft` by more than {TOLERANCE - 1:.0%} in {means} by mean "
        f"and in {len(found) - means} by p99."), "",
    ]  # fmt: skip
    if found:
        rows = [row for _, row in sorted(found, key=lambda item: -item[0])]
        lines += table(["cell", "figure", "best other", "its value", "`ttft` as a multiple"], rows)
    return lines


def _overlay(report: Report) -> list[str]:
    rows = []
    for trace in dict.fromkeys(cell.trace for cell in report.knees):
        base = report.overlay[trace, 0.0, 1]
        for (where, delay, routers), run in report.overlay.items():
            if where == trace:
                name = next(cell.name for cell in report.knees if cell.trace == trace)
                rows.append(
                    [
                        f"{name}, {delay * 1000:g} ms, {routers}", f"{run.mean:.3f}", f"{ratio(run.mean, base.mean):.3f}",
                        f"{run.p99:.3f}", f"{ratio(run.p99, base.p99):.3f}", f"{run.hit_rate:.3f}",
                    ]
                )  # fmt: skip
    shares = [
        ratio(run.mean, report.overlay[trace, 0.0, 1].mean)
        for (trace, delay, routers), run in report.overlay.items()
        if (delay, routers) == (0.05, 4)
    ]
    return [
        "## What delay and replicas cost", "",
        ("`ttft` on 8 nodes with the large cache at the knee. Routers share the requests; each learns of the others' "
        "decisions, and of what nodes did, from the log, after the delay. With 4 routers and 50 ms the mean TTFT is "
        f"{geometric_mean(shares):.3f} of that of one router without delay (geometric mean; worst {max(shares):.3f})."), "",
        *table(["trace, delay, routers", "mean", "of base", "p99", "of base", "hit rate"], rows),
    ]  # fmt: skip


def _burst(report: Report) -> list[str]:
    share = math.ceil(BURST / BURST_NODES)
    return [
        "## A burst of one new prefix", "",
        (f"{BURST} requests in {BURST} ms with one new prefix of {BURST_TOKENS:,} tokens on {BURST_NODES} idle nodes; spread "
        f"evenly it would be computed {BURST_NODES} times, with {share} requests on a node."), "",
        *table(
            ["delay, routers", "nodes used", "most on one", "mean TTFT", "largest"],
            (
                [f"{delay * 1000:g} ms, {routers}", str(nodes), str(most), f"{mean:.3f}", f"{largest:.3f}"]
                for (delay, routers), (nodes, most, mean, largest) in report.burst.items()
            ),
        ),
    ]  # fmt: skip


def _parameters() -> list[str]:
    rows = [
        [policy, name, f"{parameter.default:g}", parameter.unit, parameter.meaning]
        for policy, known in POLICIES.items()
        for name, parameter in (known.parameters or {}).items()
    ]
    lines = ["## Policies and parameters", ""]
    lines += [f"- `{policy}`: {known.summary}" for policy, known in POLICIES.items()]
    return [*lines, "", *table(["policy", "parameter", "default", "unit", "meaning"], rows)]
