"""The tutorial of the history: what is in docs is what its queries give now."""

from __future__ import annotations

from pathlib import Path

from docs.tutorial.notebook import shown
from docs.tutorial.page import make

PAGE = Path(__file__).resolve().parents[2] / "docs" / "history.md"


def test_the_tutorial_is_what_its_queries_answer() -> None:
    # Made again with: python -m docs.tutorial > docs/history.md
    made = make()
    assert made == PAGE.read_text()
    # Its data hold what it speaks of.
    for text in (
        "| lost | failed |",
        "| ttft | cordoned |",
        "| stale_epoch |",
        "| least_loaded |",
        "agrees: it is the",
    ):
        assert text in made


def test_figures_keep_three_digits() -> None:
    assert [shown(value) for value in (0.12345, 12.345, 12345.6, None, [1, 0.5], True)] == [
        "0.123", "12.3", "12346", "", "1, 0.5", "true",
    ]  # fmt: skip
