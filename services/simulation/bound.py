"""What no policy can do better than, in each figure: a bound that is proven, from the whole trace. No schedule reaches it.

Everything follows from what a simulated engine charges (`engine`, `hardware`), for any placement, order, waiting and eviction:

- *TTFT*: a request computes alone what no other request can have computed before it: blocks that neither an earlier turn of
  its session nor another session has. As each time is bounded, so are mean and quantiles. In an open loop the mean is also that
  of one node that is as fast as all together and takes the shortest rest first: with no other is less waited in all.
- *Hits*: each block that is ever used is computed once at least.
- *Makespan and time of sessions*: a session takes its pauses, and its prompts and answers on an idle node. Besides, caches and
  nodes' time are scarce: between two turns a context lies in a cache for that while, or is computed again. However that is
  chosen, the share of all caches that is in use, times a weight, and the share of nodes that work, times the rest of one, are
  one at most. So a machine that does a second of this a second, the shortest rest first, has ended at any time as many sessions
  as any fleet can. The best of several weights counts. Blocks that several sessions have are taken to cost nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from kvplane.events.hashing import longest_match, unpack_hashes
from kvplane.services.simulation.arrivals import Arrivals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvplane.services.simulation.hardware import Hardware
    from kvplane.services.simulation.trace import Work
    from kvplane.services.simulation.world import Settings

WEIGHTS = 20
"""So many weights of caches against time are tried, beside none."""
SHARED = -1


class Bound(Struct, frozen=True, kw_only=True):
    """The least that any schedule needs, in seconds, and the most that it hits, as a share of prompt tokens."""

    mean: float
    p50: float
    p90: float
    p99: float
    hit_rate: float
    makespan: float
    session: float | None
    """Mean time of a session; none without sessions."""


def least_prefill(hardware: Hardware, cached: int, tokens: int) -> float:
    """Seconds until the first token on an idle node: no schedule computes the prompt sooner."""
    new = tokens - cached
    steps = max(1, -(-new // hardware.step_tokens))
    pairs = cached * new + (new * new - steps) / 2
    first = new - (steps - 1) * hardware.step_tokens
    before = steps * cached + sum(first + step * hardware.step_tokens for step in range(steps - 1))
    work = max(steps * hardware.weight_bytes / hardware.bandwidth, 2 * hardware.parameters * new / hardware.operations)
    return (
        steps * hardware.fixed + work + hardware.attention_operations * max(0.0, pairs) / hardware.operations
        + hardware.kv_bytes * before / hardware.bandwidth
    )  # fmt: skip


def least_answer(hardware: Hardware, tokens: int, output: int) -> float:
    """Seconds from the first token to the last on an idle node."""
    return hardware.decode_steps(max(0, output - 1), 1, tokens)


def shortest_rest_first(released: Sequence[float], work: Sequence[float]) -> list[float]:
    """When each of these ends on one machine that may stop one for another, in order of ends: no machine is ahead of it."""
    order = sorted(range(len(work)), key=lambda at: released[at])
    open_: list[float] = []
    ends: list[float] = []
    now, place = 0.0, 0
    while open_ or place < len(order):
        if not open_:
            now = max(now, released[order[place]])
        while place < len(order) and released[order[place]] <= now:
            heappush(open_, work[order[place]])
            place += 1
        rest = heappop(open_)
        until = released[order[place]] if place < len(order) else math.inf
        if now + rest <= until:
            now += rest
            ends.append(now)
        else:
            heappush(open_, rest - (until - now))
            now = until
    return ends


class Needs(Struct):
    """What each request needs at least, in the order of the trace; sizes in tokens, times in seconds of one node."""

    session: list[int]
    """The number of its session; a request without one is a session of its own."""
    cached: list[int]
    """What others can have computed for it at most."""
    shared: list[int]
    """What of that several sessions have."""
    prefill: list[float]
    answer: list[float]
    hits: int
    """What all of them together can hit."""


def needs(settings: Settings, work: Sequence[Work]) -> Needs:
    """What the trace says of its requests."""
    size, hardware = settings.block_size, settings.hardware
    numbers: dict[str, int] = {}
    sessions = [numbers.setdefault(one.session or f"\0{at}", len(numbers)) for at, one in enumerate(work)]
    contexts = [unpack_hashes(one.hashes) for one in work]
    owner: dict[int, int] = {}
    uses: Counter[int] = Counter()
    findable: Counter[int] = Counter()
    for session, context, request in zip(sessions, contexts, work, strict=True):
        for block in context:
            if owner.setdefault(block, session) != session:
                owner[block] = SHARED
        uses.update(set(context))
        findable.update(set(context[: longest_match(request.tokens, size)]))
    found = Needs(sessions, [], [], [], [], size * sum(n - (n == uses[block]) for block, n in findable.items()))
    seen: set[int] = set()
    for context, request in zip(contexts, work, strict=True):
        cached = shared = 0
        for block in context[: longest_match(request.tokens, size)]:
            if owner[block] != SHARED and block not in seen:
                break
            cached += size
            shared += size * (owner[block] == SHARED)
        seen.update(context)
        found.cached.append(cached)
        found.shared.append(shared)
        found.prefill.append(least_prefill(hardware, cached, request.tokens))
        found.answer.append(least_answer(hardware, request.tokens, request.output_tokens))
    return found


def earliest(settings: Settings, work: Sequence[Work], need: Needs) -> tuple[list[float], list[float]]:
    """When each request comes and ends if nobody ever waits for another."""
    arrivals = Arrivals(work, ready=settings.delay, speedup=settings.speedup)
    begins, ends = [0.0] * len(work), [0.0] * len(work)
    under_way: list[tuple[float, int]] = []
    while under_way or arrivals.next < math.inf:
        if under_way and under_way[0][0] <= arrivals.next:
            end, number = heappop(under_way)
            ends[number] = end
            arrivals.answered(str(number), end)
        else:
            begin, number = arrivals.take()
            arrivals.sent(number, str(number))
            begins[number] = begin
            heappush(under_way, (begin + need.prefill[number] + need.answer[number], number))
    return begins, ends


class _Scarce(Struct):
    """What each request takes of all nodes' time and caches: seconds of a fleet that has nothing else."""

    time: NDArray[np.float64]
    memory: NDArray[np.float64]
    again: NDArray[np.float64]
    """Time to compute its session's context again."""
    kept: NDArray[np.float64]
    """Memory to keep that context since the turn before."""

    def work(self, weight: float) -> NDArray[np.float64]:
        """What it takes of both, so much of it counting for memory; the context is kept or not, whatever is less."""
        return (
            weight * self.memory + (1 - weight) * self.time + np.minimum(weight * self.kept, (1 - weight) * self.again)
        )


def _scarce(settings: Settings, work: Sequence[Work], need: Needs) -> _Scarce:
    hardware, size = settings.hardware, settings.block_size
    token = 2 * hardware.parameters / hardware.operations
    pair = hardware.attention_operations / hardware.operations
    read = hardware.kv_bytes / hardware.bandwidth
    rows = []
    for at, request in enumerate(work):
        cached, shared = need.cached[at], need.shared[at]
        new, own, answer = request.tokens - cached, cached - shared, max(0, request.output_tokens - 1)
        time = (
            token * new + pair * (cached * new + new * new / 2 - new)
            + answer * (token + hardware.per_request + read * (request.tokens + answer / 2))
        )  # fmt: skip
        memory = (request.tokens - shared) // size * (need.prefill[at] + need.answer[at])
        rows.append(
            (time, memory, token * own + pair * (shared * own + own * own / 2), own // size * (request.delay or 0.0))
        )
    time_, memory_, again, kept = np.array(rows, dtype=np.float64).T
    caches = settings.nodes * settings.capacity
    return _Scarce(time_ / settings.nodes, memory_ / caches, again / settings.nodes, kept / caches)


def bound(settings: Settings, work: Sequence[Work]) -> Bound:
    """The bound of a fleet whose nodes are all there from the beginning, for requests that are all served."""
    work = sorted(work, key=lambda request: request.arrival)
    need = needs(settings, work)
    times = np.array(need.prefill)
    tokens = sum(request.tokens for request in work)
    begins, ends = earliest(settings, work, need)
    scarce = _scarce(settings, work, need)
    mean = float(times.mean())
    if all(request.delay is None for request in work):
        # Who waits for nobody's answer comes when the trace says it.
        new = [request.tokens - cached for request, cached in zip(work, need.cached, strict=True)]
        token = 2 * settings.hardware.parameters / settings.hardware.operations / settings.nodes
        done = shortest_rest_first(begins, [token * count for count in new])
        mean = max(mean, (sum(done) - sum(begins)) / len(work))
    count = max(need.session) + 1
    first, last = np.full(count, math.inf), np.zeros(count)
    np.minimum.at(first, need.session, begins)
    np.maximum.at(last, need.session, ends)
    # When a sub-agent begins depends on the schedule.
    alone = np.ones(count, dtype=bool)
    alone[[need.session[at] for at, request in enumerate(work) if request.parent]] = False
    makespan, whole = float(last.max()), float(last[alone].sum())
    for weight in np.linspace(0, 1, WEIGHTS + 1):
        each = np.bincount(need.session, scarce.work(float(weight)), minlength=count)
        makespan = max(makespan, shortest_rest_first(first.tolist(), each.tolist())[-1])
        done = shortest_rest_first(first[alone].tolist(), each[alone].tolist())
        whole = max(whole, float(np.maximum(done, np.sort(last[alone])).sum()))
    session = (whole - first[alone].sum() + (last - first)[~alone].sum()) / count
    p50, p90, p99 = map(float, np.quantile(times, [0.5, 0.9, 0.99]))
    return Bound(
        mean=mean, p50=p50, p90=p90, p99=p99, hit_rate=need.hits / max(1, tokens), makespan=makespan - min(begins),
        session=float(session) if all(request.session for request in work) else None,
    )  # fmt: skip
