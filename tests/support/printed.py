"""The commands that pages print, and whether the command line takes them as they stand."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from cyclopts import CycloptsError, MissingArgumentError
from msgspec import Struct

from kvplane.services.cli import app
from tests.support.markdown import ROOT, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHELLS = {"", "bash", "console", "sh", "shell"}
_PROGRAM = re.compile(r"(?:\.venv/bin/|\./)?[a-z][\w.-]*")
_SUBSTITUTED = re.compile(r"\$\(([^()]*)\)")
_JOINTS = {"|", "&&", "||", ";", "&", ">", ">>"}
_FILE = re.compile(r"# ([\w.-]+\.py)\n")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


class Printed(Struct, frozen=True):
    """A command on a page. `inline` is within a sentence, where it may be the name of a command only."""

    page: str
    text: str
    words: tuple[str, ...]
    inline: bool

    @property
    def form(self) -> bool:
        """Whether it shows what may be given, as `auth add ROLE [NAME]` does, or goes on in another way."""
        return self.inline and any(mark in self.text for mark in ("[", "...", "…", "|"))


def printed(page: Path, others: dict[str, str]) -> Iterator[Printed]:
    """The commands of a page in its order: of `kvplane`, and of `others`, programs by name."""
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    known = {"kvplane", *others}
    for token in tokens(page.read_text()):
        if token.type == "code_inline":
            words = _words(token.content.split(" [", 1)[0] if token.content.count("'") % 2 == 0 else "")
            if len(words) > 1 and words[0] in known:
                yield Printed(name, token.content, words, inline=True)
        elif token.type == "fence" and token.info.strip() in SHELLS:
            lines = list(_lines(token.content))
            if any(words and words[0] in known for _, words in lines):
                for text, words in lines:
                    if words and _PROGRAM.fullmatch(words[0]):
                        yield Printed(name, text, words, inline=False)
                    for inner in _within(text):
                        yield Printed(name, text, inner, inline=False)


def files(page: Path) -> dict[str, str]:
    """Python files that a page tells its reader to make: blocks that begin with the name, as a comment."""
    blocks = [
        token.content for token in tokens(page.read_text()) if token.type == "fence" and token.info.strip() == "python"
    ]
    return {found[1]: block for block in blocks if (found := _FILE.match(block))}


def _within(text: str) -> Iterator[tuple[str, ...]]:
    """Commands of kvplane further on in a line: substituted in it, or behind a pipe."""
    for inner in _SUBSTITUTED.findall(text):
        if (words := _words(inner)) and words[0] == "kvplane":
            yield words
    rest = _split(_SUBSTITUTED.sub("REQUEST", text))
    for at, word in enumerate(rest):
        if at and rest[at - 1] in _JOINTS and word == "kvplane":
            yield _words(shlex.join(rest[at:]))


def _lines(block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Whole lines of a shell and their words; one goes on while a quote is open or it ends in a backslash."""
    text = ""
    for line in block.splitlines():
        text = f"{text}\n{line}" if text else line
        if line.endswith("\\"):
            text = text.removesuffix("\\")
            continue
        try:
            shlex.split(text, comments=True)
        except ValueError:
            continue
        yield text.strip(), _words(text)
        text = ""


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return []


def _words(text: str) -> tuple[str, ...]:
    """The first command of a line; what a shell would put in place of a command in it is taken for a request's id."""
    words = _split(_SUBSTITUTED.sub("REQUEST", text.removeprefix("$ ")))
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    if words and words[0].endswith("bin/kvplane"):
        words[0] = "kvplane"
    end = next((at for at, word in enumerate(words) if word in _JOINTS), len(words))
    return tuple(words[:end])


def refused(words: tuple[str, ...], *, inline: bool) -> str:
    """Why the command line does not take a command of kvplane, or nothing. Within a sentence arguments may be left out."""
    try:
        app.parse_args(list(words[1:]), exit_on_error=False, print_error=False)
    except MissingArgumentError as error:
        return _unknown_options(words) if inline else str(error)
    except CycloptsError as error:
        return str(error)
    return ""


def _unknown_options(words: tuple[str, ...]) -> str:
    """What the first missing argument hides: options that the command does not have."""
    _, apps, _ = app.parse_commands(list(words[1:]))
    known = {name for argument in apps[-1].assemble_argument_collection() for name in argument.names}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"unknown options: {', '.join(unknown)}" if unknown else ""
