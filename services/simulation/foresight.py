"""A good schedule by one who knows the whole trace: the optimum is between it and `bound`. It is not the optimum itself.

It knows of each session how its context grows, how long it pauses and when it is over, and uses that in four ways:

- *Placement*: a session goes, whole, where its first answer and all waiting that it causes and meets later are least, with
  those who live there, for as long as both do. It moves when a queue costs more than its context does.
- *Waiting*: who comes to a node while a long prompt is computed there is known, and counted.
- *Eviction*: furthest next use first (Belady), the end of a context before its beginning; what is never used again before all.
- *Holding*: with `share`, a session begins only where its context fits, for all of its life, into that share of a cache beside
  the lives of those who are there. Who would be the last to end goes first, then the smallest.

Engines are those of a simulation: first come, first served on a node. There is no network. Its times are those of idle nodes,
so it errs where nodes are busy. `best` tries several shares and keeps the best by mean TTFT.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from kvplane.events.hashing import longest_match, unpack_hashes
from kvplane.services.simulation.arrivals import Arrivals
from kvplane.services.simulation.blockcache import BlockCache
from kvplane.services.simulation.bound import least_prefill, needs
from kvplane.services.simulation.engine import Engine, Job
from kvplane.services.simulation.world import Outcome, Served

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvplane.services.simulation.trace import Work
    from kvplane.services.simulation.world import Settings

NAME = "foresight"
STEP_SECONDS = 60.0
"""What is known of a session's life is looked at in steps so long."""
PUSHED_OUT = 3.0
"""How often a block that is pushed out counts: it is computed again, and others wait meanwhile."""
LOOKED_AT = 4
"""So many nodes, those with the first answer soonest, are looked at closely when a session might move."""
MISSES = 8
"""When so many who are held fit nowhere, the larger ones behind them are not tried."""
SHARES: tuple[float | None, ...] = (0.9, 1.0)
"""Shares of a cache that lives may fill at once; without one, nobody is held."""


class Life(Struct):
    """What is known of a session; of each request its number, time if nobody waits, context in blocks and least prefill."""

    numbers: list[int] = []
    comes: list[float] = []
    blocks: list[int] = []
    prefill: list[float] = []
    end: float = 0.0
    held: bool = True
    """Whether it may be held: sub-agents may not."""
    at: int = 0
    """Its next request, or the one under way."""
    node: int = -1
    due: float = 0.0
    """When its next request comes; in the past while one is under way."""
    size: NDArray[np.float64] = np.zeros(0)
    """Its context in each step of its life."""
    peak: float = 0.0
    """Its largest context."""
    waits: list[float] = []
    """Half of the squared prefill from each request on: what others wait for it, if they come at any time."""

    def known(self) -> None:
        """Work out what follows from the requests."""
        self.size = np.zeros(int(self.end // STEP_SECONDS) + 1)
        for place, begin in enumerate(self.comes):
            until = self.comes[place + 1] if place + 1 < len(self.comes) else self.end
            steps = slice(int(begin // STEP_SECONDS), int(until // STEP_SECONDS) + 1)
            self.size[steps] = np.maximum(self.size[steps], self.blocks[place])
        self.peak = float(self.size.max())
        self.waits = np.cumsum([own * own / 2 for own in reversed(self.prefill)])[::-1].tolist()

    @property
    def left(self) -> float:
        """Seconds that it has to live if nobody waits."""
        return max(1.0, self.end - self.comes[self.at])

    @property
    def future(self) -> NDArray[np.float64]:
        """Its context from now on."""
        return self.size[int(self.comes[self.at] // STEP_SECONDS) :]


class Foreseeing(BlockCache):
    """A cache that evicts what is used again last."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[int, tuple[float, tuple[int, ...]]] = {}
        """Of each session: when its context is used next, and the blocks of it that nobody else has."""
        self._order: list[tuple[float, int]] = []
        self._gone = 0

    def expect(self, session: int, due: float, blocks: tuple[int, ...]) -> None:
        """Blocks of a session are used again at a time, or never (infinity)."""
        key = session
        if due == math.inf:
            # It never changes, and the session may be back.
            self._gone -= 1
            key = self._gone
        self._uses[key] = due, blocks
        heappush(self._order, (-due, key))

    def never(self, session: int) -> None:
        """A session that went elsewhere uses nothing here again."""
        if session in self._uses:
            self.expect(session, math.inf, self._uses.pop(session)[1])

    def _evict(self, count: int) -> tuple[int, ...]:
        evicted: list[int] = []
        while len(evicted) < count and self._order:
            due, key = self._order[0]
            found = self._uses.get(key)
            blocks = list(found[1]) if found is not None and found[0] == -due else []
            while blocks and len(evicted) < count:
                block = blocks.pop()
                if block in self._idle:
                    del self._idle[block], self.blocks[block]
                    evicted.append(block)
            if blocks:
                self._uses[key] = -due, tuple(blocks)
            else:
                heappop(self._order)
        return (*evicted, *super()._evict(count - len(evicted)))


class Schedule:
    """One run. `share` is how full lives may make a cache when sessions are held."""

    def __init__(self, settings: Settings, work: Sequence[Work], share: float | None = None) -> None:
        self._settings = settings
        self._share = share
        self._work = sorted(work, key=lambda request: request.arrival)
        self._contexts = [unpack_hashes(request.hashes) for request in self._work]
        self._engines: list[Engine] = []
        for _ in range(settings.nodes):
            engine = Engine(settings.hardware, settings.capacity, settings.block_size)
            engine.cache = Foreseeing(settings.capacity)
            self._engines.append(engine)
        self._due: list[tuple[float, int]] = []
        self._arrivals = Arrivals(self._work, ready=settings.delay, speedup=settings.speedup)
        self._residents: list[set[int]] = [set() for _ in self._engines]
        self._held: list[tuple[int, float]] = []
        """Requests whose session was not begun, with the time when they came."""
        self._served: list[Served] = []
        self._rejected = 0
        self._seen: set[int] = set()
        need = needs(settings, self._work)
        self._session = need.session
        self._own: list[tuple[int, ...]] = []
        """The blocks of each request that no other session has."""
        self._lives = [Life([], [], [], []) for _ in range(max(need.session) + 1)]
        for number, request in enumerate(self._work):
            life = self._lives[need.session[number]]
            context = self._contexts[number]
            self._own.append(context[need.shared[number] // settings.block_size :])
            life.held = life.held and not request.parent
            begin = life.end + (request.delay or 0.0 if life.numbers else 0.0)
            if life.numbers and request.delay is None:
                begin = max(begin, (request.arrival - self._work[life.numbers[0]].arrival) / settings.speedup)
            life.numbers.append(number)
            life.comes.append(begin)
            life.blocks.append(-(-(request.tokens + request.output_tokens) // settings.block_size))
            life.prefill.append(need.prefill[number])
            life.end = begin + need.prefill[number] + need.answer[number]
        self._last = 0.0
        """When the last session ends if nobody waits."""
        for life in self._lives:
            life.known()
            self._last = max(self._last, self._work[life.numbers[0]].arrival / settings.speedup + life.end)

    def run(self) -> Outcome:
        """Serve all requests."""
        while True:
            self._until()
            if self._arrivals.next < math.inf:
                now, number = self._arrivals.take()
                self._arrive(number, now)
            elif self._held:
                # Whoever fits nowhere must begin as well.
                number, came = self._held.pop(0)
                self._send(number, came, max(came, self._now))
            else:
                break
        return Outcome(
            self._settings, [f"node-{number + 1}" for number in range(len(self._engines))], self._served,
            self._rejected, 0, [engine.busy for engine in self._engines], 0, "",
        )  # fmt: skip

    _now = 0.0

    def _until(self) -> None:
        due = self._due
        while due and due[0][0] <= self._arrivals.next:
            ends, number = heappop(due)
            engine = self._engines[number]
            if engine.ends != ends:
                continue
            self._now = ends
            report = engine.run()
            for job in report.prefilled:
                self._note(job)
            for job in report.finished:
                self._finish(job, number, ends)
            if engine.ends < math.inf:
                heappush(due, (engine.ends, number))

    def _note(self, job: Job) -> None:
        size, known = self._settings.block_size, 0
        for block in job.hashes[: longest_match(job.tokens, size)]:
            if block not in self._seen:
                break
            known += 1
        job.recomputed = max(0, known * size - job.cached)
        self._seen.update(job.hashes)

    def _arrive(self, number: int, now: float) -> None:
        self._now = now
        life = self._lives[self._session[number]]
        self._arrivals.sent(number, str(number))
        if self._share is not None and life.held and life.numbers[0] == number and not self._fitting(life):
            self._held.append((number, now))
        else:
            self._send(number, now, now)

    def _send(self, number: int, came: float, now: float) -> None:
        session, request = self._session[number], self._work[number]
        life, context = self._lives[session], self._contexts[number]
        life.at = life.numbers.index(number, life.at)
        life.due = now
        node = self._choose(number, life, now)
        job = Job(str(number), context, request.tokens, request.output_tokens, came)
        engine = self._engines[node]
        if not engine.fits(job):
            self._rejected += 1
            self._arrivals.answered(job.request, now)
            return
        if node != life.node and life.node >= 0:
            self._residents[life.node].discard(session)
            self._cache(life.node).never(session)
        life.node = node
        self._residents[node].add(session)
        engine.arrive(job, now)
        heappush(self._due, (engine.ends, node))

    def _cache(self, node: int) -> Foreseeing:
        cache = self._engines[node].cache
        assert isinstance(cache, Foreseeing)  # noqa: S101 - it was made so
        return cache

    def _finish(self, job: Job, node: int, now: float) -> None:
        number = int(job.request)
        session, request = self._session[number], self._work[number]
        life = self._lives[session]
        self._served.append(
            Served(
                node, job.arrival, job.first, now, job.tokens, job.cached, job.cached, job.request, request.session,
                job.recomputed,
            )
        )  # fmt: skip
        self._arrivals.answered(job.request, now)
        place = life.numbers.index(number)
        own, cache = self._own[number], self._cache(node)
        if place + 1 == len(life.numbers):
            self._residents[life.node].discard(session)
            cache.expect(session, math.inf, own)
            self._begin_held(now)
            return
        after = life.numbers[place + 1]
        kept = sum(one == other for one, other in zip(own, self._own[after], strict=False))
        life.due = now + (self._work[after].delay or 0.0)
        if kept < len(own):
            cache.expect(session, math.inf, own[kept:])
        cache.expect(session, life.due if node == life.node else math.inf, own[:kept])

    def _begin_held(self, now: float) -> None:
        def order(item: tuple[int, float]) -> tuple[bool, float]:
            life = self._lives[self._session[item[0]]]
            late = now + life.end >= self._last
            return not late, -life.end if late else float(life.size.sum())

        self._held.sort(key=order)
        left: list[tuple[int, float]] = []
        for number, came in self._held:
            if len(left) < MISSES and self._fitting(self._lives[self._session[number]]):
                self._send(number, came, now)
            else:
                left.append((number, came))
        self._held = left

    def _full(self, node: int, but: Life | None = None) -> NDArray[np.float64]:
        """What those who live on a node need, in each step from now on."""
        lives = [self._lives[other].future for other in self._residents[node] if self._lives[other] is not but]
        found = np.zeros(max((len(future) for future in lives), default=0))
        for future in lives:
            found[: len(future)] += future
        return found

    def _beyond(self, node: int, life: Life, share: float) -> float:
        """How many blocks times steps do not fit there if it lives there."""
        peaks = life.peak + sum(self._lives[other].peak for other in self._residents[node])
        if peaks <= share * self._settings.capacity:
            return 0.0
        full, future = self._full(node, life), life.future
        found = np.zeros(max(len(full), len(future)))
        found[: len(full)] += full
        found[: len(future)] += future
        return float(np.maximum(0.0, found[: len(future)] - share * self._settings.capacity).sum())

    def _fitting(self, life: Life) -> list[int]:
        share = self._share or 1.0
        return [node for node in range(len(self._engines)) if not self._beyond(node, life, share)]

    def _queue(self, node: int) -> float:
        """Seconds of prompts that wait there."""
        engine, hardware = self._engines[node], self._settings.hardware
        begun = sum(least_prefill(hardware, job.done, job.tokens) for job in engine.prefilling)
        return begun + sum(self._own_prefill(node, int(job.request)) for job in engine.waiting)

    def _own_prefill(self, node: int, number: int) -> float:
        tokens, size = self._work[number].tokens, self._settings.block_size
        found = min(self._engines[node].cache.leading(self._contexts[number]), longest_match(tokens, size))
        return least_prefill(self._settings.hardware, found * size, tokens)

    def _choose(self, number: int, life: Life, now: float) -> int:
        nodes: Iterable[int] = range(len(self._engines))
        home = life.node
        if home >= 0:
            here = self._queue(home) + self._own_prefill(home, number)
            if here <= least_prefill(self._settings.hardware, 0, self._work[number].tokens):
                return home
        elif self._share is not None and life.held:
            nodes = self._fitting(life) or nodes
        soon = [(self._queue(node), self._own_prefill(node, number), node) for node in nodes]
        soon = sorted(soon, key=lambda one: (one[0] + one[1], one[2]))
        # Where a session begins, what comes later decides; where it moves to, more what is there now.
        near = [one for place, one in enumerate(soon) if home < 0 or place < LOOKED_AT or one[2] == home]
        return min(near, key=lambda one: (self._cost(one[0], one[1], one[2], life, now), one[2]))[2]

    def _cost(self, queue: float, own: float, node: int, life: Life, now: float) -> float:
        begin = now + queue
        end = begin + own
        others = later = 0.0
        for session in self._residents[node]:
            other = self._lives[session]
            if other is life:
                continue
            if now < other.due < end:
                others += end - max(begin, other.due)
            both = min(other.left, life.left)
            later += both * (
                (len(life.numbers) - life.at) * other.waits[other.at]
                + (len(other.numbers) - other.at) * (life.waits[life.at])
            ) / (other.left * life.left)  # fmt: skip
        pushed = 0.0
        beyond = self._beyond(node, life, 1.0)
        if beyond:
            blocks = life.blocks[life.at]
            pushed = beyond / max(1, blocks) * least_prefill(
                self._settings.hardware, 0, blocks * self._settings.block_size
            )  # fmt: skip
        return end - now + others + later + PUSHED_OUT * pushed


def best(settings: Settings, work: Sequence[Work], shares: Iterable[float | None] = SHARES) -> Outcome:
    """The schedule of the least mean TTFT that was found."""
    tried = [Schedule(settings, work, share).run() for share in shares]
    return min(tried, key=lambda outcome: sum(one.first - one.arrival for one in outcome.served))
