"""What a terminal of some width, or a pipe, gets of what commands print."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(width: int, call: Callable[[], object], *, colours: bool = False) -> str:
    """What is printed on a terminal of that width."""
    environment = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "TERM"}}
    environment |= {"COLUMNS": str(width), "TERM": "xterm"} | ({} if colours else {"NO_COLOR": "1"})
    with patch.dict(os.environ, environment, clear=True), patch.object(sys, "stdout", Terminal()) as stream:
        call()
        return stream.getvalue()


def plain(call: Callable[[], object]) -> str:
    """What is printed in a pipe."""
    with patch.object(sys, "stdout", io.StringIO()) as stream:
        call()
        return stream.getvalue()


def left_out(text: str) -> set[str]:
    """Columns that a table says it left out."""
    found = re.search(r"^Left\s+out,\s+for\s+want\s+of\s+room:\s+(.*?)\.(?=\s)", text, re.DOTALL | re.MULTILINE)
    return set(re.split(r",\s+", " ".join(found[1].split()))) if found else set()
