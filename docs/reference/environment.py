"""The table of environment variables, made from the options of all commands."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from kvplane.services.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cyclopts import App

HEAD = """\
# Environment variables

Options of the services that run on come from the environment as well, and so does where the fleet is and how to log in, for
all commands that connect. An option on the command line wins. What is not in this table is not read. Several values
are separated by blanks; `1` and `0` turn a switch on and off.

None of these names is one that Kubernetes sets in a container for a Service called `kvplane` or `kvplane-anything`
(`KVPLANE_PORT`, `KVPLANE_SERVICE_HOST`, `KVPLANE_PORT_4222_TCP`, ...): that is why the port of `up` is `KVPLANE_PORT_NUMBER`.
`compose/` has a few variables of its own, see [its README](../compose/README.md).

Made from the code with `python -m docs.reference.environment > docs/environment.md`.

| variable | option | of | what it is |
|---|---|---|---|
"""
EVERY = 12
"""An option of at least so many commands is listed as one of all commands that connect."""


class Option(NamedTuple):
    """An option of one command that comes from the environment."""

    variable: str
    option: str
    command: str
    help: str


def options(app: App, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """All of an app and of the commands under it."""
    for name in app:
        if name.startswith("-"):
            continue
        command = app[name]
        here = (*path, name)
        if command.default_command is not None:
            for argument in command.assemble_argument_collection(parse_docstring=True):
                for variable in argument.parameter.env_var or ():
                    text = " ".join((argument.parameter.help or "").split())
                    yield Option(variable, argument.name, " ".join(here), text)
        yield from options(command, here)


def make() -> str:
    """The page."""
    found: dict[tuple[str, str], list[Option]] = defaultdict(list)
    for each in options(app):
        found[each.variable, each.option].append(each)
    lines = []
    for (variable, option), held in sorted(found.items()):
        meanings: dict[str, list[str]] = defaultdict(list)
        for each in held:
            meanings[each.help].append(each.command)
        for text, commands in meanings.items():
            of = "all that connect" if len(commands) >= EVERY else ", ".join(f"`{name}`" for name in commands)
            lines.append(f"| `{variable}` | `{option}` | {of} | {text.replace('|', chr(92) + '|')} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(make())
