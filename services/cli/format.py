"""Commands about the format of the log, for upgrades while the fleet runs: `format show|raise`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from kvplane.services.cli.ask import Json, question, show_json
from kvplane.services.cli.common import COMMON, Common
from kvplane.services.protocol import messages

format = App(name="format", help="The log's format: which is in force, who reads which, and raising it.")  # noqa: A001 - the name of the command


@format.command
def show(*, json: Json = False, common: Common = COMMON) -> None:
    """Show the format in force, and which formats those who read the log know.

    Parameters
    ----------
    json
        Print JSON.
    """
    answer = question(common, "coordinator.format.show", messages.StatusRequest())
    if json:
        show_json(answer)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("reader", "kvplane", "reads up to format"):
        table.add_column(column)
    for reader in answer["readers"]:
        table.add_row(reader["writer"] or reader["service"], reader["kvplane"], str(reader["format"]))
    console = Console()
    console.print(f"format {answer['format']} is in force", highlight=False)
    console.print(table)


@format.command(name="raise")
def raise_format(
    number: int | None = None,
    /,
    *,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Raise the format, once all routers, coordinators and historians run a kvplane that reads it.

    There is no way back: a kvplane that does not know the format stops when it comes to it.

    Parameters
    ----------
    number
        The format; the newest that the coordinator knows unless it is said.
    force
        Raise it although some that answer don't know it. They will stop.
    json
        Print JSON.
    """
    answer = question(common, "coordinator.format.raise", messages.FormatRequest(format=number, force=force))
    if json:
        show_json(answer)
    elif answer["changed"]:
        Console().print(
            f"format {answer['format']} is in force from sequence {answer['sequence']:,} on", highlight=False
        )
    else:
        Console().print(f"format {answer['format']} is in force already", highlight=False)
