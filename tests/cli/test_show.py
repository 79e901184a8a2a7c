"""The one way of showing tables: nothing is cut, at any width, whatever the cells hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.cli import show
from kvplane.services.cli.show import Column, Styled, Table, lines
from kvplane.services.cli.words import field, words
from kvplane.services.process.terminal import printable
from tests.support.shown import left_out, on_terminal, plain

ROOT = Path(__file__).resolve().parents[2]
CELLS = (
    st.text(st.characters(codec="utf-8"), max_size=30)
    | st.just("結果は長い文字列")
    | st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    count = draw(st.integers(1, 6))
    columns = [
        Column(f"c{place}", draw(st.booleans()), draw(st.integers(0, 3)), draw(st.booleans())) for place in range(count)
    ]
    rows = draw(st.lists(st.lists(CELLS, min_size=count, max_size=count), max_size=12))
    return Table(
        columns,
        rows,
        draw(st.sampled_from(["", "a title"])),
        draw(st.sampled_from(["", "a note"])),
        draw(st.booleans()),
    )


@given(tables(), st.integers(10, 120))
def test_every_value_is_there_in_full_or_its_column_is_named(made: Table, width: int) -> None:
    text = "\n".join("".join(part.text for part in line) for line in lines(made, width))
    gone = left_out(text)
    words_shown = re.split(r"\s+", text)
    for place, column in enumerate(made.columns):
        values = [printable(str(row[place])) for row in made.rows]
        if column.name in gone:
            assert column.spare
            continue
        if made.rows:
            assert column.name in words_shown
        for value in values:
            if column.prose:
                assert all(word in words_shown for word in value.split())
            else:
                assert value.strip() in text
    assert all(part.replace("\n", "").isprintable() for part in text.splitlines())


@given(tables(), st.integers(30, 120))
def test_no_line_is_wider_than_the_terminal_but_for_one_wide_value(made: Table, width: int) -> None:
    widest = max((show.cells(printable(str(cell))) for row in made.rows for cell in row), default=0)
    for line in lines(made, width):
        wide = show.cells("".join(part.text for part in line).rstrip())
        assert wide <= max(width, widest + show.GAP + 2)


@given(tables())
def test_a_pipe_gets_every_cell_between_tabs(made: Table) -> None:
    text = plain(lambda: show.table(made.columns, made.rows, title=made.title, note=made.note))
    head, *rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    assert head == [column.name for column in made.columns]
    assert rows == [[printable(str(cell)) for cell in row] for row in made.rows]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4), st.integers(20, 80))
def test_a_sentence_keeps_its_words_and_styles_their_text(parts: list[str], width: int) -> None:
    cells = [Styled(part, "bold") if place % 2 else part for place, part in enumerate(parts)]
    text = on_terminal(width, lambda: show.say(*cells), colours=True)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert bare.split() == "".join(map(printable, parts)).split()
    assert "\x1b[1m" not in text.replace(f"\x1b[1m{bare}", "") or len(parts) > 1


def test_wide_characters_take_their_room() -> None:
    text = on_terminal(40, lambda: show.table([Column("a"), Column("b")], [["結果", "x"], ["ab", "y"]]))
    assert text.splitlines()[2:] == ["結果  x", "ab    y"]


def test_nothing_is_coloured_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        show.table([Column("a")], [[Styled("x", "red")]])

    assert "\x1b[31mx\x1b[0m" in on_terminal(40, call, colours=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_terminal(40, call, colours=False)
    assert "\x1b" not in plain(call)


def test_values_have_no_form_of_pythons() -> None:
    assert words({"a": 1234, "b": [True, None]}) == "a 1,234, b yes, none"
    assert words({}) == words([]) == words("") == "none"
    assert field({"gpu": 4096}) == "{gpu:4096}"
    assert field(["a b", 'c"', "d", ""]) == '["a b","c\\"",d,""]'
    assert field(None) == "null"


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def other_ways(source: str) -> set[str]:
    """What a source text would show tables, or print, with, beside `show`."""
    tree = ast.parse(source)
    banned = {"rich.table", "rich.columns", "rich.pretty", "rich.box", "tabulate", "pprint", "textwrap"}
    found = _imports(tree) & banned
    found |= {
        f"{ast.unparse(node.func)}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"print", "add_row"}
    }
    return found


def test_commands_show_tables_in_one_way() -> None:
    found = {}
    for path in sorted((ROOT / "services").rglob("*.py")):
        ways = other_ways(path.read_text())
        if path.name == "show.py":
            ways -= {"textwrap"}
        # Steps of the demonstration go by above its bar of progress, each a sentence beside its mark.
        if path.parent.name == "demo":
            ways -= {"self.console.print()", "rich.table", "line.add_row()"}
        if ways:
            found[str(path.relative_to(ROOT))] = ways
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "from rich.table import Table",
        "from rich import table",
        "import rich.table",
        "console.print(x)",
        "Console().print(t)",
    ],
)
def test_the_rule_of_one_way_bites(source: str) -> None:
    assert other_ways(source)


SAFE = ("json_text(", "printable(", "paragraph(", "tabs(")
"""What makes text from outside fit for a terminal."""
OWN_TEXT = {
    # CSV, whose cells went through `spreadsheet`; requests, and a key's secret, that were generated here.
    "services/cli/sql.py": {"sys.stdout.write(sink.getvalue().to_pybytes().decode())"},
    "services/cli/key.py": {"sys.stdout.write(f'{secret}\\n')"},
    "services/cli/workload.py": {"sys.stdout.buffer.write(encode(line) + b'\\n')"},
}


def raw_writes(source: str) -> set[str]:
    """What a source text writes to a standard stream without a look at it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        to, arguments = ast.unparse(node.func.value), ", ".join(map(ast.unparse, node.args))
        if (
            node.func.attr in {"write", "writelines"}
            and to.removesuffix(".buffer").endswith(("sys.stdout", "sys.stderr", "self.stream"))
            and not any(name in arguments for name in SAFE)
            and not all(isinstance(each, ast.Constant) for each in node.args)
        ):
            found.add(ast.unparse(node))
    return found


def test_nothing_is_written_raw() -> None:
    found = {}
    # Those that are run by themselves make documents from the source.
    for path in sorted(set((ROOT / "services").rglob("*.py")) - set((ROOT / "services").rglob("__main__.py"))):
        name = str(path.relative_to(ROOT))
        left = raw_writes(path.read_text()) - OWN_TEXT.get(name, set())
        if left:
            found[name] = left
    assert found == {}


@pytest.mark.parametrize(
    "source", ["sys.stderr.write(f'{error}')", "self.stream.write(line)", "sys.stdout.buffer.write(x)"]
)
def test_the_rule_of_raw_writes_bites(source: str) -> None:
    assert raw_writes(source)
    assert not raw_writes("sys.stdout.write(json_text(x))")
