"""Markdown files of the repository as GitHub reads them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """All Markdown files that are kept in the repository."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def tokens(text: str) -> Iterator[Token]:
    """All parts of a page in order, those inside of lines and table cells included."""
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> list[str]:
    """Where the links and images of a page go."""
    found = (
        token.attrGet("href") or token.attrGet("src") for token in tokens(text) if token.type in {"link_open", "image"}
    )
    return [str(each) for each in found]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    found: dict[str, int] = {}
    heading = False
    for token in tokens(text):
        if heading and token.type == "inline":
            title = "".join(child.content for child in token.children or ())
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            times = found[slug] = found.get(slug, -1) + 1
            if times:
                found[f"{slug}-{times}"] = 0
        heading = token.type == "heading_open"
    return set(found)
