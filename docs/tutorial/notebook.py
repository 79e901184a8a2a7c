"""Markdown that asks a history as it is written: each query stands there with its answer."""

from __future__ import annotations

import re
import textwrap
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kvplane.services.history.plain import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvplane.services.history.query import Queries

WIDTH = 120
"""Characters of a line of prose."""
_SECONDS = 60.0
_ROWS = 100


class Notebook:
    """A document that grows. Its queries go through the door that a historian's go through."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        """The whole document."""
        return "\n".join(self._lines).rstrip() + "\n"

    def title(self, text: str, level: int = 2) -> None:
        """A heading."""
        self._lines += ["#" * level + " " + text, ""]

    def say(self, text: str) -> None:
        """A paragraph, of whatever lines it was written in."""
        # Code stays on its line.
        whole = re.sub("`[^`]*`", lambda code: code.group().replace(" ", "\0"), " ".join(text.split()))
        lines = textwrap.wrap(whole, WIDTH, break_long_words=False, break_on_hyphens=False)
        self._lines += [*(line.replace("\0", " ") for line in lines), ""]

    def code(self, text: str, kind: str = "") -> None:
        """A block of code."""
        self._lines += [f"```{kind}", textwrap.dedent(text).strip(), "```", ""]

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> None:
        """A table; `numbers` are the places of columns to be set flush right."""
        right = set(numbers)
        self._lines.append("| " + " | ".join(head) + " |")
        self._lines.append("|" + "|".join("---:" if place in right else "---" for place in range(len(head))) + "|")
        self._lines += ["| " + " | ".join(shown(value).replace("|", "\\|") for value in row) + " |" for row in rows]
        self._lines.append("")

    def quiet(self, sql: str) -> pa.Table:
        """A query's answer, without writing it down."""
        with self._queries.run(sql, seconds=_SECONDS, rows=_ROWS) as result:
            return pa.Table.from_batches(list(result), schema=result.schema)

    def ask(self, sql: str) -> list[dict[str, Any]]:
        """A query with its answer; the answer's rows."""
        self.code(sql, "sql")
        answer = self.quiet(textwrap.dedent(sql))
        rows: list[dict[str, Any]] = answer.to_pylist()
        numbers = [
            place for place, field in enumerate(answer.schema)
            if pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        ]  # fmt: skip
        self.table(answer.column_names, (list(row.values()) for row in rows), numbers)
        return rows


def shown(value: object) -> str:
    """A value in a table: numbers with three digits that count, times to the millisecond."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        case datetime():
            text = value.isoformat(sep=" ", timespec="milliseconds")
            return text.removesuffix(".000")
        case list():
            return ", ".join(shown(part) for part in value)
    return str(plain(value))
