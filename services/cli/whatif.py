"""The command `whatif`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import pyarrow as pa
from cyclopts import Parameter
from msgspec import to_builtins
from msgspec.structs import replace

from kvplane.projections.history.tables import WHATIF_RUNS
from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, show_json
from kvplane.services.cli.common import COMMON, Common, PolicyModules, allow_modules, run_async, start
from kvplane.services.cli.progress import progress_bar
from kvplane.services.cli.runs import END_COLUMNS, TTFT_COLUMNS, TTFT_NOTE, say_failures, ttft_cells
from kvplane.services.cli.show import Column
from kvplane.services.cli.words import here
from kvplane.services.history.when import resolved
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest, PolicyFailed
from kvplane.services.rpc.client import ask
from kvplane.services.simulation.compare import parse_choice
from kvplane.services.simulation.plot import draw
from kvplane.services.whatif import replay as what
from kvplane.services.whatif.recording import REALLY, recorded_span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client

    from kvplane.services.simulation.world import Outcome, Served
    from kvplane.services.whatif.recording import Span
    from kvplane.services.whatif.replay import Result


def whatif(
    *,
    policy: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    since: str | None = None,
    until: str | None = None,
    warm: float = 120.0,
    routers: int = 1,
    policy_module: PolicyModules = (),
    processes: int | None = None,
    plot: Path | None = None,
    keep: bool = True,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Ask how the recorded requests would have gone under other policies.

    The requests go, in their recorded times, through each policy on simulated nodes that begin with what the real ones
    held. The recorded policy is simulated as well: how its run differs from what really happened is the simulation's bias,
    and it is what other policies are to be compared with.

    Parameters
    ----------
    policy
        Policies, each with parameters if need be: cascade, ttft:session_seconds=1 or my_module:score.
    since
        Where the span begins: 10m, 2h or 3d ago, yesterday, 2026-01-31, 2026-01-31T12:00 (UTC), or a sequence; default is the
        history's beginning.
    until
        Where it ends; default is now.
    warm
        So many seconds before the span are simulated as well and not counted.
    routers
        How many routers share the simulated requests.
    policy_module
        Modules from which the recorded policy may be taken, if it is of the form module:attr.
    processes
        Processes to use; default is one a core.
    plot
        Write a picture to this file (png, svg, pdf).
    keep
        Keep the results in the history's tables whatif_runs and whatif_requests.
    json
        Print JSON.
    """
    start(common, quiet=True)
    if warm < 0:
        raise BadRequest(f"--warm is {warm:g}; it must not be negative")
    if routers < 1 or (processes is not None and processes < 1):
        raise BadRequest("--routers and --processes must be at least 1")
    allow_modules(policy_module)
    choices = [parse_choice(text) for text in dict.fromkeys(policy)]
    run = uuid4().hex[:12]
    runs = [None, *choices]
    with progress_bar() as progress:
        task = progress.add_task("reading the history", total=None)
        since, until = (None if one is None else resolved(one, here()) for one in (since, until))
        span, begin, end = run_async(_recorded, since, until, warm, common)
        progress.remove_task(task)
        task = progress.add_task("simulating", total=len(span.recorded.requests) * len(runs))
        simulated = what.simulate(
            span.recorded, runs, routers=routers, processes=processes or os.cpu_count() or 1,
            modules=policy_module, progress=lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    names = [REALLY, what.AS_RECORDED, *(choice.text for choice in choices)]
    outcomes = [span.really, *simulated]
    names, outcomes, failed = what.decided(names, outcomes)
    served = what.compared(outcomes, span.counted)
    if not served[0]:
        raise BadRequest("no request of the span completed; choose a longer one with --since and --until")
    results = [
        what.summarize(name, each, outcome.rejected, outcome)
        for name, each, outcome in zip(names, served, outcomes, strict=True)
    ]
    if keep:
        run_async(_keep, run, (begin, end), names, outcomes, served, results, span.recorded.start, common)
    if json:
        show_json({"run": run, "since": begin, "until": end, "policies": to_builtins(results), "bias": bias(results)})
    else:
        _show(results, run if keep else "", begin, end)
    if plot is not None:
        shown = [
            (name, replace(outcome, served=list(each)))
            for name, outcome, each in zip(names, outcomes, served, strict=True)
        ]
        try:
            draw(plot, f"{len(served[0])} recorded requests, sequences {begin} to {end}", shown)
        except (OSError, ValueError) as error:
            raise BadRequest(f"the picture can't be written: {error}") from None
    if failed:
        raise PolicyFailed("; ".join(failed))


async def _recorded(since: str | None, until: str | None, warm: float, common: Common) -> tuple[Span, int, int]:
    async with common.connected("kvplane-whatif", seconds=CONNECT_SECONDS) as client:
        return await recorded_span(client, common.fleet, since, until, warm=warm)


async def _keep(
    run: str, span: tuple[int, int], names: Sequence[str], outcomes: Sequence[Outcome], served: Sequence[Sequence[Served]],
    results: Sequence[Result], begin: int, common: Common,
) -> None:  # fmt: skip
    async with common.connected("kvplane-whatif", seconds=CONNECT_SECONDS) as client:
        for name, outcome, each in zip(names, outcomes, served, strict=True):
            rows = what.request_rows(run, name, outcome, each, begin)
            step = max(1, client.max_payload // 512)
            for at in range(0, rows.num_rows, step):
                await _put(client, common.fleet, "whatif_requests", rows.slice(at, step))
        # Last, so that a run that is there is whole.
        made = datetime.now(UTC).replace(tzinfo=None)
        lines = [
            {"run": run, "made": made, "since": span[0], "until": span[1], **to_builtins(result)} for result in results
        ]
        await _put(client, common.fleet, "whatif_runs", pa.Table.from_pylist(lines, schema=WHATIF_RUNS.schema))


async def _put(client: Client, fleet: str, name: str, rows: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    request = messages.WhatifRequest(table=name, data=sink.getvalue().to_pybytes())  # type: ignore[arg-type]
    await ask(client, f"kv.{fleet}.history.whatif", request)


def bias(results: Sequence[Result]) -> dict[str, float | None]:
    """How far the simulation of the recorded policy is from what really happened: simulated over real."""
    really, again = results[0], results[1]
    return {
        name: round(getattr(again, name) / getattr(really, name), 3) if getattr(really, name) else None
        for name in ("mean", "p50", "p90", "p99", "hit_rate")
    }


def _show(results: Sequence[Result], run: str, begin: int, end: int) -> None:
    show.aside(f"{results[0].requests:,} recorded requests, sequences {begin:,} to {end:,}")
    show.aside("")
    base = results[1].mean
    show.table(
        [*TTFT_COLUMNS, *END_COLUMNS, Column("vs recorded", number=True)],
        [
            [
                row.policy + ("*" if row.policy_failures else "") + (" (simulated)" if place == 1 else ""), *ttft_cells(row),
                f"{row.imbalance:.2f}", f"{row.rejected:,}", f"{row.mean / base:.2f}x" if place and base else "-",
            ]
            for place, row in enumerate(results)
        ],
        note=f"{TTFT_NOTE}; vs recorded: mean, against that of the simulated recording.",
    )  # fmt: skip
    say_failures(results)
    off = bias(results)
    ratios = ", ".join(f"{name} {value:.2f}x" for name, value in off.items() if value is not None)
    show.aside(f"Bias: simulating what was recorded gives, of what really happened, {ratios}.")
    show.aside("Compare policies with the simulated recording.")
    if run:
        show.aside(f"Kept as run {run} in the tables whatif_runs and whatif_requests.")
