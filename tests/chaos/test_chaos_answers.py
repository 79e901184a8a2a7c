"""What clients of gateways got is judged rightly: what is planted is found, what is legal is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvplane.services.simulation.engine_api import WORDS
from tests.chaos.answers import judge
from tests.chaos.ledger import Ledger
from tests.chaos.talk import judged

LEGAL: list[dict[str, Any]] = [
    {"outcome": "whole", "log": {"r": ["ok"]}},
    {"outcome": "whole", "log": {"r": ["failed: x"], "r.1": ["failed: y"], "r.2": ["ok"]}},
    {"outcome": "error", "log": {"r": ["failed: x"]}},
    {"outcome": "error", "log": {}},
    {"outcome": "left", "log": {"r": ["cancelled"]}},
    {"outcome": "refused", "log": {}},
    {"outcome": "broken", "log": {}, "end": ("killed", 10.5)},
    {"outcome": "broken", "log": {"r": ["cancelled"]}, "end": ("stopped", 10.9)},
    {"outcome": "whole", "log": {}, "end": ("killed", 12.0), "excused": True},
    {"outcome": "whole", "log": {}, "unrecorded": 1},
]
PLANTED: list[tuple[dict[str, Any], str]] = [
    ({"outcome": "silent", "log": {}}, "answers are whole or explained"),
    ({"outcome": "ended without a word", "log": {"r": ["ok"]}}, "answers are whole or explained"),
    ({"outcome": "other words", "log": {"r": ["ok"]}}, "answers are whole or explained"),
    ({"outcome": "broken", "log": {}}, "nothing breaks off by itself"),
    ({"outcome": "broken", "log": {}, "end": ("killed", 30.0)}, "nothing breaks off by itself"),
    ({"outcome": "whole", "log": {"r": ["ok", "ok"]}}, "completed once"),
    ({"outcome": "whole", "log": {"r": ["ok"], "r.1": ["ok"]}}, "completed once"),
    ({"outcome": "whole", "log": {}}, "answers recorded"),
    ({"outcome": "whole", "log": {"r": ["failed: x"]}}, "answers recorded"),
    ({"outcome": "whole", "log": {}, "end": ("killed", 12.0), "excused": False}, "answers recorded"),
    ({"outcome": "whole", "log": {}, "end": ("stopped", 12.0), "excused": True}, "answers recorded"),
]


def broken(
    *, outcome: str, log: dict[str, list[str]], end: Any = None, excused: bool = False, unrecorded: int = 0
) -> set[str]:
    """Rules that are broken by one request, sent at 10 s and answered at 11 s."""
    ledger = Ledger()
    ledger.note("life", process="gateway-1", writer="router-1", number=1, pid=1)
    ledger.note("sent", request="r", process="gateway-1")
    ledger.entries[-1]["at"] = 10.0
    ledger.note("got", request="r", process="gateway-1", outcome=outcome, detail="")
    ledger.entries[-1]["at"] = 11.0
    if end is not None:
        ledger.note("end", process="gateway-1", writer="router-1", how=end[0], began=end[1])
        ledger.entries[-1]["at"] = end[1] + 0.2
    if unrecorded:
        ledger.note("unrecorded", writer="router-1", events=unrecorded)
    rules: set[str] = set()
    judge(log, ledger, lambda *_: excused, lambda rule, _: rules.add(rule))
    return rules


@pytest.mark.parametrize("legal", LEGAL, ids=str)
def test_what_is_legal_is_not_found(legal: dict[str, Any]) -> None:
    assert broken(**legal) == set()


@pytest.mark.parametrize(("planted", "rule"), PLANTED, ids=str)
def test_what_is_planted_is_found(planted: dict[str, Any], rule: str) -> None:
    assert rule in broken(**planted)


def stream(*words: str, last: str = "[DONE]") -> bytes:
    events = [json.dumps({"choices": [{"text": f"{word} "}]}) for word in words]
    return b"".join(f"data: {event}\n\n".encode() for event in [*events, last])


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (stream(*WORDS[:3]), "whole"), (stream(*WORDS[:2]), "other words"), (stream(*WORDS[:3], WORDS[2]), "other words"),
        (stream(*WORDS[:2], last='{"error": {}}'), "error"), (stream(WORDS[1], last='{"error": {}}'), "other words"),
        (stream(*WORDS[:3], last='{"choices": [{"text": ""}]}'), "ended without a word"), (b"", "ended without a word"),
        (stream(*WORDS[:3]).replace(b"data: [DONE]", b'data: {"choices": []}\n\ndata: [DONE]'), "usage that nobody asked for"),
    ],
)  # fmt: skip
def test_answers_are_told_from_each_other(data: bytes, outcome: str) -> None:
    assert judged(data, 3, stream=True)[0] == outcome
