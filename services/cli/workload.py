"""The command `workload`, which needs no fleet."""

from __future__ import annotations

import os
import sys
from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import TYPE_CHECKING

import msgspec

from kvplane.services.cli import show
from kvplane.services.cli.limits import within
from kvplane.services.cli.progress import progress_bar
from kvplane.services.cli.show import Column
from kvplane.services.protocol.errors import BadRequest, BadTrace
from kvplane.services.simulation.agents import DEFAULT, DEFAULT_SESSIONS, NAME, WORKLOADS, generate_agents
from kvplane.services.simulation.trace import Trace, work_of
from kvplane.services.simulation.workloads import GENERATED_REQUESTS, generate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.simulation.likeness import Figure
    from kvplane.services.simulation.trace import TraceRequest

MOST = 10**12
MOST_SESSIONS = 10**6
SHOWN = 4
"""Figures that are named because they are far apart."""


def workload(
    kind: str,
    *,
    requests: int | None = None,
    sessions: int | None = None,
    like: Path | None = None,
    against: Path | None = None,
    rate: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Make requests of one kind, as JSON lines in the form of a trace.

    The kind agent is a closed loop: coding agents whose contexts grow turn by turn, with pauses, sub-agents, and
    beginnings that sessions share. With --like it is fitted to a trace of yours, and a table says how near it is.

    Parameters
    ----------
    kind
        multi-turn, shared-prefix, tools, single-turn or agent.
    requests
        How many; default is 6,000. Of agent whole sessions, the last of which is cut.
    sessions
        How many sessions of agent, their sub-agents not counted; default is as many as --like has, or 100.
    like
        Trace of sessions with delays, or a folder of kv-cache-tester's, to which agent is fitted.
    against
        Another trace to compare with than that of --like, such as one that nothing was fitted to.
    rate
        Requests per second; each kind has its own default. A closed loop has it in the long run.
    seed
        Another seed makes other requests.
    out
        File to write to; standard output if not given.
    """
    within(requests, "requests", 1, MOST)
    within(sessions, "sessions", 1, MOST_SESSIONS)
    within(rate, "rate", 1e-3, 1e6)
    if kind not in WORKLOADS:
        raise BadRequest(f"{kind!r} is no kind of workload; there are {', '.join(WORKLOADS)}")
    for value, option in ((sessions, "sessions"), (like, "like"), (against, "against")):
        if value is not None and kind != NAME:
            raise BadRequest(f"--{option} is for {NAME}, not for {kind}")
    if sessions is not None and requests is not None:
        raise BadRequest("choose one of --sessions and --requests")
    if against is not None and like is None:
        raise BadRequest("--against is beside --like: name the trace to fit to as well")
    if kind != NAME:
        _write(generate(kind, requests or GENERATED_REQUESTS, seed=seed, rate=rate), out)
    elif like is None:
        count = None if requests is not None else sessions or DEFAULT_SESSIONS
        _write(generate_agents(DEFAULT, sessions=count, requests=requests, seed=seed, rate=rate), out)
    else:
        _like(like, against, requests=requests, sessions=sessions, seed=seed, rate=rate, out=out)


def _write(lines: Sequence[TraceRequest], out: Path | None) -> None:
    encode = msgspec.json.Encoder().encode
    try:
        if out is None:
            for line in lines:
                sys.stdout.buffer.write(encode(line) + b"\n")
            sys.stdout.flush()
        else:
            with out.open("wb") as file:
                for line in lines:
                    file.write(encode(line) + b"\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        if out is None:
            raise
        raise BadRequest(f"the requests can't be written: {error}") from None


def _like(
    like: Path, against: Path | None, *, requests: int | None, sessions: int | None, seed: int, rate: float | None,
    out: Path | None,
) -> None:  # fmt: skip
    with progress_bar() as progress:
        task = progress.add_task("starting", total=None)
        from kvplane.services.cli import simulating  # noqa: PLC0415 - slow to load
        from kvplane.services.simulation import fitting, likeness  # noqa: PLC0415 - slow to load

        def read(path: Path, option: str) -> Trace:
            if not os.path.lexists(path):
                raise BadTrace(f"--{option}: there is no file {path}")
            progress.update(task, description=f"reading {path.name}")
            return simulating.requests(
                str(path), limit=None, seed=seed, rate=None, block_size=None,
                progress=lambda done, total: progress.update(task, completed=done, total=total or None),
            )  # fmt: skip

        fitted = read(like, "like")
        given = fitted if against is None else read(against, "against")
        progress.update(task, description="fitting", completed=0, total=None)
        try:
            profile = fitting.fit(fitted)
        except BadTrace as error:
            raise BadTrace(f"{like.name}: {error}") from None
        count = None if requests is not None else sessions or fitting.count(fitted)
        made = generate_agents(profile, sessions=count, requests=requests, seed=seed, rate=rate)
        size = profile.block_size
        progress.update(task, description="comparing")
        found = likeness.compare(given, Trace([work_of(line, size) for line in made], size, "trace"))
        beyond = likeness.furthest(found)
    _write(made, out)
    # Standard output has the trace, unless that goes to a file.
    _show(found, beyond, like if against is None else against, error=out is None)


def _show(found: Sequence[Figure], beyond: Sequence[Figure], given: Path, *, error: bool) -> None:
    show.table(
        [
            Column("figure"), Column("given", number=True), Column("generated", number=True),
            Column("ratio", number=True), Column("halves", number=True, spare=1),
        ],
        [
            [
                figure.name, _number(figure.given), _number(figure.generated), _ratio(figure.ratio), _ratio(figure.own_ratio),
            ]
            for figure in found
        ],
        note="Lengths are tokens; a session's minutes are pauses, and answers on idle nodes. ratio: generated over given; "
        "halves: how far apart the given trace's own halves are, every second session against the others.",
        error=error,
    )  # fmt: skip
    if not beyond:
        show.say(f"No figure is further from {given.name} than its own halves are from each other.", error=True)
        return
    worst = ", ".join(f"{figure.name} {_ratio(figure.ratio)}" for figure in beyond[:SHOWN])
    most = "; most of all " if len(beyond) > SHOWN else ": "
    show.say(
        f"{len(beyond)} of {len(found)} figures are further from {given.name} than its own halves are from each other"
        f"{most}{worst}.",
        error=True,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
