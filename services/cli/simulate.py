"""The command `simulate`, which needs no fleet."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from kvplane.services.cli import show
from kvplane.services.cli.ask import Json, show_json
from kvplane.services.cli.limits import within
from kvplane.services.cli.progress import progress_bar
from kvplane.services.cli.runs import (
    END_COLUMNS,
    SESSION_COLUMNS,
    SESSION_NOTE,
    TTFT_COLUMNS,
    TTFT_NOTE,
    say_failures,
    ttft_cells,
)
from kvplane.services.cli.show import Cell, Column, Styled
from kvplane.services.protocol.errors import BadRequest, PolicyFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.cli.simulating import Simulated
    from kvplane.services.simulation.results import Summary

DEFAULT_POLICIES = ("ttft", "blocks", "threshold", "least_loaded", "round_robin")
MOST = 10**12
MOST_NODES = 10_000
SOURCES = {
    "option": "as --block-size says",
    "trace": "as the trace says",
    "inferred": "inferred from the trace's lengths",
}


def simulate(
    trace: str | None = None,
    *,
    nodes: int = 8,
    policy: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = DEFAULT_POLICIES,
    hardware: str | None = None,
    capacity: int | None = None,
    speedup: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    block_size: int | None = None,
    delay: float = 0.002,
    routers: int = 1,
    max_active: int = 0,
    goal: str | None = None,
    fail: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    join: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    rate: float | None = None,
    processes: int | None = None,
    plot: Path | None = None,
    json: Json = False,
) -> None:
    """Ask what hit rate and time to first token a fleet would have with your requests, under several policies.

    Runs in virtual time and without a network, on the very code that routers use: an hour of traffic takes seconds, and
    the same command gives the same figures.

    kvplane simulate agents.jsonl --nodes 8 --policy ttft session blocks compares three policies. Read a row so: mean to p99
    are times to first token; hits is the share of prompt tokens that was cached, and of ideal that of what one endless cache
    would find; imbalance is the busiest node's time of prefill over the mean. With sessions: their mean time from first request
    to last answer, the makespan of all, moves to another node, tokens that were computed again, and tokens that two nodes hold;
    with a policy that holds (ttft:hold=1), how many requests waited for room, and the longest time.

    Parameters
    ----------
    trace
        JSON lines with timestamp (ms), input_length, output_length, hash_ids and, if there is one, session; or a
        generated workload: multi-turn, shared-prefix, tools, single-turn, agent. Also the last value of --policy, --fail or
        --join.
        With delay (ms) on a session's lines it is a closed loop: its next request comes that long after its last answer.
        A folder of sessions as kv-cache-tester has them, a JSON file each, is read as well; they begin within half an hour.
    nodes
        How many nodes there are, named node-1, node-2, ...
    policy
        Policies to compare, each with parameters if need be: ttft:session_seconds=1 or my_module:score.
    hardware
        Model and GPU by name, such as llama-3.1-8b@h100, or four numbers that you measured (tokens per second, and a number
        of requests): prefill=18000,decode=110,batch=64,batch_decode=3200. docs/hardware.md says more; default is Llama 3.3
        70B in FP4 on one B200.
    capacity
        Blocks that a node can hold; default is what the GPU of --hardware has room for, and 3 million tokens without.
    speedup
        How many times closer than recorded the requests arrive; in a closed loop, the sessions begin.
    seed
        Decides ties, and generates the workload.
    limit
        Only so many requests from the beginning, of a folder so many sessions; of a generated workload 6,000 if not given.
    block_size
        Tokens a block of the trace; default is what the trace says, or what its lengths allow.
    delay
        Seconds until a router sees what is on the log.
    routers
        How many routers share the requests.
    max_active
        Most requests at once on a node; 0 is no limit.
    goal
        Time to first token that you want, such as 2s or 500ms: the share of requests within it is shown.
    fail
        Nodes that fail, and when in seconds: node-3@60.
    join
        Nodes that join, and when in seconds: node-9@120.
    rate
        Requests per second of a generated workload.
    processes
        Processes to use; default is one a core.
    plot
        Write a picture to this file (png, svg, pdf).
    json
        Print JSON.
    """
    for value, name, least, most in (
        (nodes, "nodes", 1, MOST_NODES), (routers, "routers", 1, MOST_NODES), (max_active, "max-active", 0, MOST),
        (capacity, "capacity", 1, MOST), (processes, "processes", 1, MOST), (speedup, "speedup", 1e-6, 1e6),
        (delay, "delay", 0, 1e4),
    ):  # fmt: skip
        within(value, name, least, most)
    with progress_bar() as progress:
        starting = progress.add_task("starting", total=None)
        from kvplane.services.cli.simulating import Asked, simulated  # noqa: PLC0415 - slow to load

        progress.remove_task(starting)
        found = simulated(
            Asked(
                trace=trace, policy=policy, fail=fail, join=join, hardware=hardware, capacity=capacity,
                block_size=block_size, limit=limit, rate=rate, processes=processes, keep=plot is not None,
                nodes=nodes, speedup=speedup, seed=seed, delay=delay, routers=routers, most_active=max_active, goal=goal,
            ),
            progress,
        )  # fmt: skip
    own = [summary for summary, _ in found.made if not summary.failed]
    failed = [summary for summary, _ in found.made if summary.failed]
    if json:
        show_json(_plain(found, own, failed))
    else:
        _show(found, own)
    if plot is not None and own:
        _draw(plot, found)
    if failed:
        raise PolicyFailed(
            "; ".join(
                f"policy {row.policy} failed in all of its {row.decisions:,} decisions, so there are no figures of it: "
                f"{' '.join(row.failure.split())}"
                for row in failed
            )
        )


def _plain(found: Simulated, own: Sequence[Summary], failed: Sequence[Summary]) -> dict[str, object]:
    settings = msgspec.to_builtins(found.settings)
    return {
        "trace": found.name, "requests": len(found.trace.work), "ideal_hit_rate": round(found.ideal, 6),
        "block_size_source": found.trace.source,
        "settings": {key: value for key, value in settings.items() if key not in {"policy", "parameters"}},
        "policies": msgspec.to_builtins(own),
        "failed": [{"policy": row.policy, "decisions": row.decisions, "failure": row.failure} for row in failed],
    }  # fmt: skip


def _draw(path: Path, found: Simulated) -> None:
    from kvplane.services.simulation.plot import draw  # noqa: PLC0415 - slow to load, and seldom asked for

    settings = found.settings
    title = f"{found.name}: {len(found.trace.work)} requests at speedup {settings.speedup:g} on {settings.nodes} nodes"
    shown = [(row.policy, outcome) for row, outcome in found.made if outcome is not None and not row.failed]
    try:
        draw(path, title, shown)
    except (OSError, ValueError) as error:
        raise BadRequest(f"the picture can't be written: {error}") from None


def _when(found: Simulated) -> str:
    """When the requests come, in words."""
    begins: dict[str, float] = {}
    for request in found.trace.work:
        if request.delay is not None:
            begins.setdefault(request.session, request.arrival)
    if begins:
        return f"in {len(begins):,} sessions that begin within {max(begins.values()) / found.settings.speedup:,.0f} s"
    return f"in {max(request.arrival for request in found.trace.work) / found.settings.speedup:,.0f} s"


def _show(found: Simulated, summaries: Sequence[Summary]) -> None:
    settings, work = found.settings, found.trace.work
    tokens = sum(request.tokens for request in work)
    show.aside(
        f"{len(work):,} requests, {tokens / len(work):,.0f} tokens each, {_when(found)}; ideal hit rate {found.ideal:.1%}"
    )
    show.aside(
        f"{settings.nodes:,} nodes ({settings.hardware.name}), {settings.capacity:,} blocks of {settings.block_size:,} tokens "
        f"each ({SOURCES[found.trace.source]})"
    )
    if not summaries:
        return
    show.aside("")
    best = min(summary.mean for summary in summaries)
    rows: list[list[Cell]] = [
        [
            Styled(row.policy + ("*" if row.policy_failures else ""), "bold" if row.mean == best else ""),
            *ttft_cells(row), f"{row.ideal_share:.1%}", f"{row.imbalance:.2f}", f"{row.rejected:,}",
        ]
        for row in summaries
    ]  # fmt: skip
    columns = [*TTFT_COLUMNS, Column("of ideal", number=True, spare=3), *END_COLUMNS]
    note = f"{TTFT_NOTE}; of ideal: hits, of what one cache without end would have."
    closed = any(request.delay is not None for request in work)
    more = [
        (column, cell)
        for column, cell in SESSION_COLUMNS
        if closed or any(row.within_goal is not None for row in summaries)
        if any(cell(row) is not None for row in summaries)
    ]
    names = [column for column, _ in more]
    values = [[cell(row) or "" for _, cell in more] for row in summaries]
    if more and show.on_terminal():
        show.table(columns, rows, note=note)
        show.say("")
        rows, columns, note = [row[:1] for row in rows], columns[:1], SESSION_NOTE
    show.table([*columns, *names], [[*row, *own] for row, own in zip(rows, values, strict=True)], note=note)
    say_failures(summaries)
