"""What-if: the recorded requests of a span, in their recorded times, through other policies on simulated nodes.

The nodes begin with what they really held. How far a simulation is from what happened is shown by the recorded policy's own
run: compare other policies with that one, not with what really happened. Some time before the span is simulated as well and
not counted, since engines begin idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from msgspec import Struct

from kvplane.projections.history.tables import WHATIF_REQUESTS
from kvplane.services.process.workers import CONTEXT, results, workers
from kvplane.services.protocol.errors import PolicyFailed
from kvplane.services.simulation.results import DIGITS, never_decided
from kvplane.services.whatif.recorded import run_recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvplane.services.routing.choice import Choice
    from kvplane.services.simulation.world import Outcome, Served
    from kvplane.services.whatif.recorded import Recorded

AS_RECORDED = "as recorded"


class Result(Struct, frozen=True, kw_only=True):
    """One policy's figures; times in seconds. `imbalance` is the most uncached tokens of a node over the mean."""

    policy: str
    requests: int
    rejected: int
    mean: float
    p50: float
    p90: float
    p99: float
    hit_rate: float
    imbalance: float
    decisions: int = 0
    """How often the policy was asked."""
    policy_failures: int = 0
    """Decisions for which the policy failed and the least loaded node was taken."""
    failure: str = ""
    """What the last such failure was."""


_shared: tuple[Recorded, Any] | None = None


def _begin(recorded: Recorded, counts: Any) -> None:  # noqa: ANN401 - an array shared by processes
    global _shared  # noqa: PLW0603 - what a worker process is given once
    _shared = recorded, counts


def _one(number: int, choice: Choice | None, routers: int, modules: tuple[str, ...]) -> Outcome:
    if _shared is None:
        raise RuntimeError("the process was not begun")
    recorded, counts = _shared

    def progress(done: int) -> None:
        counts[number] = done

    if choice is None:
        return run_recorded(recorded, routers=routers, modules=modules, progress=progress)
    return run_recorded(recorded, choice.policy, choice.parameters, routers=routers, progress=progress)


def simulate(
    recorded: Recorded, choices: Sequence[Choice | None], *, routers: int, processes: int,
    modules: tuple[str, ...] = (), progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """Run each policy in a process; none is the recorded one, which may come from `modules`.

    `progress` is called with the sum of requests that arrived.
    """
    counts = CONTEXT.Array("q", len(choices))
    with workers(min(processes, len(choices)), _begin, recorded, counts) as submit:
        jobs = [submit(_one, number, choice, routers, modules) for number, choice in enumerate(choices)]
        return results(jobs, lambda: progress(sum(counts[:])))


def compared(outcomes: Sequence[Outcome], counted: float) -> list[list[Served]]:
    """Of each outcome the requests that count: those that all of them served and that came late enough, by their ids."""
    found = [{served.request: served for served in outcome.served if served.arrival >= counted} for outcome in outcomes]
    common = sorted(set.intersection(*(set(each) for each in found))) if found else []
    return [[each[request] for request in common] for each in found]


def decided(
    names: Sequence[str], outcomes: Sequence[Outcome]
) -> tuple[list[str], list[Outcome], list[str]]:  # fmt: skip
    """Those that decided at least once, and a sentence about each of the others. Raises `PolicyFailed` for the recorded one."""
    kept, failed = [], []
    for name, outcome in zip(names, outcomes, strict=True):
        if not never_decided(outcome.decisions, outcome.policy_failures):
            kept.append((name, outcome))
            continue
        why = f"failed in all of its {outcome.decisions:,} decisions: {' '.join(outcome.failure.split())}"
        if name == AS_RECORDED:
            raise PolicyFailed(
                f"the recorded policy {why}; nothing can be compared with it. --policy-module names the modules of policies"
            )
        failed.append(f"policy {name} {why}, so there are no figures of it")
    return [name for name, _ in kept], [outcome for _, outcome in kept], failed


def summarize(policy: str, served: Sequence[Served], rejected: int, outcome: Outcome | None = None) -> Result:
    """The figures of one policy; `outcome`, if there is one, says how often it failed."""
    times: NDArray[np.float64] = np.array([each.first - each.arrival for each in served])
    tokens = sum(each.tokens for each in served)
    uncached: dict[int, int] = {}
    for each in served:
        uncached[each.node] = uncached.get(each.node, 0) + each.tokens - each.cached
    mean = sum(uncached.values()) / len(uncached) if uncached else 0
    quantiles = np.quantile(times, [0.5, 0.9, 0.99]) if len(times) else np.zeros(3)
    p50, p90, p99 = (round(float(value), DIGITS) for value in quantiles)
    return Result(
        policy=policy, requests=len(served), rejected=rejected,
        mean=round(float(times.mean()), DIGITS) if len(times) else 0.0, p50=p50, p90=p90, p99=p99,
        hit_rate=round(sum(each.cached for each in served) / tokens, DIGITS) if tokens else 0.0,
        imbalance=round(max(uncached.values()) / mean, DIGITS) if mean else 1.0,
        decisions=outcome.decisions if outcome else 0, policy_failures=outcome.policy_failures if outcome else 0,
        failure=outcome.failure if outcome else "",
    )  # fmt: skip


def request_rows(run: str, policy: str, outcome: Outcome, served: Sequence[Served], start: int) -> pa.Table:
    """Rows of `whatif_requests`; `start` is the beginning in unix nanoseconds."""
    arrival = np.array([start // 1000 + int(each.arrival * 1e6) for each in served], "datetime64[us]")
    columns = {
        "run": [run] * len(served),
        "policy": [policy] * len(served),
        "request": [each.request for each in served],
        "node": [outcome.names[each.node] for each in served],
        "arrival": arrival,
        "ttft": [each.first - each.arrival for each in served],
        "duration": [each.end - each.arrival for each in served],
        "tokens": [each.tokens for each in served],
        "cached_tokens": [each.cached for each in served],
        "predicted_tokens": [each.predicted for each in served],
    }
    return pa.table(columns, schema=WHATIF_REQUESTS.schema)
