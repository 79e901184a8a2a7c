"""What gateways answered, held against the log: whole or with an error that is seen, not twice, and recorded.

What may legally be: an answer that breaks off when its gateway ends; an answer whose record is missing since its gateway was
killed a moment later, or while the log was out of reach, or counted it as unrecorded.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.chaos.ledger import Entry, Ledger

ATTEMPTS = 3
SEEN = {"whole", "error", "refused", "broken", "left"}
"""What an answer may be. Anything else left its client in the dark or gave it something wrong."""
NOTICED_SECONDS = 1.0
"""So long after the end of a gateway its clients notice it."""


def judge(
    completions: Mapping[str, Sequence[str]], ledger: Ledger, excused: Callable[[float, float], bool],
    say: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Say what is wrong. `completions` are statuses on the log by request; `excused` is asked about an answer and a kill."""
    ends = _by_process(ledger.of("end"))
    allowed = _unrecorded(ledger)
    sent = {(entry["request"], entry["process"]): entry["at"] for entry in ledger.of("sent")}
    for entry in ledger.of("got"):
        request, process, outcome = entry["request"], entry["process"], entry["outcome"]
        what = f"request {request} at {process}: {outcome} ({entry['detail']})"
        if outcome not in SEEN:
            say("answers are whole or explained", what)
        if outcome == "broken" and not _ended(ends[process], sent[request, process], entry["at"] + NOTICED_SECONDS):
            say("nothing breaks off by itself", what)
        attempts = [request, *(f"{request}.{number}" for number in range(1, ATTEMPTS))]
        statuses = [status for attempt in attempts for status in completions.get(attempt, ())]
        if any(len(completions.get(attempt, ())) > 1 for attempt in attempts) or statuses.count("ok") > 1:
            say("completed once", f"{what} has {statuses}")
        if outcome != "whole" or "ok" in statuses:
            continue
        end = next((end for end in ends[process] if end["began"] >= entry["at"]), None)
        if end is not None and end["how"].startswith("killed") and excused(entry["at"], end["began"]):
            continue
        if allowed[process] > 0:
            allowed[process] -= 1
            continue
        say("answers recorded", f"{what}, and the log has {statuses or 'nothing'}")


def _by_process(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry["process"]].append(entry)
    return found


def _ended(ends: Sequence[Entry], begin: float, last: float) -> bool:
    """Whether an end of the process, from its signal to when it was gone, touches these times."""
    return any(end["began"] <= last and end["at"] >= begin for end in ends)


def _unrecorded(ledger: Ledger) -> dict[str, int]:
    """Events that each process said that it could not record."""
    process_of = {
        entry["writer"]: entry["process"] for entry in (*ledger.of("life"), *ledger.of("end")) if entry["writer"]
    }
    allowed: dict[str, int] = defaultdict(int)
    for entry in ledger.of("unrecorded"):
        allowed[process_of.get(entry["writer"], "")] += entry["events"]
    return allowed
