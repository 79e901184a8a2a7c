"""The table of docs/security.md: who may do what, and that no low role changes what others see.

`python -m docs.reference.rights` tries it all once more and writes the table.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import anyio

from docs.reference.attempts import actions, guarded, tried
from docs.reference.hostile import harmed, live
from kvplane.services.auth.roles import ROLES, Role
from kvplane.services.process import logs

if TYPE_CHECKING:
    from docs.reference.attempts import Action, Tried

BEGIN, END = "<!-- made by `python -m docs.reference.rights` -->", "<!-- end of what is made -->"
PAGE = Path(__file__).resolve().parents[1] / "security.md"
NAMED_MOST = 6
"""So many subjects of a row are named."""


def table(found: Tried) -> str:
    """The table, of rows that are alike for all roles."""
    rows: dict[tuple[str, frozenset[Role]], list[Action]] = defaultdict(list)
    for action, roles in found.allowed.items():
        rows[(action.family, roles)].append(action)
    head = f"| what | how many | {' | '.join(ROLES)} |\n|---|---|{'---|' * len(ROLES)}\n"
    text = [head]
    for (family, roles), these in sorted(rows.items(), key=lambda row: (row[0][0], sorted(row[0][1]))):
        labels = list(dict.fromkeys(action.label for action in these))
        some = ", ".join(labels[:NAMED_MOST]) + (
            f" and {len(labels) - NAMED_MOST} more" if len(labels) > NAMED_MOST else ""
        )
        if not roles and len(labels) > NAMED_MOST:
            some = "everything else"
        cells = " | ".join("yes" if role in roles else "" for role in ROLES)
        text.append(f"| {family}: {some} | {len(these)} | {cells} |\n")
    return "".join(text)


def section(found: Tried, sent: int) -> str:
    """What stands between the marks in docs/security.md; `sent` hostile things were without effect."""
    return (
        f"{BEGIN}\n{found.combinations:,} combinations of an action and a role were tried against nats-server; it refused "
        f"{found.refused:,}. What it\nlets a router, historian, node or client do was then done with hostile bodies, reply "
        f"subjects and consumers, {sent:,} times: nobody else\nsaw a change.\n\n{table(found)}{END}"
    )


def written() -> str:
    """What stands there now."""
    text = PAGE.read_text()
    return text[text.index(BEGIN) : text.index(END) + len(END)]


async def make() -> str:
    """The section, made anew. Raises `RuntimeError` when a role can do harm."""
    with TemporaryDirectory() as folder:
        async with guarded(Path(folder)) as (server, held):
            found = await tried(server, held, actions())
            async with live(server, held, Path(folder) / "history") as running:
                harm = await harmed(running, held, found)
                if harm:
                    raise RuntimeError(harm)
                return section(found, running.sent)


if __name__ == "__main__":
    logs.configure("error")
    page = PAGE.read_text()
    PAGE.write_text(page.replace(written(), anyio.run(make)))
    sys.stdout.write(f"{PAGE.name} has the table\n")
