"""Links between the pages of the repository, and the sources of the site that are made of them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from docs.site.sources import DECISIONS, FRONT, SourceError, lay_out
from tests.support.markdown import ROOT, anchors, links, pages

if TYPE_CHECKING:
    from pathlib import Path


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for link in links(page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            found.append(link)
    return found


def test_links_lead_to_files_and_headings() -> None:
    assert {str(page.relative_to(ROOT)): found for page in pages() if (found := broken(page))} == {}
    assert sum(len(links(page.read_text())) for page in pages()) > 30


def test_the_rule_of_links_bites(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One *thing*: `two`, 3\n[a](gone.md) ![b](gone.svg) [c](#one-thing-two-3) [d](#four) `[e](f.md)`\n\n"
        "```\n[g](h.md)\n```\n| table |\n|---|\n| [i](page.md#five) |\n"
    )
    assert broken(page) == ["gone.md", "gone.svg", "#four", "page.md#five"]


def test_the_site_has_every_page_of_docs(tmp_path: Path) -> None:
    lay_out(ROOT, tmp_path)
    expected = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"), *(ROOT / DECISIONS).glob("*.md")]}
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.md")}
    assert expected <= there
    front = (tmp_path / "index.md").read_text()
    assert front.startswith((ROOT / FRONT).read_text()[:40])
    assert all(page in front for page in expected if not page.startswith(DECISIONS))
    assert not [str(page) for page in tmp_path.rglob("*.md") if broken(page)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of three files."""
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    (root / FRONT).write_text("# Small\n\n[limits](docs/limits.md)\n")
    (root / "docs" / "limits.md").write_text("# Limits\n\n[code](../code.py), [front](../README.md#small)\n")
    (root / "code.py").write_text("LIMIT = 3\n")
    return root


def test_what_is_no_page_is_shown_on_one(small: Path, tmp_path: Path) -> None:
    lay_out(small, tmp_path / "out")
    assert "[code](../code.py.md), [front](../index.md#small)" in (tmp_path / "out" / "docs" / "limits.md").read_text()
    assert "LIMIT = 3" in (tmp_path / "out" / "code.py.md").read_text()


def test_a_page_that_nobody_placed_and_a_link_to_nothing_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copy(small / FRONT, small / "docs" / "forgotten.md")
    with pytest.raises(SourceError, match="docs/forgotten.md: in no section of NAVIGATION"):
        lay_out(small, tmp_path / "out")
    (small / "docs" / "forgotten.md").unlink()
    (small / "code.py").unlink()
    with pytest.raises(SourceError, match="docs/limits.md links to ../code.py, which is no file"):
        lay_out(small, tmp_path / "out")
