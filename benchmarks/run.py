"""`make bench`: all measurements as one table and as JSON.

A target that is missed is said in the table and is no failure: machines differ and are noisy. What fails is a benchmark
that breaks, or that finds a wrong answer on its way.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import (
    contexts,
    decision,
    engines,
    failover,
    gateway,
    gateways,
    history,
    index,
    past,
    prompts,
    service,
    snapshots,
    throughput,
)
from benchmarks.common import Row, quiet

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path("build/bench.json")
NAMES = (
    "index",
    "decision",
    "contexts",
    "service",
    "throughput",
    "history",
    "past",
    "failover",
    "snapshots",
    "engines",
    "gateway",
    "prompts",
    "gateways",
)

app = App(name="bench", help="Measure kvplane.", result_action="return_value")


def number(value: float) -> str:
    """As many digits as matter, and enough to see on which side of a target it is."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows: list[Row]) -> Table:
    """The rows as a table."""
    made = Table(title=f"kvplane, Python {platform.python_version()}, {os.cpu_count()} cores", title_justify="left")
    for column in ("name", "measured", "target", "held", "beside", "ratio", "note"):
        made.add_column(column, justify="right" if column in {"measured", "ratio"} else "left", overflow="fold")
    for one in rows:
        held = Text("") if one.held is None else Text("yes", "green") if one.held else Text("no", "bold red")
        beside = "" if one.other is None else f"{one.beside} {number(one.other)}"
        if one.beside and one.other is None:
            beside = f"{one.beside} not installed"
        made.add_row(
            one.name, f"{number(one.measured)} {one.unit}", one.target, held, beside,
            "" if one.ratio is None else f"{one.ratio:.2f}x", one.note,
        )  # fmt: skip
    return made


@app.default
def bench(
    *,
    json: Annotated[Path, Parameter(help="Where to write the result.")] = RESULT,
    only: Annotated[
        tuple[str, ...],
        Parameter(help=f"Run only this benchmark: {', '.join(NAMES)}. May be repeated.", negative=""),
    ] = (),
    peer: Annotated[
        str | None, Parameter(help="A Python that has `ai-dynamo-runtime`; this one is tried otherwise.")
    ] = None,
    quick: Annotated[bool, Parameter(help="Few rounds on little data: whether it runs at all.", negative="")] = False,
) -> int:
    """Run the benchmarks; 0 unless one breaks."""
    unknown = set(only) - set(NAMES)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    # Ended by a supervisor, stop the server and the workers as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quiet()
    runs: dict[str, Callable[[], list[Row]]] = {
        "index": partial(index.run, peer=peer, quick=quick),
        "decision": partial(decision.run, quick=quick),
        "contexts": partial(contexts.run, quick=quick),
        "service": partial(service.run, quick=quick),
        "throughput": partial(throughput.run, quick=quick),
        "history": partial(history.run, quick=quick),
        "past": partial(past.run, quick=quick),
        "failover": partial(failover.run, quick=quick),
        "snapshots": partial(snapshots.run, quick=quick),
        "engines": partial(engines.run, quick=quick),
        "gateway": partial(gateway.run, quick=quick),
        "prompts": partial(prompts.run, quick=quick),
        "gateways": partial(gateways.run, quick=quick),
    }
    rows: list[Row] = []
    begin = time.perf_counter()
    for name, run in runs.items():
        if not only or name in only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += run()
    seconds = time.perf_counter() - begin
    # On a terminal as wide as it is; into a file or a pipe without cutting lines.
    console = Console() if sys.stdout.isatty() else Console(width=170)
    console.print(table(rows))
    console.print(f"{seconds:.0f} s; targets held: {sum(one.held is True for one in rows)}, missed: ", end="")
    console.print(", ".join(one.name for one in rows if one.held is False) or "none")
    json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    result = {"machine": machine, "seconds": round(seconds, 1), "quick": quick, "rows": rows}
    json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(app())
