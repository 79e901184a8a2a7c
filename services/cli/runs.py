"""How simulated runs are shown, one row a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.cli import show
from kvplane.services.cli.show import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvplane.services.simulation.results import Summary
    from kvplane.services.whatif.replay import Result

TTFT_COLUMNS = (
    Column("policy"), Column("mean (s)", number=True), *(Column(f"{name} (s)", number=True, spare=1) for name in
    ("p50", "p90", "p99")), Column("hits", number=True),
)  # fmt: skip
END_COLUMNS = (Column("imbalance", number=True, spare=4), Column("rejected", number=True, spare=2))
TTFT_NOTE = "mean, p50, p90, p99: time to first token; hits: share of prompt tokens; imbalance: busiest node over mean"

SESSION_COLUMNS: tuple[tuple[Column, Callable[[Summary], str | None]], ...] = (
    (Column("in goal", number=True), lambda row: None if row.within_goal is None else f"{row.within_goal:.1%}"),
    (Column("session (s)", number=True), lambda row: None if row.session is None else f"{row.session:,.0f}"),
    (Column("makespan (s)", number=True), lambda row: f"{row.makespan:,.0f}"),
    (Column("moves", number=True), lambda row: None if row.session is None else f"{row.moves:,}"),
    (Column("recomputed", number=True, spare=1), lambda row: f"{row.recomputed:,}"),
    (Column("held twice", number=True, spare=2), lambda row: f"{row.held_twice:,}"),
    (Column("waited", number=True, spare=1), lambda row: f"{row.held:,}" if row.held else None),
    (Column("longest (s)", number=True, spare=1), lambda row: f"{row.held_longest:,.0f}" if row.held else None),
)
SESSION_NOTE = (
    "in goal: requests whose first token came within --goal; session: its mean time from first request to last answer; "
    "makespan: from the first request to the last answer; moves: requests of a session on another node than the one before; "
    "recomputed: tokens that some node had computed before; held twice: tokens in a second cache at the end; waited: requests "
    "that were held until there was room (hold=1), and the longest time."
)


def ttft_cells(row: Summary | Result) -> list[str]:
    """Times to the first token in seconds, and the hit rate, of a run."""
    return [f"{row.mean:.3f}", f"{row.p50:.3f}", f"{row.p90:.3f}", f"{row.p99:.3f}", f"{row.hit_rate:.1%}"]


def say_failures(rows: Sequence[Summary] | Sequence[Result]) -> None:
    """Which policies failed in some of their decisions, and what they raised."""
    for row in rows:
        if row.policy_failures:
            show.aside(
                f"* {row.policy} failed in {row.policy_failures:,} of its {row.decisions:,} decisions, and the least loaded "
                f"node was taken: {row.failure}"
            )
