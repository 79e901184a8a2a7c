"""Commands of the history: `historian`, `history status`, `history rebuild`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
from cyclopts import App, Parameter
from rich.console import Console

from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, question, show_json
from kvplane.services.cli.common import (
    COMMON,
    Common,
    Http,
    ServedPolicyModules,
    allow_modules,
    run_async,
    run_until_signal,
    start,
)
from kvplane.services.cli.show import Cell, Styled
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.protocol.status import HistoryStatus

# DuckDB and all that a historian is made of is loaded where one runs, not for a question to it.
# ruff: noqa: PLC0415
history = App(name="history", help="See how far the history is, or make it again.")

Folder = Annotated[Path, Parameter(name="--history", env_var="KVPLANE_HISTORY")]
DEFAULT_FOLDER = Path("kvplane-history")


def historian(
    *,
    history: Folder = DEFAULT_FOLDER,
    keep_days: Annotated[float | None, Parameter(env_var="KVPLANE_KEEP_DAYS")] = None,
    keep_gb: Annotated[float | None, Parameter(env_var="KVPLANE_KEEP_GB")] = None,
    timeout: Annotated[float, Parameter(env_var="KVPLANE_TIMEOUT")] = 30.0,
    max_rows: Annotated[int, Parameter(env_var="KVPLANE_MAX_ROWS")] = 1_000_000,
    memory_gb: Annotated[float, Parameter(env_var="KVPLANE_MEMORY_GB")] = 2.0,
    policy_module: ServedPolicyModules = (),
    http: Http = None,
    common: Common = COMMON,
) -> None:
    """Keep the fleet's history for SQL, and answer questions about the past. One for each fleet.

    Parameters
    ----------
    history
        Folder of the history: DuckDB for the last hours, Parquet for the hours before.
    keep_days
        Let go what is older than so many days; default is to keep all.
    keep_gb
        Let go the oldest hours when the archive is larger than so many gigabytes; default is to keep all.
    timeout
        Seconds that a query may take.
    max_rows
        Rows that a query may give.
    memory_gb
        Gigabytes of memory for queries and ingestion.
    policy_module
        Modules from which policies of the form module:attr may be taken, to explain their decisions.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none.
    """
    from kvplane.services.cli.historian import run_alone
    from kvplane.services.history.ingest import Retention, give_way, relax_collector
    from kvplane.services.history.pages import Limits
    from kvplane.services.observability.web import check_address

    start(common)
    check_address(http)
    allow_modules(policy_module)
    for value, option in ((keep_days, "keep-days"), (keep_gb, "keep-gb"), (timeout, "timeout"), (max_rows, "max-rows")):
        if value is not None and value <= 0:
            raise BadRequest(f"--{option} is {value:g}; it must be more than 0")
    if memory_gb < 0.25:
        raise BadRequest(f"--memory-gb is {memory_gb:g}; it must be at least 0.25")
    # Before DuckDB starts its threads.
    give_way()
    relax_collector()
    limits = Limits(seconds=timeout, rows=max_rows, memory=int(memory_gb * 1e9))
    retention = Retention(keep_days, None if keep_gb is None else int(keep_gb * 1e9))
    run_until_signal(run_alone, history, limits, retention, tuple(policy_module), http, common)


@history.command
def status(*, json: Json = False, common: Common = COMMON) -> None:
    """Show how far the history is, and what it takes on the disk.

    Parameters
    ----------
    json
        Print JSON.
    """
    answer = question(common, "history.status", messages.StatusRequest())
    if json:
        show_json(answer)
        return
    reported = msgspec.convert(answer, HistoryStatus)
    behind = reported.log - reported.stored
    days = " to ".join(dict.fromkeys(reported.archive_days))
    state: Cell = "healthy" if reported.healthy else Styled(f"not stored: {reported.failure or 'log away'}", "red")
    show.pairs(
        [
            ("fleet", reported.fleet),
            ("state", state),
            ("stored", f"up to sequence {reported.stored:,}" + (f", {behind:,} behind the log" if behind else "")),
            ("live", f"{reported.live_bytes / 1e6:,.1f} MB, from sequence {reported.archived + 1:,}"),
            ("archive", f"{reported.archive_bytes / 1e6:,.1f} MB in {reported.archive_files} files {days}"),
            ("snapshots", ", ".join(f"{sequence:,}" for sequence in reported.snapshots[-3:]) or "none"),
        ]
    )  # fmt: skip


@history.command
def rebuild(*, history: Folder = DEFAULT_FOLDER, from_log: bool = False, common: Common = COMMON) -> None:
    """Make the history again, from its archive and the log. No historian may run on the folder meanwhile.

    The file that was there is kept as history.duckdb.before; with --from-log the archive is kept as archive.before. What was
    added to the history (whatif_runs, whatif_requests) does not follow from the log and is only there.

    Parameters
    ----------
    history
        Folder of the history.
    from_log
        Take nothing from the archive, all from the log; only when the log still has its beginning.
    """
    start(common, quiet=True)
    run_async(_rebuild, history, from_log, common)


async def _rebuild(folder: Path, from_log: bool, common: Common) -> None:  # noqa: FBT001
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvplane.projections.history import archive
    from kvplane.projections.history.store import ARCHIVE, FILE
    from kvplane.services.cli.historian import holding
    from kvplane.services.history.ingest import Ingest

    async with (
        common.connected("kvplane-rebuild", seconds=CONNECT_SECONDS) as client,
        holding(folder, "kvplane history rebuild", common),
    ):
        path = folder / FILE
        if path.exists():
            # A historian of before folders had owners keeps it: a lock is asked for first.
            await anyio.to_thread.run_sync(_check_free, path)
            aside(path)
        if from_log and (folder / ARCHIVE).exists():
            aside(folder / ARCHIVE)
        ingest = Ingest(client, common.fleet, folder)
        if not from_log:
            last = await ingest.in_thread(partial(archive.recover, ingest.store))
            show.say(f"archive: up to sequence {last:,}", error=True)
        columns = (TextColumn("reading the log"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("log", total=None)
            async with anyio.create_task_group() as group:
                group.start_soon(ingest.run)
                while not ingest.follower.caught_up.is_set() or ingest.stored < ingest.follower.target:
                    progress.update(task, total=ingest.follower.target or None, completed=ingest.stored)
                    await anyio.sleep(0.05)
                group.cancel_scope.cancel()
        show.say(f"history: up to sequence {ingest.stored:,}", error=True)


def aside(path: Path) -> Path:
    """Rename a file, with DuckDB's log of it, or a folder, so that nothing of it is lost; its new path."""
    names = (f"{path.name}.before{number}" for number in ("", *(f"-{again}" for again in range(2, 1000))))
    free = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    log = path.with_name(f"{path.name}.wal")
    if log.exists():
        log.rename(free.with_name(f"{free.name}.wal"))
    return path.rename(free)


def _check_free(path: Path) -> None:
    """Raise `BadRequest` when a process has the file open."""
    import fcntl

    with path.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadRequest(f"a historian has {path.parent.name}/{path.name} open; stop it first") from None
        fcntl.lockf(file, fcntl.LOCK_UN)
