"""The command `trace`: the fleet's own history as a trace."""

from __future__ import annotations

import gzip
import sys
from contextlib import aclosing, contextmanager
from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import App, Parameter

from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.progress import progress_bar
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvplane.services.whatif.export import Exported

trace = App(name="trace", help="The requests that the fleet served, as a trace for kvplane simulate.")


@trace.command
def export(
    *,
    since: str | None = None,
    until: str | None = None,
    model: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    out: Path | None = None,
    common: Common = COMMON,
) -> None:
    """Write the recorded requests as a trace: sessions, delays, and which prompts share their beginnings.

    It is anonymous: blocks and sessions are numbers, times count from the first request, and names of nodes, models and
    requests are not in it. Lengths and the rhythm of requests are. kvplane simulate reads it.

    Parameters
    ----------
    since
        Where the span begins: 10m, 2h or 3d ago, yesterday, 2026-01-31, 2026-01-31T12:00 (UTC), or a sequence; default is the
        history's beginning.
    until
        Where it ends; default is now.
    model
        Only requests for these models; needed when there are several.
    out
        File to write to, compressed when it ends in .gz; standard output if not given.
    """
    start(common, quiet=True)
    made = run_async(_export, since, until, model, out, common)
    show.say(_said(made), error=True)
    for count, one, several in (
        (made.unanswered, "request has no recorded end", "requests have no recorded end: taken as answered at once"),
        (made.overlapping, "request came before its session's last answer", "requests came before their session's last answer"),
        (made.unrecorded, "request has no recorded blocks", "requests have no recorded blocks: they share nothing"),
    ):  # fmt: skip
        if count:
            show.say(f"{count:,} {one if count == 1 else several}", error=True)


def _said(made: Exported) -> str:
    alone = f", {made.alone:,} of them without a session" if made.alone and made.sessions else ""
    sessions = (
        f" in {made.sessions:,} session{'s' * (made.sessions != 1)}" if made.sessions else ", none with a session"
    )
    return (
        f"{made.requests:,} request{'s' * (made.requests != 1)}{sessions}{alone}, over {made.seconds:,.0f} s; blocks of "
        f"{made.block_size} tokens"
    )


async def _export(
    since: str | None, until: str | None, models: tuple[str, ...], out: Path | None, common: Common
) -> Exported:  # fmt: skip
    with progress_bar() as progress:
        task = progress.add_task("reading the history", total=None)
        from kvplane.services.whatif.export import export as exported  # noqa: PLC0415 - slow to load

        encode = msgspec.json.Encoder().encode
        async with (
            common.connected("kvplane-trace", seconds=CONNECT_SECONDS) as client,
            aclosing(
                exported(
                    client, common.fleet, since=since, until=until, models=models,
                    progress=lambda done, total: progress.update(task, completed=done, total=total),
                )
            ) as lines,
        ):  # fmt: skip
            try:
                # What is wrong with the span is said before a file is made.
                line, made = await anext(lines)
            except StopAsyncIteration:
                raise BadRequest("the history let the span go while it was read: choose a later one") from None
            with writing(out) as write:
                write(encode(line) + b"\n")
                async for line, _ in lines:
                    write(encode(line) + b"\n")
    return made


@contextmanager
def writing(out: Path | None) -> Iterator[Callable[[bytes], object]]:
    """Standard output, or a file that is there whole or not at all."""
    if out is None:
        yield sys.stdout.buffer.write
        sys.stdout.flush()
        return
    unfinished = out.with_name(f"{out.name}.unfinished")
    try:
        with gzip.open(unfinished, "wb") if out.suffix == ".gz" else unfinished.open("wb") as file:
            yield file.write
        unfinished.rename(out)
    except OSError as error:
        raise BadRequest(f"{out} can't be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
