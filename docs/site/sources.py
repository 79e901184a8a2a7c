"""The pages of the site: which they are, in what order, and their sources for Sphinx.

Pages keep the paths that they have in the repository, so their links to each other stay as they are. What is not a page and
is linked all the same, such as a module, becomes a page that shows it: the site needs no address of a repository.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]
FRONT = "README.md"
DECISIONS = "docs/decisions"
DECISIONS_PAGE = f"{DECISIONS}/index.md"
"""Made here: the list of them."""


class SourceError(Exception):
    """A page or link that can't be on the site; the message says what to do."""


class Section(Struct, frozen=True):
    """A heading of the navigation: its pages by their titles there. Pages that do not exist yet are left out."""

    title: str
    pages: dict[str, str]


NAVIGATION = (
    Section("Start", {
        "Overview": FRONT,
        "Ask the history": "docs/history.md",
        "Attach engines": "docs/engines.md",
        "The gateway": "docs/gateway.md",
    }),
    Section("How it works", {
        "Architecture": "docs/architecture.md",
        "Policies, measured": "docs/policies.md",
        "Policies of your own": "docs/policies-of-your-own.md",
        "What survives what": "docs/reliability.md",
    }),
    Section("Operate", {
        "Three servers": "compose/README.md",
        "Credentials": "docs/security.md",
        "Metrics and health": "docs/metrics.md",
        "Limits": "docs/limits.md",
    }),
    Section("Reference", {
        "Subjects": "docs/subjects.md",
        "Simulated hardware": "docs/hardware.md",
        "Traces and workloads": "docs/traces.md",
        "Environment variables": "docs/environment.md",
        "Benchmarks": "docs/benchmarks.md",
        "Changelog": "CHANGELOG.md",
        "Contributing": "CONTRIBUTING.md",
    }),
    Section("Decisions", {"All decisions": DECISIONS_PAGE}),
)  # fmt: skip

_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
_LEXERS = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".sh": "bash"}
_ABOUT_DECISIONS = """Each says what was decided, against what, and what it costs. A later one may correct an earlier one, and
says so."""
_IMAGES = {".svg", ".png"}


def lay_out(root: Path, out: Path) -> None:
    """Write the sources of all pages into `out`, which is emptied first. Raises `SourceError`."""
    shutil.rmtree(out, ignore_errors=True)
    decisions = sorted(str(path.relative_to(root)) for path in (root / DECISIONS).glob("[0-9]*.md"))
    placed = [page for section in NAVIGATION for page in section.pages.values()]
    forgotten = [name for path in sorted((root / "docs").glob("*.md")) if (name := f"docs/{path.name}") not in placed]
    if forgotten:
        raise SourceError(f"{', '.join(forgotten)}: in no section of NAVIGATION in docs/site/sources.py; add it there")
    for page in [*placed, *decisions]:
        if (root / page).is_file():
            text = _with_links(root, out, root / page)
            _write(out / _on_site(page), text + (_navigation(root) if page == FRONT else ""))
    contents = _contents([Path(page).name for page in decisions], ":maxdepth: 1\n")
    _write(out / DECISIONS_PAGE, f"# Decisions\n\n{_ABOUT_DECISIONS}\n{contents}")


def _on_site(page: str) -> str:
    return "index.md" if page == FRONT else page


def _with_links(root: Path, out: Path, page: Path) -> str:
    """The text of a page, with links that work on the site; what it links to is written where it is no page."""

    def linked(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        path = (page.parent / target).resolve()
        path = path / "README.md" if path.is_dir() else path
        if not path.is_file() or not path.is_relative_to(root):
            raise SourceError(f"{page.relative_to(root)} links to {target}, which is no file of the repository")
        name = str(path.relative_to(root))
        if path.suffix == ".md":
            return before + target.removesuffix(name) + _on_site(name) + after if name == FRONT else match.group()
        if path.suffix in _IMAGES:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / name)
            return match.group()
        _write(out / f"{name}.md", _shown(name, path.read_text()))
        return f"{before}{target}.md{after}"

    text, pieces, at = page.read_text(), [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_LINK.sub(linked, text[at : fence.start()]), fence.group()]
        at = fence.end()
    return "".join([*pieces, _LINK.sub(linked, text[at:])])


def _shown(name: str, text: str) -> str:
    """A page that shows a file."""
    return f"---\norphan: true\n---\n\n# {name}\n\n``````{_LEXERS.get(Path(name).suffix, 'text')}\n{text}\n``````\n"


def _navigation(root: Path) -> str:
    parts = []
    for section in NAVIGATION:
        there = {
            title: page for title, page in section.pages.items() if (root / page).is_file() or page == DECISIONS_PAGE
        }
        entries = [f"{title} <{'self' if page == FRONT else page}>" for title, page in there.items()]
        parts.append(_contents(entries, f":caption: {section.title}\n:hidden:\n"))
    return "".join(parts)


def _contents(entries: list[str], options: str) -> str:
    lines = "".join(f"{entry}\n" for entry in entries)
    return f"\n```{{toctree}}\n{options}\n{lines}```\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
