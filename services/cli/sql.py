"""The command `sql`."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from cyclopts import Parameter

from kvplane.events.errors import KvplaneError
from kvplane.projections.history.tables import ADDED, HASHES, TABLES
from kvplane.projections.history.views import VIEWS
from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.show import Column, Styled
from kvplane.services.cli.words import hexadecimal
from kvplane.services.history.client import pages
from kvplane.services.history.plain import exact, plain
from kvplane.services.history.values import far, holds, rows_of, values
from kvplane.services.process.terminal import json_text, paragraph, spreadsheet
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nats.aio.client import Client

SHOWN_ROWS = 200
"""Rows that a table on the terminal has at the most."""
SHOWN_PARTS = 16
"""Most elements of a list in such a table; it says how many more there are."""
_ODD_TEXT = r"^\s*[=+\-@]|[^ -~]"
"""What CSV may not have as it is."""

HELP = """\
A query may take several lines and ends with a semicolon. Tab completes names.
  .tables           tables and views, and what they are
  .columns NAME     columns of one of them, and what they mean
  .help             this
  .quit             leave; also exit, quit and Ctrl-D"""


def sql(
    query: str | None = None,
    *,
    json: Json = False,
    csv: Annotated[bool, Parameter(negative="")] = False,
    parquet: Path | None = None,
    arrow: Path | None = None,
    timeout: float | None = None,
    max_rows: int | None = None,
    common: Common = COMMON,
) -> None:
    """Ask the history in SQL (DuckDB's), read only. Without a query, a prompt.

    `kvplane sql 'SHOW TABLES'` lists what there is, `kvplane sql 'DESCRIBE decisions'` the columns of one.

    Parameters
    ----------
    query
        The query; - reads it from standard input.
    json
        Print one JSON object a row. Integers beyond 2^53, such as block hashes, are strings.
    csv
        Print CSV for spreadsheets: text that they would compute has an apostrophe before it, control characters are
        escaped. The other forms are exact.
    parquet
        Write the result to this file, as Parquet.
    arrow
        Write the result to this file, as Arrow IPC.
    timeout
        Seconds that it may take; the historian has a limit of its own.
    max_rows
        Rows that it may give; the historian has a limit of its own.
    """
    start(common, quiet=True)
    if sum([json, csv, parquet is not None, arrow is not None]) > 1:
        raise BadRequest("choose one of --json, --csv, --parquet and --arrow")
    for value, option in ((timeout, "timeout"), (max_rows, "max-rows")):
        if value is not None and value <= 0:
            raise BadRequest(f"--{option} is {value:g}; it must be more than 0")
    if query == "-":
        query = sys.stdin.read()
    writer = choose(json=json, csv=csv, parquet=parquet, arrow=arrow)
    if query is None:
        run_async(_prompt, writer, timeout, max_rows, common)
    else:
        run_async(_once, query, writer, timeout, max_rows, common)


Writer = "Callable[[pa.Schema], Iterator[Any]]"


def choose(*, json: bool, csv: bool, parquet: Path | None, arrow: Path | None) -> Callable[[pa.Schema], Any]:
    """What becomes of a result: a context manager that takes tables of its schema."""
    if json:
        return _as_json
    if csv:
        return lambda schema: _in_words(schema, _as_csv)
    if parquet is not None:
        return lambda schema: _in_words(schema, partial(_as_parquet, parquet))
    if arrow is not None:
        return lambda schema: _file(arrow, lambda path: pa.ipc.new_file(path, schema))
    return _as_table if show.on_terminal() else _as_tabs


async def _once(
    query: str, writer: Callable[[pa.Schema], Any], seconds: float | None, rows: int | None, common: Common
) -> None:  # fmt: skip
    async with common.connected("kvplane-sql", seconds=CONNECT_SECONDS) as client:
        await _run(client, common.fleet, query, writer, seconds, rows)


async def _run(
    client: Client, fleet: str, query: str, writer: Callable[[pa.Schema], Any], seconds: float | None, rows: int | None
) -> None:  # fmt: skip
    result = pages(client, fleet, query, seconds=seconds, rows=rows)
    try:
        first = await anext(result)
        with writer(first.schema) as take:
            more = take(first)
            async for page in result:
                if more is False:
                    break
                more = take(page)
    finally:
        await result.aclose()  # type: ignore[attr-defined]


@contextmanager
def _as_json(schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    _check_names(schema, "JSON")

    def take(page: pa.Table) -> None:
        for row in rows_of(page):
            named = {key: exact(value) for key, value in zip(schema.names, row, strict=True)}
            sys.stdout.write(json_text(msgspec.json.encode(named)) + "\n")

    yield take
    sys.stdout.flush()


def _check_names(schema: pa.Schema, form: str) -> None:
    """Raise `BadRequest` for two columns of one name, of which one would be lost."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise BadRequest(f"two columns are called {twice[0]!r}, and {form} has one of a name: name them with AS")


@contextmanager
def _as_csv(schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    names = [spreadsheet(field.name) for field in schema]
    header = True

    def take(page: pa.Table) -> None:
        nonlocal header
        flat = pa.table([_csv_column(column) for column in page.columns], names=names)
        options = pa.csv.WriteOptions(include_header=header)
        header = False
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(flat, sink, options)
        sys.stdout.write(sink.getvalue().to_pybytes().decode())

    yield take
    sys.stdout.flush()


def _csv_column(column: Any) -> Any:  # noqa: ANN401 - an array of pyarrow's
    """A column as CSV has it: a row stays one line, what is nested is JSON, and nothing is a formula."""
    kind = column.type
    if pa.types.is_nested(kind):
        return pa.array(
            [None if value is None else json_text(msgspec.json.encode(exact(value))) for value in values(column)],
            pa.string(),
        )
    if pa.types.is_binary(kind):
        return pa.array([None if value is None else value.hex() for value in column.to_pylist()], pa.string())
    if far(column):
        return pa.array([None if value is None else str(value) for value in values(column)], pa.string())
    if pa.types.is_dictionary(kind):
        column = column.cast(pa.string())
    elif not pa.types.is_string(kind):
        return column
    # Most columns have nothing of it, and the search is many times faster than Python.
    if not pa.compute.any(pa.compute.match_substring_regex(column, _ODD_TEXT)).as_py():
        return column
    return pa.array([None if value is None else spreadsheet(value) for value in column.to_pylist()], pa.string())


@contextmanager
def _in_words(
    schema: pa.Schema, writer: Callable[[pa.Schema], Any]
) -> Iterator[Callable[[pa.Table], None]]:  # fmt: skip
    """For a writer that has no intervals: they are text."""
    places = [place for place, field in enumerate(schema) if field.type == pa.month_day_nano_interval()]
    for place in places:
        schema = schema.set(place, pa.field(schema.field(place).name, pa.string()))
    with writer(schema) as take:

        def words(page: pa.Table) -> None:
            for place in places:
                column = pa.array([plain(value) for value in page.column(place).to_pylist()], pa.string())
                page = page.set_column(place, schema.field(place), column)
            take(page)

        yield words


@contextmanager
def _as_parquet(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """What Parquet has no form for is refused."""
    _check_names(schema, "Parquet")
    for field in schema:
        for test, what in ((pa.types.is_union, "a UNION"), (pa.types.is_interval, "INTERVAL inside another type")):
            if holds(field.type, test):
                raise BadRequest(f"column {field.name!r} holds {what}, which Parquet has not: {_cast(field.name)}")

    with _file(path, lambda unfinished: pa.parquet.ParquetWriter(unfinished, schema)) as take:

        def checked(page: pa.Table) -> None:
            try:
                take(page)
            except pa.ArrowInvalid as error:
                names = [field.name for place, field in enumerate(schema) if far(page.column(place))]
                raise BadRequest(f"Parquet can't hold {error}: {_cast(*names or ['it'])}") from None

        yield checked


def _cast(*names: str) -> str:
    return f"give {', '.join(f'{name}::VARCHAR' for name in names)} instead"


@contextmanager
def _file(path: Path, create: Callable[[str], Any]) -> Iterator[Callable[[pa.Table], None]]:
    """A file that is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    rows = 0

    def take(page: pa.Table) -> None:
        nonlocal rows
        rows += page.num_rows
        writer.write_table(page)

    try:
        writer = create(str(unfinished))
        try:
            yield take
        finally:
            writer.close()
        unfinished.rename(path)
    except OSError as error:
        raise BadRequest(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    show.say(f"{rows:,} rows in {path}", error=True)


@contextmanager
def _as_tabs(schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Every row and every value whole, for a pipe. What is null is empty."""
    sys.stdout.write(show.tabs(field.name for field in schema) + "\n")

    def take(page: pa.Table) -> None:
        for row in _values(page):
            sys.stdout.write(show.tabs("" if value is None else text(value) for value in row) + "\n")

    yield take
    sys.stdout.flush()


@contextmanager
def _as_table(schema: pa.Schema) -> Iterator[Callable[[pa.Table], bool]]:
    rows: list[list[str]] = []
    cut = False

    def take(page: pa.Table) -> bool:
        nonlocal cut
        cut = page.num_rows > SHOWN_ROWS - len(rows)
        rows.extend(
            [text(value, most=SHOWN_PARTS) for value in row] for row in _values(page.slice(0, SHOWN_ROWS - len(rows)))
        )
        return not cut

    yield take
    columns = [
        Column(field.name, number=_is_number(field.type) and field.name not in HASHES, spare=place)
        for place, field in enumerate(schema)
    ]
    if columns:
        hint = "Fewer columns or rows, --json, --csv, a wider terminal or a pipe (| less -S) show them"
        show.table(columns, rows, whole=True, elsewhere=hint)
    else:
        show.say("no columns")
    if cut:
        show.say(f"the first {SHOWN_ROWS} rows; a pipe, --csv, --json, --parquet and --arrow give all", error=True)
    if not rows:
        show.say("no rows", error=True)


def _is_number(kind: pa.DataType) -> bool:
    found: bool = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return found


def _values(page: pa.Table) -> Iterator[list[Any]]:
    """Rows, with block hashes in hex."""
    hashed = [
        field.name in HASHES and getattr(field.type, "value_type", field.type) == pa.uint64() for field in page.schema
    ]  # fmt: skip
    for row in rows_of(page):
        yield [hexadecimal(value) if is_hash else value for value, is_hash in zip(row, hashed, strict=True)]


def text(value: Any, *, most: int = sys.maxsize) -> str:  # noqa: ANN401 - any value of a result
    """A value of a result, in full; of a list at the most so many elements, and how many more there are."""
    data = plain(value)
    match data:
        case None:
            return "-" if value is None else str(value)
        case bool():
            return "true" if data else "false"
        case str():
            return data
        case list():
            more = f" and {len(data) - most:,} more" if len(data) > most else ""
            return ", ".join(_part(part) for part in data[:most]) + more or "[]"
    return _part(data)


def _part(value: Any) -> str:  # noqa: ANN401 - any part of a value
    """A value inside another."""
    match value:
        case None:
            return "-"
        case str():
            return value
        case dict():
            return " ".join(f"{key}={_part(part)}" for key, part in value.items())
        case list():
            return "[" + ", ".join(map(_part, value)) + "]"
        case _:
            return msgspec.json.encode(value).decode()


def state_folder() -> Path:
    """Where the prompt keeps what was typed: XDG's folder for state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvplane"


async def _prompt(
    writer: Callable[[pa.Schema], Any], seconds: float | None, rows: int | None, common: Common
) -> None:  # fmt: skip
    # Only the prompt needs it, and it is slow to load.
    from prompt_toolkit import PromptSession  # noqa: PLC0415
    from prompt_toolkit.completion import WordCompleter  # noqa: PLC0415
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415

    folder = state_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        typed: Any = FileHistory(str(folder / "sql"))
    except OSError:
        typed = InMemoryHistory()
    words = [entry.name for entry in (*TABLES, *ADDED, *VIEWS)]
    words += sorted(
        {name for entry in VIEWS for name, _ in entry.columns} | {c.name for t in (*TABLES, *ADDED) for c in t.columns}
    )
    words += [
        "SELECT",
        "FROM",
        "WHERE",
        "GROUP BY",
        "ORDER BY",
        "LIMIT",
        "count(*)",
        ".tables",
        ".columns",
        ".help",
        ".quit",
    ]
    async with common.connected("kvplane-sql", seconds=CONNECT_SECONDS) as client:
        session: PromptSession[str] = PromptSession(history=typed, completer=WordCompleter(words, ignore_case=True))
        show.say(f"history of fleet {common.fleet!r}; .help helps")
        waiting = ""
        while True:
            try:
                line = await session.prompt_async("   ...> " if waiting else "kvplane> ")
            except KeyboardInterrupt:
                waiting = ""
                continue
            except EOFError:
                return
            if not waiting and leaves(line):
                return
            if not waiting and line.strip().startswith("."):
                command(line.strip())
                continue
            waiting = f"{waiting}\n{line}".strip()
            if not waiting.endswith(";"):
                continue
            query, waiting = waiting, ""
            try:
                await _run(client, common.fleet, query, writer, seconds, rows)
            except KvplaneError as error:
                for part in paragraph(str(error)).split("\n"):
                    show.say(Styled(part, "red"))


def leaves(line: str) -> bool:
    """Whether a line at the beginning of a query means the end."""
    return line.strip().rstrip(";").rstrip().lower() in {"exit", "quit", ".exit", ".quit"}


def command(line: str) -> None:
    """A command of the prompt, which begins with a dot."""
    known = {entry.name: entry for entry in (*TABLES, *VIEWS, *ADDED)}
    name, _, about = line.partition(" ")
    if name == ".tables":
        show.pairs([(entry.name, entry.meaning) for entry in known.values()])
    elif name == ".columns" and about.strip() in known:
        show.pairs(meanings(about.strip()))
    else:
        for part in HELP.splitlines():
            show.say(part)


def meanings(name: str) -> list[tuple[str, str]]:
    """Columns of a table or view, and what they mean."""
    for table in (*TABLES, *ADDED):
        if table.name == name:
            return [(column.name, column.meaning) for column in table.columns]
    return [pair for view in VIEWS if view.name == name for pair in view.columns]
