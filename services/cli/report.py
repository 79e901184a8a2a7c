"""The commands `report` and `policy report`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from msgspec import to_builtins

from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, show_json
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.progress import progress_bar
from kvplane.services.cli.show import Column, Styled
from kvplane.services.cli.words import here
from kvplane.services.history import client as historian
from kvplane.services.history.plain import exact
from kvplane.services.history.report import Range, clock, collect, extent, headline, readable
from kvplane.services.history.when import resolved, when
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.simulation.pages import page
from kvplane.services.simulation.report import Plan, produce
from kvplane.services.simulation.workloads import KINDS

if TYPE_CHECKING:
    from kvplane.services.history.report import Report, Section


def report_policies(
    *,
    out: Path,
    trace: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    policy: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    agents: Path | None = None,
    peer: Annotated[bool, Parameter(negative="")] = False,
    before: Path | None = None,
    processes: int | None = None,
) -> None:
    """Measure every policy on traces and generated workloads, in open and closed loops, and write it down as Markdown.

    Takes some half an hour on two cores. The same command makes the same file.

    Parameters
    ----------
    out
        File to write to.
    trace
        Traces beside the generated workloads, in the form of `kvplane simulate`.
    policy
        Policies beside the built-in ones, as in ttft:crowd_weight=4 or my_module:score.
    agents
        A closed loop of agents (sessions with delays, docs/traces.md), judged by halves beside the generated ones.
    peer
        Also compare with Dynamo's real selector; needs kvplane[peers].
    before
        An earlier page: the means that ttft has there are a target.
    processes
        Processes to use; default is one a core.
    """
    if not out.absolute().parent.is_dir():
        raise BadRequest(f"{out.parent} is no folder; make it first")
    try:
        earlier = before.read_text(encoding="utf-8") if before is not None else ""
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"--before can't be read: {error}") from None
    plan = Plan(
        traces=(*map(str, trace), *KINDS), policies=policy, peer=peer, agents=str(agents) if agents is not None else ""
    )
    command = " ".join(
        [
            "kvplane policy report",
            *(f"--trace {path}" for path in trace),
            *(f"--policy {text}" for text in policy),
            *([f"--agents {agents}"] if agents is not None else []),
            *(["--peer"] if peer else []),
            *([f"--before {before.name}"] if before is not None else []),
            f"--out {out}",
        ]
    )
    with progress_bar() as progress:
        task = progress.add_task("simulating", total=plan.steps)
        report = produce(plan, processes=processes or os.cpu_count() or 1, progress=lambda: progress.advance(task))
    out.write_text(page(report, command, earlier))


def report(
    *,
    since: str | None = None,
    until: str | None = None,
    html: Path | None = None,
    png: Path | None = None,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Show the history at a glance: hit rates, times to first token, predictions, evictions, session moves, nodes.

    Parameters
    ----------
    since
        Only from this moment on: 10m, 2h or 3d ago, yesterday, 2026-01-31, 2026-01-31T12:00 (UTC), or a sequence.
    until
        Only before this moment; of a sequence, up to it.
    html
        Write it, with pictures, to this file; it opens in a browser and needs nothing else.
    png
        Write its pictures to this file.
    json
        Print JSON.
    """
    start(common, quiet=True)
    now = datetime.now(UTC)
    span = Range(*(None if one is None else when(resolved(one, here()), now) for one in (since, until)))
    match span:
        case (int() as first, int() as last) if first > last:
            raise BadRequest(f"--since {since} is after --until {until}")
        case (datetime() as begin, datetime() as end) if begin >= end:
            raise BadRequest(f"--since {since} is not before --until {until}")
    for path in (html, png):
        if path is not None and not path.absolute().parent.is_dir():
            raise BadRequest(f"{path.parent} is no folder; make it first")
    found, known = run_async(_collect, span, json or html is not None or png is not None, common)
    if found is None:
        _nothing(known, json=json)
        return
    if json:
        show_json(exact(to_builtins(found, builtin_types=(datetime,))))
    elif html is None and png is None:
        _show(found)
    # Drawing is slow to load.
    if html is not None:
        from kvplane.services.history.report_html import page as html_page  # noqa: PLC0415

        _write(html, html_page(found, datetime.now(UTC).replace(tzinfo=None)).encode())
    if png is not None:
        from kvplane.services.history.report_plot import png as picture  # noqa: PLC0415

        _write(png, picture(found))


async def _collect(
    span: Range, charts: bool, common: Common  # noqa: FBT001
) -> tuple[Report | None, tuple[datetime, datetime] | None]:  # fmt: skip
    async with common.connected("kvplane-report", seconds=CONNECT_SECONDS) as client:
        ask = partial(historian.table, client, common.fleet)
        found = await collect(ask, common.fleet, span, charts=charts)
        return found, await extent(ask) if found is None else None


def _nothing(known: tuple[datetime, datetime] | None, *, json: bool) -> None:
    if known is None:
        sentence = "The history is empty: nothing has been written to the log yet."
    else:
        sentence = f"The history holds nothing of that time; it holds {clock(known[0])} to {clock(known[1])} UTC."
    if json:
        show_json(None)
    show.say(sentence, error=json)


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        try:
            unfinished.write_bytes(content)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise BadRequest(f"{path} can't be written: {error.strerror or error}") from None
    show.say(f"{len(content):,} bytes in {path}", error=True)


def _show(found: Report) -> None:
    show.pairs([("fleet", found.fleet), *headline(found)])
    for section in found.sections:
        more = f" ({len(section.rows)} of {section.total:,})" if section.total > len(section.rows) else ""
        show.say("")
        show.say(Styled(section.title, "bold"), more + ("" if section.rows else ": none"))
        if section.rows:
            _table(section, one_day=found.overview.first.date() == found.overview.last.date())


def _table(section: Section, *, one_day: bool) -> None:
    """A section; on a terminal, times have no date when all are of one day, which the head of the page says."""
    cut = one_day and show.on_terminal()
    show.table(
        [
            Column(name, number=number, spare=place)
            for place, (number, name) in enumerate(zip(section.numbers, section.columns, strict=True))
        ],
        [
            [
                readable(column, value)[11 if cut and isinstance(value, datetime) else 0 :]
                for column, value in zip(section.columns, row, strict=True)
            ]
            for row in section.rows
        ],
    )
