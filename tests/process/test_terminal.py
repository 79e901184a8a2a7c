"""Nothing from outside moves a cursor."""

from __future__ import annotations

import json
import logging
import re
from typing import Literal

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.process import logs
from kvplane.services.process.terminal import json_text, paragraph, printable, show_uncaught, spreadsheet

ANY = st.text(st.characters())


@given(ANY)
def test_printable_text_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text).encode() or not text
    kept = printable(text, lines=True)
    assert kept.replace("\n", "").replace("\t", "").isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_what_is_escaped_can_be_recognized() -> None:
    assert printable("a\x1b[2Jb\n\x9b\u202e\ud800") == r"a\x1b[2Jb\n\x9b\u202e\ud800"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_stays_the_same_json(data: object) -> None:
    text = json_text(json.dumps(data, ensure_ascii=False).encode())
    assert json.loads(text) == data
    assert text.isprintable()


@given(ANY)
def test_a_spreadsheet_computes_nothing(text: str) -> None:
    cell = spreadsheet(text)
    assert cell.isprintable()
    assert cell == printable(text) or cell == f"'{printable(text)}"
    assert not re.match(r"\s*[=+\-@]", cell) or re.fullmatch(r"[+-]\d+(\.\d+)?([eE][+-]?\d+)?", cell)


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", " =1", "＝1"])  # noqa: RUF001
def test_formulas_become_text(text: str) -> None:
    assert spreadsheet(text) == f"'{text}"


def test_numbers_and_names_stay() -> None:
    assert [spreadsheet(text) for text in ("-1.5e-3", "+7", "node-a", "a=b", "")] == [
        "-1.5e-3",
        "+7",
        "node-a",
        "a=b",
        "",
    ]


@given(ANY)
def test_no_line_but_the_first_begins_at_the_edge(text: str) -> None:
    shown = paragraph(text)
    assert not [line for line in shown.split("\n")[1:] if not line.startswith("  ")]
    assert shown.replace("\n", "").replace("\t", "").isprintable()


HOSTILE = "http://x\x1b[2J\u202e\nlevel=error"


def lines_of(stderr: str) -> list[str]:
    assert all(each.isprintable() or each == "\n" for each in stderr)
    return stderr.splitlines()


@pytest.mark.parametrize("form", ["text", "json"])
def test_logs_carry_no_control_characters(form: Literal["text", "json"], capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", form)
    structlog.get_logger().warning("engine\x1b]0;evil\x07\x7f", address=HOSTILE, known=[HOSTILE])
    [line] = lines_of(capsys.readouterr().err)
    assert r"http://x\u001b[2J" in line if form == "json" else r"http://x\x1b[2J" in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_neither_do_errors_in_logs(form: Literal["text", "json"], capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", form)
    error = ValueError(HOSTILE)
    structlog.get_logger().error("failed", exc_info=error)
    # As a library logs, where nobody set up anything for it.
    about = (ValueError, error, None)
    assert logging.lastResort is not None
    logging.lastResort.handle(
        logging.LogRecord("aiohttp.server", logging.ERROR, __file__, 1, "failed on %s", (HOSTILE,), about)
    )
    lines = lines_of(capsys.readouterr().err)
    begins = [line for line in lines if not line.startswith("  ")]
    assert len(begins) == 2, lines
    assert all(json.loads(line)["exception"] for line in begins if form == "json")


def test_a_value_can_not_pass_for_another_field(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    structlog.get_logger().warning("lost", reason="silent level=info node=b", node="a")
    assert "reason='silent level=info node=b'" in capsys.readouterr().err


def test_an_error_that_nobody_caught_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError(HOSTILE)
    show_uncaught(ValueError, error, None)
    assert [line for line in lines_of(capsys.readouterr().err) if not line.startswith("  ")] == [
        r"ValueError: http://x\x1b[2J\u202e"
    ]
