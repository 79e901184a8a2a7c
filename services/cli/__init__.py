"""The command `kvplane`. `run` has what runs on, `ask` what asks a running fleet, `log` what reads the log."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cyclopts import App, Parameter
from cyclopts.config import Env

from events.errors import KvplaneError
from services.cli import ask, demo, history, log, past, report, run, simulate, sql, whatif
from services.micro import package_version

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
app.command(run.up)
app.command(run.router)
app.command(run.coordinator)
app.command(history.historian)
app.command(run.simnode)
app.command(ask.node)
app.command(ask.policy)
ask.policy.command(report.report_policies, name="report")
app.command(ask.route)
app.command(past.state)
app.command(past.diff)
app.command(past.explain)
app.command(whatif.whatif)
app.command(sql.sql)
app.command(history.history)
app.command(log.events)
app.command(demo.demo)
app.command(simulate.simulate)
app.command(simulate.workload)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors are one sentence on standard error and exit code 1; wrong usage is exit code 2."""
    try:
        result = app(arguments, exit_on_error=True, result_action="return_value")
    except KvplaneError as error:
        fail(error)
    except BaseExceptionGroup as group:
        known = first_known(group)
        if known is None:
            raise
        fail(known)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe has left, as `head` does.
        sys.stderr.close()
        sys.exit(0)
    if isinstance(result, int) and result:
        sys.exit(result)


def first_known(group: BaseExceptionGroup[BaseException]) -> KvplaneError | None:
    """The first error in a group that is ours."""
    for error in group.exceptions:
        if isinstance(error, KvplaneError):
            return error
        if isinstance(error, BaseExceptionGroup) and (found := first_known(error)) is not None:
            return found
    return None


def fail(error: KvplaneError) -> None:
    """Say what went wrong and leave."""
    sys.stderr.write(f"kvplane: {error} [{error.code}]\n")
    sys.exit(1)
