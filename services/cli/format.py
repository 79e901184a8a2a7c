"""Commands about the format of the log, for upgrades while the fleet runs: `format show|raise`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from kvplane.services.cli import show as shown
from kvplane.services.cli.ask import Json, question, show_json
from kvplane.services.cli.common import COMMON, Common
from kvplane.services.cli.show import Column
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
    shown.aside(f"format {answer['format']} is in force")
    shown.table(
        [Column("reader"), Column("kvplane"), Column("reads up to format", number=True)],
        [
            [reader["writer"] or reader["service"], reader["kvplane"], str(reader["format"])]
            for reader in answer["readers"]
        ],
    )


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
        The format; default is the newest that the coordinator knows.
    force
        Raise it although some that answer don't know it. They will stop.
    json
        Print JSON.
    """
    answer = question(common, "coordinator.format.raise", messages.FormatRequest(format=number, force=force))
    if json:
        show_json(answer)
    elif answer["changed"]:
        shown.say(f"format {answer['format']} is in force from sequence {answer['sequence']:,} on")
    else:
        shown.say(f"format {answer['format']} is in force already")
