"""Commands that need no fleet: `simulate`, `workload`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvplane.events.subjects import check_name
from kvplane.services.cli.ask import Json, show_json
from kvplane.services.protocol.errors import BadRequest, BadTrace
from kvplane.services.simulation.compare import compare, parse_choice
from kvplane.services.simulation.hardware import Hardware
from kvplane.services.simulation.plot import draw
from kvplane.services.simulation.results import ideal_hit_rate
from kvplane.services.simulation.trace import TRACE_BLOCK_SIZE, read_trace, work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, KINDS, generate
from kvplane.services.simulation.world import Change, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.simulation.results import Summary
    from kvplane.services.simulation.trace import Work

DEFAULT_POLICIES = ("ttft", "blocks", "threshold", "least_loaded", "round_robin")
GENERATED_REQUESTS = 6000
MOST = 10**12
MOST_NODES = 10_000
MOST_BLOCK_SIZE = 65536
MOST_SECONDS = 4e9
"""Longest span of virtual time; beyond it nanoseconds are no 64-bit numbers."""
CAPACITY_TOKENS = 3_000_000
"""Default capacity of a node: its GPU's memory and some 400 GB of its host's."""


def simulate(
    trace: str,
    *,
    nodes: int = 8,
    policy: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = DEFAULT_POLICIES,
    capacity: int | None = None,
    speed: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    block_size: int | None = None,
    delay: float = 0.002,
    routers: int = 1,
    max_active: int = 0,
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

    Parameters
    ----------
    trace
        JSON lines with timestamp (ms), input_length, output_length, hash_ids and, if there is one, session; or a
        generated workload: multi-turn, shared-prefix, agent, single-turn.
    nodes
        How many nodes there are, named node-1, node-2, ...
    policy
        Policies to compare, each with parameters if need be: ttft:session_seconds=1 or my_module:score.
    capacity
        Blocks that a node can hold; default is 3 million tokens.
    speed
        How much faster than recorded requests arrive.
    seed
        Decides ties, and generates the workload.
    limit
        Only so many requests from the beginning; of a generated workload 6,000 if not given.
    block_size
        Tokens a block of the trace; default is 512, and 64 for generated workloads.
    delay
        Seconds until a router sees what is on the log.
    routers
        How many routers share the requests.
    max_active
        Most requests at once on a node; 0 is no limit.
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
        (capacity, "capacity", 1, MOST), (processes, "processes", 1, MOST), (speed, "speed", 1e-6, 1e6),
        (delay, "delay", 0, 1e4),
    ):  # fmt: skip
        within(value, name, least, most)
    work, size = requests(trace, limit=limit, seed=seed, rate=rate, block_size=block_size)
    span = max(request.arrival for request in work) / speed
    if not span <= MOST_SECONDS:
        raise BadRequest(f"the last request is sent after {span:g} s; the limit is {MOST_SECONDS:g}, see --speed")
    blocks = capacity if capacity is not None else CAPACITY_TOKENS // size
    base = Settings(
        nodes=nodes, capacity=blocks, block_size=size, speed=speed, seed=seed, delay=delay, routers=routers,
        most_active=max_active,
        changes=(*changes(fail, "fail", joins=False), *changes(join, "join", joins=True)),
    )  # fmt: skip
    check_changes(base)
    choices = [parse_choice(text) for text in dict.fromkeys(policy)]
    runs = [
        (choice, msgspec.structs.replace(base, policy=choice.policy, parameters=choice.parameters))
        for choice in choices
    ]
    with progress_bar() as progress:
        task = progress.add_task("simulating", total=len(work) * len(runs))
        made = compare(
            runs, work, processes=processes or os.cpu_count() or 1, keep=plot is not None,
            progress=lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    summaries = [summary for summary, _ in made]
    ideal = ideal_hit_rate(work, size)
    if json:
        show_json(
            {
                "trace": Path(trace).name, "requests": len(work), "ideal_hit_rate": round(ideal, 6),
                "settings": {
                    key: value for key, value in msgspec.to_builtins(base).items() if key not in {"policy", "parameters"}
                },
                "policies": msgspec.to_builtins(summaries),
            }
        )  # fmt: skip
    else:
        _show(base, work, ideal, summaries)
    if plot is not None:
        title = f"{Path(trace).name}: {len(work)} requests at speed {speed:g} on {nodes} nodes"
        try:
            draw(plot, title, [(summary.policy, outcome) for summary, outcome in made if outcome is not None])
        except (OSError, ValueError) as error:
            raise BadRequest(f"the picture can't be written: {error}") from None


def requests(
    trace: str, *, limit: int | None, seed: int, rate: float | None, block_size: int | None
) -> tuple[list[Work], int]:
    """Requests of a trace, or of a generated workload, and their block size. Raises `BadRequest` or `BadTrace`."""
    within(limit, "limit", 1, MOST)
    within(rate, "rate", 1e-3, 1e6)
    if trace in KINDS and not Path(trace).exists():
        if block_size not in {None, GENERATED_BLOCK_SIZE}:
            raise BadRequest(
                f"generated workloads have blocks of {GENERATED_BLOCK_SIZE} tokens; leave --block-size out"
            )
        made = generate(trace, limit or GENERATED_REQUESTS, seed=seed, rate=rate)
        return [work_of(line, GENERATED_BLOCK_SIZE) for line in made], GENERATED_BLOCK_SIZE
    if rate is not None:
        raise BadRequest("--rate is for generated workloads; a trace has its own times, see --speed")
    size = TRACE_BLOCK_SIZE if block_size is None else block_size
    within(size, "block-size", 1, MOST_BLOCK_SIZE)
    try:
        work = read_trace(Path(trace), block_size=size, limit=limit)
    except BadTrace as error:
        if os.path.exists(trace):  # noqa: PTH110 - for a name that is too long as well
            raise
        raise BadTrace(f"{error}; without a trace, simulate one of {', '.join(KINDS)}") from None
    # Traces may have times of the day; a simulation begins with its first request.
    begin = min(request.arrival for request in work)
    return [msgspec.structs.replace(request, arrival=request.arrival - begin) for request in work], size


def within(value: float | None, option: str, least: float, most: float) -> None:
    """Raise `BadRequest` unless an option that is given lies in its limits."""
    if value is not None and not least <= value <= most:
        raise BadRequest(f"--{option} is {value:g}; it must be from {least:g} to {most:g}")


def changes(given: Sequence[str], option: str, *, joins: bool) -> list[Change]:
    """Read `node@seconds`. Raises `BadRequest`."""
    found = []
    for text in given:
        node, at, time = text.partition("@")
        try:
            if not at or not node or not 0 <= float(time) < float("inf"):
                raise ValueError(text)  # noqa: TRY301
            found.append(Change(float(time), node, joins))
        except ValueError:
            raise BadRequest(f"--{option} is {text!r}; write a node and seconds, as in node-3@60") from None
    return found


def check_changes(settings: Settings) -> None:
    """Raise `BadRequest` unless only nodes that are there fail, and only nodes that are not there join."""
    there = {f"node-{number + 1}" for number in range(settings.nodes)}
    for change in sorted(settings.changes, key=lambda change: change.time):
        check_name(change.node, "a node's name")
        if change.joins and change.node in there:
            raise BadRequest(f"--join names {change.node!r}, which is there at {change.time:g} s already")
        if not change.joins and change.node not in there:
            raise BadRequest(
                f"--fail names {change.node!r}, which is not there at {change.time:g} s; the nodes are node-1 to "
                f"node-{settings.nodes}, and those that join"
            )
        there ^= {change.node}


def progress_bar() -> Progress:
    """Progress on standard error, when that is a terminal."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip


def _show(settings: Settings, work: Sequence[Work], ideal: float, summaries: Sequence[Summary]) -> None:
    console = Console()
    span = max(request.arrival for request in work) / settings.speed
    tokens = sum(request.tokens for request in work)
    console.print(
        f"{len(work)} requests, {tokens / len(work):,.0f} tokens each, in {span:,.0f} s; ideal hit rate {ideal:.1%}\n"
        f"{settings.nodes} nodes ({Hardware().name}), {settings.capacity} blocks of {settings.block_size} tokens each",
        highlight=False,
    )
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        caption="Time to first token in seconds; imbalance: busiest node over mean.",
    )  # fmt: skip
    table.add_column("policy", overflow="fold", min_width=12)
    for name in ("mean", "p50", "p90", "p99", "hits", "of ideal", "imbalance", "rejected"):
        table.add_column(name, justify="right", no_wrap=True)
    best = min(summary.mean for summary in summaries)
    for row in summaries:
        table.add_row(
            row.policy, f"{row.mean:.3f}", f"{row.p50:.3f}", f"{row.p90:.3f}", f"{row.p99:.3f}", f"{row.hit_rate:.1%}",
            f"{row.ideal_share:.1%}", f"{row.imbalance:.2f}", str(row.rejected),
            style="bold" if row.mean == best else None,
        )  # fmt: skip
    console.print(table)
    for row in summaries:
        if row.policy_failures:
            console.print(
                f"[yellow]{row.policy} failed for {row.policy_failures} decisions, and the least loaded node was taken:[/] "
                f"{row.failure}"
            )


def workload(
    kind: str, *, requests: int = GENERATED_REQUESTS, rate: float | None = None, seed: int = 0, out: Path | None = None
) -> None:
    """Make requests of one kind, as JSON lines in the form of a trace.

    Parameters
    ----------
    kind
        multi-turn, shared-prefix, agent or single-turn.
    requests
        How many.
    rate
        Requests per second; each kind has its own default.
    seed
        Another seed makes other requests.
    out
        File to write to; standard output if not given.
    """
    within(requests, "requests", 1, MOST)
    within(rate, "rate", 1e-3, 1e6)
    lines = b"".join(msgspec.json.encode(line) + b"\n" for line in generate(kind, requests, seed=seed, rate=rate))
    if out is None:
        sys.stdout.buffer.write(lines)
        sys.stdout.flush()
        return
    try:
        out.write_bytes(lines)
    except OSError as error:
        raise BadRequest(f"the requests can't be written: {error}") from None
