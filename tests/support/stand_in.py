"""What a printed command names, on the fleet that runs here: placeholders, requests, sequences, times, files."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from msgspec import Struct

from tests.support.commands import run

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

PLACEHOLDER = re.compile(r"N|[A-Z][A-Z_]+(?::[A-Z]+)?")
_TIME = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?")
_POLICY = re.compile(r"([a-z_][\w.]*):[a-z]\w*")
OWN_POLICY = '''"""A policy of one's own."""


def score(view, request, parameters):
    """Least loaded."""
    return view.active * 1.0
'''


class Ground(Struct):
    """A fleet that has served requests, and a folder to work in."""

    folder: Path
    request: str
    decided: int
    """Sequence of that request's decision."""
    first: int
    last: int
    """Sequences between which everything happened, and the times of these."""
    began: datetime
    ended: datetime

    def values(self) -> dict[str, str]:
        """What stands for placeholders."""
        return {
            "REQUEST": self.request, "SEQUENCE": str(self.last), "SEQ": str(self.last), "TIME": _written(self.began),
            "FOLDER": "folder", "FILE": "file", "MODEL": "sim", "NODE": "sim-2", "SESSION": "me", "ROLE": "client",
            "NAME": "name", "N": "1", "POLICY": "blocks", "PROMPT": "Hello", "SQL": "SELECT 1", "HOST:PORT": "127.0.0.1:9464",
            "URL": "http://127.0.0.1:8000", "MINUTES": "30",
        }  # fmt: skip

    def fit(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """A command with what is here in place of what the page names. Raises `KeyError` for an unknown placeholder."""
        fitted = [self.values()[word] if PLACEHOLDER.fullmatch(word) else word for word in words]
        if fitted[1:2] == ["explain"] and len(fitted) > 2:
            fitted[2] = self.request
        for at, word in enumerate(fitted):
            if word == "--sequence":
                fitted[at + 1] = str(self.decided)
            if (before := fitted[at - 1]) == "--at" or fitted[1] == "diff" or before == "diff":
                fitted[at] = self._spread(fitted, at) if word.isdigit() else word
        times = sorted({word for word in fitted if _TIME.fullmatch(word)})
        for at, word in enumerate(fitted):
            if word in times:
                share = times.index(word) / max(1, len(times) - 1)
                fitted[at] = _written(self.began + (self.ended - self.began) * share)
        return tuple(fitted)

    def _spread(self, words: list[str], at: int) -> str:
        """A sequence of this log for one of the page's: the smaller first, the greater last."""
        later = any(word.isdigit() and int(word) < int(words[at]) for word in words[:at])
        return str(self.last if later else self.first)

    def prepare(self, words: tuple[str, ...]) -> None:
        """Make the files that a command reads: credentials, traces, and modules with policies."""
        if words[1:3] in {("auth", "add"), ("auth", "remove"), ("auth", "list")}:
            name = words[words.index("--auth") + 1] if "--auth" in words else "kvplane-auth"
            if not (self.folder / name).exists():
                run("auth", "init", str(self.folder / name))
        for word in words:
            if word.endswith(".jsonl") and not (self.folder / word).exists() and words[1] == "simulate":
                run("workload", "multi-turn", "--requests", "300", "--out", str(self.folder / word))
        for option, word in pairwise(words):
            if option in {"--like", "--against"} and not (self.folder / word).exists():
                run("workload", "agent", "--sessions", "8", "--out", str(self.folder / word))
            policy = _POLICY.fullmatch(word)
            if policy and words[1] == "simulate":
                module = self.folder / f"{policy[1].replace('.', '/')}.py"
                module.parent.mkdir(parents=True, exist_ok=True)
                if not module.exists():
                    module.write_text(OWN_POLICY)


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").removesuffix("+00:00")
