"""Where text meets a person: the one way in which commands print tables, pairs and sentences.

No value is ever cut. On a terminal, a table that is too wide shows fewer columns and says which it left out, or its rows one
below the other. In a pipe there is no width: rows with tabs between their cells, the columns' names first. Control characters
are escaped, since much of what is shown comes from outside.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, NamedTuple, TextIO

from kvplane.services.process.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

GAP = 2
"""Spaces between columns."""
LEAST_PROSE = 24
"""Narrowest column of sentences."""
VERTICAL_ROWS = 10
"""Up to so many rows go vertical, when all columns were asked for and they don't fit."""
ELSEWHERE = "--json, a wider terminal or a pipe (| less -S) shows them"
_STYLES = {
    "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "bold red": "1;31", "bold yellow": "1;33",
}  # fmt: skip


class Column(NamedTuple):
    """A column. Where room is short those with the highest `spare` go first, and those with 0 stay."""

    name: str
    number: bool = False
    """Flush right."""
    spare: int = 0
    prose: bool = False
    """Sentences, which may be broken between words; nothing else is ever broken."""


class Styled(NamedTuple):
    """Text with a style."""

    text: str
    style: str


Cell = str | Styled


class Table(NamedTuple):
    """A table. `title` and `note` are for people, and left out in a pipe."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    whole: bool = False
    """All columns were asked for: a few rows go vertical before a column is left out."""
    elsewhere: str = ELSEWHERE
    """How to see what is left out."""


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, title: str = "", note: str = "", whole: bool = False,
    elsewhere: str = ELSEWHERE, error: bool = False,
) -> None:  # fmt: skip
    """Print a table; with `error` on standard error."""
    _print(Table(columns, rows, title, note, whole, elsewhere), error=error)


def pairs(rows: Sequence[tuple[str, Cell]], *, error: bool = False) -> None:
    """Print names with their values."""
    stream = _stream(error=error)
    width = _width(stream)
    if width is None:
        stream.writelines(tabs([name, _text(value)]) + "\n" for name, value in rows)
        return
    for line in _pairs(rows, width):
        _write(line, stream)


def say(*parts: Cell, error: bool = False, wrap: bool = True) -> None:
    """Print a sentence; on a terminal, broken between words unless `wrap` is off."""
    stream = _stream(error=error)
    width = _width(stream)
    texts = [_printable(part) for part in parts]
    for line in [texts] if width is None or not wrap else _flowed(texts, width):
        _write(line, stream)


def aside(sentence: str) -> None:
    """Print a sentence beside a table: in a pipe, where rows are expected, on standard error."""
    say(sentence, error=not on_terminal())


def tabs(cells: Iterable[str]) -> str:
    """A row as it goes into a pipe."""
    return "\t".join(map(printable, cells))


def on_terminal() -> bool:
    """Whether standard output is one."""
    return sys.stdout.isatty()


def _print(made: Table, *, error: bool) -> None:
    stream = _stream(error=error)
    width = _width(stream)
    if width is None:
        stream.write(tabs(column.name for column in made.columns) + "\n")
        stream.writelines(tabs(map(_text, row)) + "\n" for row in made.rows)
        return
    for line in lines(made, width):
        _write(line, stream)


Line = list[Styled]


def lines(made: Table, width: int) -> Iterator[Line]:
    """A table as lines of a terminal of that width. Only a single value that is wider makes a line wider."""
    columns = made.columns
    rows = [[_printable(cell) for cell in row] for row in made.rows]
    if made.title:
        yield from ([Styled(line, "bold")] for line in _wrapped(printable(made.title), width))
    shown = fitting(columns, rows, width)
    if shown is None or (made.whole and len(shown) < len(columns) and len(rows) <= VERTICAL_ROWS):
        yield from _vertical(columns, rows, width)
        shown = dict.fromkeys(range(len(columns)), 0)
    else:
        yield from _horizontal(columns, rows, shown)
    if made.note:
        yield from ([Styled(line, "dim")] for line in _wrapped(printable(made.note), width))
    left = [printable(column.name) for place, column in enumerate(columns) if place not in shown]
    if left:
        note = f"Left out, for want of room: {', '.join(left)}. {made.elsewhere}."
        yield from ([Styled(line, "dim")] for line in _wrapped(note, width))


def fitting(columns: Sequence[Column], rows: Sequence[Sequence[Styled]], width: int) -> dict[int, int] | None:
    """Which columns fit a width, and how wide each is; none when not even those fit that must stay."""
    natural, least = [], []
    for place, column in enumerate(columns):
        texts = [column.name, *(row[place].text for row in rows)]
        natural.append(max(map(cells, texts)))
        longest = max((cells(word) for text in texts for word in text.split()), default=0)
        least.append(min(natural[-1], max(LEAST_PROSE, longest)) if column.prose else natural[-1])
    chosen: set[int] = set()
    used = -GAP
    for place in sorted(range(len(columns)), key=lambda place: (columns[place].spare, place)):
        if used + GAP + least[place] <= width:
            chosen.add(place)
            used += GAP + least[place]
        elif not columns[place].spare:
            return None
    shown = {}
    for place in sorted(chosen):
        more = min(width - used, natural[place] - least[place])
        shown[place] = least[place] + more
        used += more
    return shown


def _horizontal(
    columns: Sequence[Column], rows: Sequence[Sequence[Styled]], shown: dict[int, int]
) -> Iterator[Line]:  # fmt: skip
    gap = Styled(" " * GAP, "")

    def laid(row: Sequence[Styled]) -> Iterator[Line]:
        parts = {
            place: _wrapped(row[place].text, wide) if columns[place].prose else [row[place].text]
            for place, wide in shown.items()
        }
        for at in range(max(map(len, parts.values()), default=0)):
            line: Line = []
            for place, wide in shown.items():
                text = parts[place][at] if at < len(parts[place]) else ""
                pad = " " * (wide - cells(text))
                flush = [Styled(pad, ""), Styled(text, row[place].style)]
                line += (flush if columns[place].number else flush[::-1]) + [gap]
            yield line

    yield from laid([Styled(printable(column.name), "bold") for column in columns])
    yield [Styled(_rule() * (sum(shown.values()) + GAP * (len(shown) - 1)), "dim")]
    for row in rows:
        yield from laid(row)


def _vertical(columns: Sequence[Column], rows: Sequence[Sequence[Styled]], width: int) -> Iterator[Line]:
    """Rows one below the other, a line a value."""
    names = [printable(column.name) for column in columns]
    for number, row in enumerate(rows):
        if number:
            yield []
        yield from _pairs(list(zip(names, row, strict=True)), width, [column.prose for column in columns])


def _pairs(rows: Sequence[tuple[str, Cell]], width: int, prose: Sequence[bool] | None = None) -> Iterator[Line]:
    wide = max((cells(name) for name, _ in rows), default=0)
    for place, (name, value) in enumerate(rows):
        shown = _printable(value)
        room = max(LEAST_PROSE, width - wide - GAP)
        parts = _wrapped(shown.text, room) if prose is None or prose[place] else [shown.text]
        for at, part in enumerate(parts):
            label = "" if at else printable(name)
            yield [Styled(label, "bold"), Styled(" " * (wide - cells(label) + GAP), ""), Styled(part, shown.style)]


def _flowed(parts: Sequence[Styled], width: int) -> Iterator[Line]:
    """A sentence of several styles, as lines."""
    begin, ends = 0, []
    for part in parts:
        begin += len(part.text)
        ends.append(begin)
    whole, at = "".join(part.text for part in parts), 0
    for text in _wrapped(whole, width):
        # Where the line was broken, spaces went; an indentation that came with the line is in no part.
        body = text.lstrip(" ") if at else text
        line: Line = [Styled(text[: len(text) - len(body)], "")]
        at = whole.index(body, at)
        for part, end in zip(parts, ends, strict=True):
            begin = max(at, end - len(part.text))
            if begin < min(end, at + len(body)):
                line.append(Styled(whole[begin : min(end, at + len(body))], part.style))
        at += len(body)
        yield line


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - most text needs no table of widths

    return cell_len(text)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text; a word that is longer than a line stays in one piece."""
    if cells(text) <= width:
        return [text]
    indent = text[: len(text) - len(text.lstrip(" "))]
    return textwrap.wrap(
        text, width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent,
    ) or [""]  # fmt: skip


def _stream(*, error: bool) -> TextIO:
    return sys.stderr if error else sys.stdout


def _width(stream: TextIO) -> int | None:
    """Of the terminal; none when it is not one."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def _rule() -> str:
    return "─" if (sys.stdout.encoding or "").lower().startswith("utf") else "-"


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Styled) else cell


def _style(cell: Cell) -> str:
    return cell.style if isinstance(cell, Styled) else ""


def _printable(cell: Cell) -> Styled:
    return Styled(printable(_text(cell)), _style(cell))


def _write(line: Line, stream: TextIO) -> None:
    # Spaces at the end are nobody's.
    while line and not line[-1].text.strip(" "):
        line = line[:-1]
    painted = [_paint(text.rstrip(" ") if at == len(line) - 1 else text, style, stream) for at, (text, style) in
               enumerate(line)]  # fmt: skip
    stream.write("".join(painted) + "\n")


def _paint(text: str, style: str, stream: TextIO) -> str:
    if not style or not text or not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
