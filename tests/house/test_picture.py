"""The picture of the demonstration: what it shows is what the demonstration prints today, but for the figures."""

from __future__ import annotations

import ast
import re
from xml.etree import ElementTree as ET

import pytest

from docs.site.picture import LEFT_OUT, STEPS, picture
from kvplane.services.demo.run import Result, StepResult
from tests.support.markdown import ROOT

PICTURE = (ROOT / "docs" / "demo.svg").read_text()
SVG = "{http://www.w3.org/2000/svg}"
CHARACTER = 12.2
"""Width of a column, in the units of the picture."""
MODULES = sorted((ROOT / "services" / "demo").glob("*.py"))


def lines(svg: str) -> list[str]:
    """The lines of text in a picture, as on the terminal that it shows."""
    rows: dict[float, str] = {}
    texts = [text for group in ET.fromstring(svg).iter(f"{SVG}g") for text in group.findall(f"{SVG}text")]
    for text in texts:
        shown = (text.text or "").replace("\N{NO-BREAK SPACE}", " ").rstrip("\n")
        y, column = float(text.get("y", "0")), round(float(text.get("x", "0")) / CHARACTER)
        rows[y] = rows.get(y, "").ljust(column) + shown
    return [row.rstrip() for _, row in sorted(rows.items())]


def steps(svg: str) -> dict[str, str]:
    """What a picture shows: the sentence of each step, on one line again."""
    joined: list[str] = []
    for line in lines(svg)[1:-1]:
        if line.startswith(" ") and line != LEFT_OUT:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    sentences = [line.split(maxsplit=1)[1] for line in joined if line != LEFT_OUT]
    found = {}
    for name in STEPS:
        [found[name]] = [line.removeprefix(f"{name}: ") for line in sentences if line.startswith(f"{name}: ")]
    assert len(found) == len(sentences)
    return found


def templates() -> tuple[set[str], list[re.Pattern[str]]]:
    """The texts in the demonstration's source: whole ones, and patterns of those with figures in them."""
    whole, patterns = set(), []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                whole.add(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if sum(len(str(part)) for part in parts if part is not None) > 10:
                    patterns.append(
                        re.compile("".join(".+" if part is None else re.escape(str(part)) for part in parts))
                    )
    return whole, patterns


def test_the_picture_shows_what_is_printed_today() -> None:
    whole, patterns = templates()
    shown = steps(PICTURE)
    assert set(shown) <= whole, "a step has another name now: make the picture again, see CONTRIBUTING.md"
    old = [sentence for sentence in shown.values() if not any(pattern.fullmatch(sentence) for pattern in patterns)]
    assert old == [], "make the picture again, see CONTRIBUTING.md"
    assert (lines(PICTURE)[0], lines(PICTURE)[-1]) == ("$ kvplane demo", "every step held")


def test_the_picture_needs_nothing_from_elsewhere_and_names_no_machine() -> None:
    assert len(PICTURE) < 20_000
    assert "font-face" not in PICTURE
    assert re.findall(r"https?://[^\"']*|url\([^#][^)]*\)", PICTURE) == ["http://www.w3.org/2000/svg"]
    assert [line for line in lines(PICTURE) if "/" in line] == []


@pytest.mark.parametrize("colour", [True, False])
def test_a_picture_is_read_back_as_it_was_said(monkeypatch: pytest.MonkeyPatch, colour: bool) -> None:
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    sentences = {name: f"{name} did [what] it should & <more>, " + "and at length " * 9 + "for 12 s" for name in STEPS}
    result = Result(steps=[StepResult("start", held=True, message="logs in /tmp/x")])
    result.steps += [StepResult(name, held=True, message=text) for name, text in sentences.items()]
    made = picture(result)
    assert steps(made) == sentences
    assert "/tmp" not in made
    assert max(len(line) for line in lines(made)) <= 98
