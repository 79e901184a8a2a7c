"""The command `demo`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - cyclopts reads annotations

from msgspec import to_builtins

from kvplane.services.cli import show
from kvplane.services.cli.ask import Json, show_json
from kvplane.services.cli.common import run_async
from kvplane.services.cli.show import Styled
from kvplane.services.demo.run import EVERY_STEP_HELD, Demo, Options
from kvplane.services.process import logs
from kvplane.services.protocol.errors import BadRequest


def demo(*, trace: Path | None = None, limit: int = 2000, keep: Path | None = None, json: Json = False) -> int:
    """Start a fleet on this machine, show every feature, kill it, bring it back. Exit code 0 when every step held.

    Parameters
    ----------
    trace
        Take the requests from a trace (JSON lines with timestamp, input_length, output_length, hash_ids).
    limit
        How many requests of the trace.
    keep
        Keep the log and the processes' logs in this folder.
    json
        Print the result as JSON on standard output; the steps are still printed on standard error.
    """
    # Connections are lost on purpose here: the steps say what matters.
    logs.configure("error")
    if limit < 1:
        raise BadRequest(f"--limit is {limit}; it must be at least 1")
    run = Demo(Options(trace=trace, limit=limit, keep=keep))
    result = run_async(run.run)
    show.say("", error=True)
    show.pairs(run.figures(), error=True)
    failed = [step.step for step in result.steps if not step.held]
    message = Styled(f"{len(failed)} steps failed: {', '.join(failed)}", "bold red")
    show.say(message if failed else Styled(EVERY_STEP_HELD, "green"), error=True)
    if json:
        show_json(to_builtins(result))
    return 0 if result.held else 1
