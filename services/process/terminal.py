"""Text that came from outside, such as a node's address or a session's name, as a terminal may get it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

# Beyond those that JSON escapes: terminals take some of them for the beginning of a command.
_CONTROLS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with everything that is not printed escaped, as in `\x1b[2J`; with `lines`, line ends and tabs stay."""
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode() for each in text
    )


def json_text(encoded: bytes) -> str:
    """JSON as text that a terminal may get; it stays the same JSON."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found.group()):04x}", encoded.decode())


def log_printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A step of structlog: no value brings control characters to a terminal."""
    return {key: printable(value) if isinstance(value, str) else value for key, value in event.items()}
