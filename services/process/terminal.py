"""Text that came from outside, such as a node's address, as a terminal, a log or a spreadsheet may get it."""

from __future__ import annotations

import json
import re
import sys
import traceback
from typing import TYPE_CHECKING

from kvplane.events.logins import without_logins

if TYPE_CHECKING:
    from types import TracebackType

    from structlog.typing import EventDict, WrappedLogger

_INDENT = "  "
_NOT_PLAIN = re.compile(r"[^\n -~]")
"""What `json_text` looks at more closely."""
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
"""How a spreadsheet's formula begins; the last four are the wide forms of the same signs."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with everything that is not printed escaped, as in `\x1b[2J`; with `lines`, line ends and tabs stay."""
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode() for each in text
    )


def paragraph(text: str) -> str:
    """A printable text of several lines. All but the first are indented: none of them can pass for a line of its own."""
    return printable(text, lines=True).replace("\n", f"\n{_INDENT}")


def json_text(encoded: bytes) -> str:
    """JSON as text that a terminal may get; it stays the same JSON."""
    # JSON itself leaves some that terminals take for the beginning of a command, or that turn lines round.
    return _NOT_PLAIN.sub(
        lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], encoded.decode()
    )


def spreadsheet(text: str) -> str:
    """A printable text that spreadsheets take for text: what they would compute has an apostrophe before it."""
    shown = printable(text)
    return f"'{shown}" if _FORMULA.match(shown) and not _NUMBER.fullmatch(shown) else shown


def log_without_logins(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A step of structlog: no value shows the login of a URL."""
    return {key: _without(value) if "@" in str(value) else value for key, value in event.items()}


def _without(value: object) -> object:
    if isinstance(value, str):
        return without_logins(value)
    if isinstance(value, list | tuple):
        return [_without(one) for one in value]
    if isinstance(value, dict):
        return {key: _without(one) for key, one in value.items()}
    return without_logins(str(value))


def log_printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A step of structlog: no value brings control characters to a terminal, or passes for another line."""
    return {key: _logged(key, value) if isinstance(value, str) else value for key, value in event.items()}


def _logged(key: str, value: str) -> str:
    return _INDENT + paragraph(value) if key == "exception" else printable(value)


def show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python says of an error that nobody caught, with its text printable; for `sys.excepthook`."""
    sys.stderr.write(
        paragraph(without_logins("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))) + "\n"
    )
