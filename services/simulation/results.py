"""What came out of a run, in figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from kvplane.events.hashing import longest_match, unpack_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvplane.services.simulation.trace import Work
    from kvplane.services.simulation.world import Outcome, Served

DIGITS = 6
"""Figures are rounded to so many decimals: enough for any use, and the same text wherever they are printed."""


class Summary(Struct, frozen=True, kw_only=True):
    """One run. TTFT is in seconds from the client's sending to the first token."""

    policy: str
    requests: int
    """Requests that were served."""
    mean: float
    p50: float
    p90: float
    p99: float
    hit_rate: float
    """Share of the prompt tokens that were found cached."""
    predicted_hit_rate: float
    """What the router expected of it."""
    ideal_share: float
    """Hit rate as a share of that of one cache without limit that everything goes to."""
    imbalance: float
    """Seconds of prefill of the busiest node, as a multiple of the mean."""
    rejected: int
    """Requests that no node may or can take."""
    retried: int
    """Requests that were sent again since their node failed."""
    decisions: int
    """How often the policy was asked."""
    policy_failures: int
    """Decisions for which the policy failed and the least loaded node was taken."""
    failure: str
    """What the last such failure was."""
    makespan: float = 0.0
    """Seconds from the first request to the last answer."""
    session: float | None = None
    """Mean time of a session in seconds, from its first request to its last answer; none without sessions."""
    moves: int = 0
    """Requests of a session that went to another node than the one before."""
    recomputed: int = 0
    """Tokens that had been computed on some node before, and were again."""
    held_twice: int = 0
    """Tokens in the caches at the end that another node holds as well."""
    within_goal: float | None = None
    """Share of all requests, also rejected ones, with a TTFT within the goal; none without a goal."""

    held: int = 0
    """Requests that were held until there was room."""
    held_seconds: float = 0.0
    """Mean time that those waited; it is in their TTFT."""
    held_longest: float = 0.0
    """The longest of them."""

    @property
    def failed(self) -> bool:
        """Whether the policy failed in every decision, so that none of these figures is its own."""
        return never_decided(self.decisions, self.policy_failures)


def never_decided(decisions: int, failures: int) -> bool:
    """Whether a policy that was asked failed each time."""
    return 0 < decisions <= failures


def ideal_hit_rate(work: Iterable[Work], block_size: int) -> float:
    """Share of the prompt tokens that one cache without limit would have had."""
    seen: set[int] = set()
    hit = total = 0
    for request in work:
        hashes = unpack_hashes(request.hashes)
        for block in hashes[: longest_match(request.tokens, block_size)]:
            if block not in seen:
                break
            hit += block_size
        seen.update(hashes)
        total += request.tokens
    return hit / total if total else 0.0


def ttft(outcome: Outcome) -> NDArray[np.float64]:
    """Times to first token in seconds, in the order of the requests' ends."""
    return np.array([served.first - served.arrival for served in outcome.served], dtype=np.float64)


class _Session(Struct):
    """One session as it went, in seconds."""

    begin: float
    end: float
    node: int
    moves: int = 0


def _sessions(served: Iterable[Served]) -> list[_Session]:
    found: dict[str, _Session] = {}
    for each in sorted(served, key=lambda each: each.arrival):
        if not each.session:
            continue
        session = found.setdefault(each.session, _Session(each.arrival, each.end, each.node))
        session.moves += each.node != session.node
        session.node, session.end = each.node, max(session.end, each.end)
    return list(found.values())


def _makespan(outcome: Outcome) -> float:
    served = outcome.served
    return max(each.end for each in served) - min(each.arrival for each in served) if served else 0.0


def summarize(outcome: Outcome, policy: str, ideal: float, goal: float | None = None) -> Summary:
    """The figures of a run; `ideal` is the trace's ideal hit rate, `goal` the wanted TTFT in seconds."""
    sessions = _sessions(outcome.served)
    everything = len(outcome.served) + outcome.rejected
    times = ttft(outcome)
    tokens = sum(served.tokens for served in outcome.served)
    hit = sum(served.cached for served in outcome.served) / max(1, tokens)
    mean, p50, p90, p99 = (
        (float(times.mean()), *map(float, np.quantile(times, [0.5, 0.9, 0.99]))) if len(times) else (0.0,) * 4
    )
    busy = sum(outcome.busy) / len(outcome.busy)

    def rounded(value: float) -> float:
        return round(value, DIGITS)

    return Summary(
        policy=policy, requests=len(times), mean=rounded(mean), p50=rounded(p50), p90=rounded(p90), p99=rounded(p99),
        hit_rate=rounded(hit),
        predicted_hit_rate=rounded(sum(served.predicted for served in outcome.served) / max(1, tokens)),
        ideal_share=rounded(hit / ideal) if ideal else 1.0, imbalance=rounded(max(outcome.busy) / busy) if busy else 1.0,
        rejected=outcome.rejected, retried=outcome.retried, decisions=outcome.decisions,
        policy_failures=outcome.policy_failures, failure=outcome.failure,
        makespan=rounded(_makespan(outcome)),
        session=rounded(sum(each.end - each.begin for each in sessions) / len(sessions)) if sessions else None,
        moves=sum(each.moves for each in sessions), recomputed=sum(each.recomputed for each in outcome.served),
        held_twice=outcome.held_twice,
        held=len(outcome.waited), held_seconds=rounded(sum(outcome.waited) / max(1, len(outcome.waited))),
        held_longest=rounded(max(outcome.waited, default=0.0)),
        within_goal=None if goal is None or not everything else rounded(float((times <= goal).sum()) / everything),
    )  # fmt: skip
