"""The command `kvplane`.

`run` has what runs on, `ask` what asks a running fleet, `log` what reads the log, `history`, `past`, `sql`, `report`,
`whatif` and `trace` what a historian answers, `auth` and `key` what makes credentials, `simulate` and `workload` what needs no
fleet.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from cyclopts import App, Parameter

from kvplane.events.errors import KvplaneError, first_known
from kvplane.events.logins import without_logins
from kvplane.services.process import ending
from kvplane.services.process.later import later, without
from kvplane.services.process.terminal import paragraph, show_uncaught
from kvplane.services.protocol.errors import OutputFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

# By name, so that a command loads what it needs and no other. What each does stands here as well, so that the list of
# commands loads none of them: it is the first line of the command's own help.
COMMANDS = {
    "up:up": "Start a NATS server with its log in a folder, a coordinator, a gateway with its router, and a historian, until "
    "Ctrl-C.",
    "run:router": "Run a router. Start as many as you like; they share the requests.",
    "gateway:gateway": "Serve OpenAI's and Anthropic's APIs in front of the fleet's engines: route, forward, record.",
    "run:coordinator": "Run a coordinator. Start as many as you like; there is no leader.",
    "history:historian": "Keep the fleet's history for SQL, and answer questions about the past. One for each fleet.",
    "run:simnode": "Run simulated nodes of these names in one process.",
    "ask:node": "See and change the nodes of the fleet.",
    "ask:policy": "Change how routers decide.",
    "ask:route": "Ask where a request should go, and why.",
    "attach:attach": "Make a running engine a node of the fleet, for as long as the command runs.",
    "complete:complete": "Send a request to the engine that the router chooses, and record what the engine found cached.",
    "past:state": "Rebuild the fleet's state from the log, now or at a past moment, and show what it holds and its digest.",
    "past:diff": "Show what changed in the fleet between two moments.",
    "past:explain": "Say why a request was sent where it was: make the decision again from the log, and compare. "
    "Exit code 1 if it differs.",
    "whatif:whatif": "Ask how the recorded requests would have gone under other policies.",
    "sql:sql": "Ask the history in SQL (DuckDB's), read only. Without a query, a prompt.",
    "report:report": "Show the history at a glance: hit rates, times to first token, predictions, evictions, session moves, "
    "nodes.",
    "history:history": "See how far the history is, or make it again.",
    "log:events": "Read the events of the log.",
    "snapshot:snapshot": "Snapshots of the fleet's state, from which replicas start.",
    "snapshot:compact": "Purge the log below its oldest snapshot, and below what the history has stored. Nothing is lost "
    "that way.",
    "copies:copies": "Have so many servers of the cluster keep the log and its snapshots; both stay in use meanwhile.",
    "format:format": "The log's format: which is in force, who reads which, and raising it.",
    "doctor:doctor": "Look whether all is well: log, servers, clocks, replicas and their digests, history, nodes.",
    "auth:auth": "Make and take back credentials: who may log in, and what each may do.",
    "key:key": "Keys of gateways: who may use which models, and how much.",
    "demo:demo": "Start a fleet on this machine, show every feature, kill it, bring it back. Exit code 0 when every step "
    "held.",
    "simulate:simulate": "Ask what hit rate and time to first token a fleet would have with your requests, under several "
    "policies.",
    "trace:trace": "The requests that the fleet served, as a trace for kvplane simulate.",
    "workload:workload": "Make requests of one kind, as JSON lines in the form of a trace.",
}
# These hold a fleet in memory for as long as they run.
FOLDING = ("up", "router", "gateway", "coordinator", "historian")

# The client of NATS imports it for WebSockets, and it takes longer to load than all the rest of most commands.
later("aiohttp")


def build(*, summaries: bool = False) -> App:
    """The command line; with `summaries` for the list of commands, which then have no help but that line."""
    app = App(
        name="kvplane",
        help="Control plane of a fleet of LLM inference servers.\n\n"
        "Start with `kvplane demo` to see it work, or `kvplane up --simulate 4` for a fleet to play with. Where the fleet "
        "is can be set in the environment, too: `--server` is `KVPLANE_SERVER`, `--fleet` is `KVPLANE_FLEET`.",
        version=_version,
        default_parameter=Parameter(negative_iterable=()),
    )
    for name, summary in COMMANDS.items():
        app.command(f"kvplane.services.cli.{name}", help=summary if summaries else None)
    app.register_install_completion_command(help="Let the shell complete commands and options: bash, zsh, fish.")
    return app


def _version() -> str:
    from kvplane.services.process.version import package_version  # noqa: PLC0415 - reads what is installed, for 20 ms

    return package_version()


app = build()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors are one sentence on standard error and exit code 1; wrong usage is exit code 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None and given and given[0] in FOLDING:
        from kvplane.services.process import hugepages  # noqa: PLC0415 - for these only

        hugepages.from_the_start()
    called = build(summaries=True) if not given or given[0] in {"--help", "-h"} else app
    if given and not given[0].startswith("-"):
        # It would load half of rich for a kind of traceback that no log here has.
        without("structlog", "rich")
    try:
        code = _run(called, arguments)
    finally:
        if arguments is None:
            ending.uninterruptible()
        try:
            ending.flush()
        except OSError as error:
            fail(OutputFailed(f"the output can't be written: {error.strerror}"))
    if code:
        sys.exit(code)


def _run(called: App, arguments: Sequence[str] | None) -> int:
    """Run a command; its exit code."""
    try:
        command, bound, _ = called.parse_args(arguments, exit_on_error=True)
        if arguments is None:
            sys.excepthook = show_uncaught
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


def fail(error: KvplaneError) -> NoReturn:
    """Say what went wrong and leave."""
    with suppress(BrokenPipeError):
        sys.stderr.write(f"kvplane: {paragraph(without_logins(str(error)))} [{error.code}]\n")
    sys.exit(1)
