"""The command `doctor`."""

from __future__ import annotations

from msgspec import to_builtins
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.ask import CONNECT_SECONDS, Json, show_json
from services.cli.common import COMMON, Common, run_async, start
from services.doctor import Finding, examine, judge

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(*, json: Json = False, common: Common = COMMON) -> int:
    """Look whether all is well: log, replicas and their digests, history, nodes. Exit code 1 when something is wrong.

    Parameters
    ----------
    json
        Print JSON.
    """
    start(common, quiet=True)
    findings = run_async(_examine, common)
    if json:
        show_json(to_builtins(findings))
    else:
        table = Table.grid(padding=(0, 2))
        for finding in findings:
            mark = f"[{_COLOURS[finding.level]}]{finding.level}[/]"
            table.add_row(mark, f"[bold]{escape(finding.what)}[/]", escape(finding.said))
        Console().print(table)
    return 1 if any(finding.level == "problem" for finding in findings) else 0


async def _examine(common: Common) -> list[Finding]:
    async with common.connected("kvplane-doctor", seconds=CONNECT_SECONDS) as client:
        return judge(await examine(client, common.fleet))
