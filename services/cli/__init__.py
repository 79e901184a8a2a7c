"""The command `kvplane`.

`run` has what runs on, `ask` what asks a running fleet, `log` what reads the log, `history`, `past`, `sql`, `report` and
`whatif` what a historian answers, `auth` what makes credentials, `simulate` what needs no fleet.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from cyclopts import App, Parameter
from cyclopts.config import Env

from kvplane.events.errors import KvplaneError
from kvplane.services.process import ending, hugepages
from kvplane.services.process.terminal import printable
from kvplane.services.process.version import package_version
from kvplane.services.protocol.errors import OutputFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

app = App(
    name="kvplane",
    help="Control plane of a fleet of LLM inference servers.\n\n"
    "Start with `kvplane demo` to see it work, or `kvplane up --simulate 4` for a fleet to play with. Every option can "
    "be set in the environment: `--server` is `KVPLANE_SERVER`, `--fleet` is `KVPLANE_FLEET`.",
    version=package_version(),
    config=Env("KVPLANE_", command=False),
    default_parameter=Parameter(negative_iterable=()),
)
# By name, so that a command loads what it needs and no other.
COMMANDS = (
    "up:up", "run:router", "run:coordinator", "history:historian", "run:simnode", "ask:node", "ask:policy", "ask:route",
    "attach:attach", "complete:complete",
    "past:state", "past:diff", "past:explain", "whatif:whatif", "sql:sql", "report:report", "history:history", "log:events",
    "snapshot:snapshot", "snapshot:compact", "copies:copies", "format:format", "doctor:doctor", "auth:auth",
    "demo:demo", "simulate:simulate", "simulate:workload",
)  # fmt: skip
# These hold a fleet in memory for as long as they run.
FOLDING = ("up", "router", "coordinator", "historian")
for name in COMMANDS:
    app.command(f"kvplane.services.cli.{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors are one sentence on standard error and exit code 1; wrong usage is exit code 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None and given and given[0] in FOLDING:
        hugepages.from_the_start()
    if not given or given[0] in {"--help", "-h"}:
        # The list of commands says what each does, so all are needed.
        for name in COMMANDS:
            app[name.partition(":")[2]]
    try:
        code = _run(arguments)
    finally:
        if arguments is None:
            ending.uninterruptible()
        try:
            ending.flush()
        except OSError as error:
            fail(OutputFailed(f"the output can't be written: {error.strerror}"))
    if code:
        sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command; its exit code."""
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=True)
        if arguments is None:
            ending.interruptible()
        result = command(*bound.args, **bound.kwargs)
    except KvplaneError as error:
        fail(error)
    except BaseException as error:
        code = ending.unwanted(error)
        if code is not None:
            return code
        why = ending.no_room(error)
        if why is not None:
            fail(OutputFailed(f"the output can't be written: {why}"))
        known = first_known(error) if isinstance(error, BaseExceptionGroup) else None
        if known is None:
            raise
        fail(known)
    return result if isinstance(result, int) else 0


def first_known(group: BaseExceptionGroup[BaseException]) -> KvplaneError | None:
    """The first error in a group that is ours."""
    for error in group.exceptions:
        if isinstance(error, KvplaneError):
            return error
        if isinstance(error, BaseExceptionGroup) and (found := first_known(error)) is not None:
            return found
    return None


def fail(error: KvplaneError) -> NoReturn:
    """Say what went wrong and leave."""
    with suppress(BrokenPipeError):
        sys.stderr.write(f"kvplane: {printable(str(error), lines=True)} [{error.code}]\n")
    sys.exit(1)
