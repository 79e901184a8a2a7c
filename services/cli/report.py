"""The command `policy report`."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import Annotated

from cyclopts import Parameter

from services.cli.simulate import progress_bar
from services.errors import BadRequest
from services.simulator.pages import page
from services.simulator.report import produce, total
from services.simulator.workloads import KINDS


def report_policies(
    *,
    out: Path,
    trace: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    peer: Annotated[bool, Parameter(negative="")] = False,
    processes: int | None = None,
) -> None:
    """Measure every policy on traces and generated workloads, at several loads, and write it down as Markdown.

    Takes some 20 minutes on two cores. The same command makes the same file.

    Parameters
    ----------
    out
        File to write to.
    trace
        Traces beside the generated workloads, in the form of `kvplane simulate`.
    peer
        Also compare with Dynamo's real selector; needs kvplane[peers].
    processes
        Processes to use; default is one a core.
    """
    if not out.absolute().parent.is_dir():
        raise BadRequest(f"{out.parent} is no folder; make it first")
    traces = [*map(str, trace), *KINDS]
    command = " ".join(
        ["kvplane policy report", *(f"--trace {path}" for path in trace), *(["--peer"] if peer else []), f"--out {out}"]
    )
    with progress_bar() as progress:
        task = progress.add_task("simulating", total=total(traces, peer=peer))
        report = produce(
            traces, processes=processes or os.cpu_count() or 1, peer=peer, progress=lambda: progress.advance(task)
        )
    out.write_text(page(report, command))
