"""Nothing from outside moves a cursor."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import structlog
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.process import logs
from kvplane.services.process.terminal import json_text, printable

if TYPE_CHECKING:
    import pytest

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
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_logs_for_people_carry_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    structlog.get_logger().warning("engine\x1b]0;evil\x07", address="http://x\x1b[2J")
    stderr = capsys.readouterr().err
    assert r"http://x\x1b[2J" in stderr
    assert "\x1b" not in stderr
