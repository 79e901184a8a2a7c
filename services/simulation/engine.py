"""One simulated node in virtual time: continuous batching with chunked prefill over a block cache.

Each step, every decoding request makes one token; what is left of the step's tokens goes to prompts, first come first
served. A prompt starts when its blocks, and those of its answer, fit into the cache beside what is in use. Its first
token comes at the end of the step that computes its last chunk. While only decoding happens, steps are made in one go,
up to the next end of a request, or up to the step in which a new request arrives.

The engine has no clock: it says when it wants to be called (`ends`), and `run` does what is due at a time.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from msgspec import Struct

from kvplane.events.hashing import longest_match
from kvplane.services.simulation.blockcache import BlockCache

if TYPE_CHECKING:
    from kvplane.services.simulation.hardware import Hardware


class Job(Struct, eq=False):
    """One request on a node. `hashes` are its full blocks, `tokens` and `output` its lengths."""

    request: str
    hashes: tuple[int, ...]
    tokens: int
    output: int
    arrival: float
    """When the client sent it, in seconds."""
    private: int = 0
    cached: int = 0
    """Leading tokens that were found in the cache."""
    done: int = 0
    """Tokens of the prompt that are computed or were cached."""
    stored: tuple[int, ...] = ()
    parent: int | None = None
    started: float = 0.0
    """When it reached the node that serves it."""
    first: float = 0.0
    """When its first token came."""
    recomputed: int = 0
    """Tokens that were computed before, somewhere."""


class Report(Struct):
    """What a node did since it was last asked: evicted blocks, prompts that are computed, requests that ended."""

    evicted: list[int]
    prefilled: list[Job]
    finished: list[Job]


class Engine:
    """One node. Times are seconds."""

    def __init__(self, hardware: Hardware, capacity: int, block_size: int, *, pace: float = 1.0) -> None:
        self.hardware = hardware
        self.block_size = block_size
        self.cache = BlockCache(capacity)
        self.pace = pace
        """How many times slower than its hardware this node is."""
        self.ends = math.inf
        """When the steps under way end."""
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self.busy = 0.0
        """Seconds that went into steps with prompts in them."""
        self._decoding: list[tuple[int, int, Job]] = []
        self._context = 0
        self._steps = 0
        self._chunks: list[tuple[Job, int]] = []
        self._begun = 0.0
        self._jump = 0
        self._tie = 0

    @property
    def active(self) -> int:
        """Requests here."""
        return len(self.waiting) + len(self.prefilling) + len(self._decoding)

    def jobs(self) -> list[Job]:
        """All requests here, in no particular order."""
        return [*self.waiting, *self.prefilling, *(job for _, _, job in self._decoding)]

    def fits(self, job: Job) -> bool:
        """Whether the request could ever run here."""
        return len(job.hashes) + self._private(job) <= self.cache.capacity

    def _private(self, job: Job) -> int:
        return -(-(job.tokens + job.output) // self.block_size) - len(job.hashes)

    def arrive(self, job: Job, now: float) -> None:
        """A request has come. `ends` may change; call `run` when it is due."""
        job.started = now
        job.private = self._private(job)
        self.waiting.append(job)
        if self.ends == math.inf:
            self.ends = now
        elif self._jump:
            self._cut(now)

    def _cut(self, now: float) -> None:
        """End a run of decoding steps with the step that is under way."""
        low, high = 1, self._jump
        decoding, context = len(self._decoding), self._context
        while low < high:
            middle = (low + high) // 2
            if self._begun + self._decode(middle, decoding, context) >= now:
                high = middle
            else:
                low = middle + 1
        self._jump = low
        self.ends = self._begun + self._decode(low, decoding, context)

    def _decode(self, count: int, decoding: int, context: int) -> float:
        return self.hardware.decode_steps(count, decoding, context) * self.pace

    def run(self) -> Report:
        """End the steps under way and begin the next; to be called at `ends`."""
        now = self.ends
        report = Report([], [], [])
        if self._jump:
            self._steps += self._jump
            self._context += self._jump * len(self._decoding)
            self._jump = 0
        elif self._chunks:
            self._steps += 1
            self._context += len(self._decoding)
            for job, count in self._chunks:
                job.done += count
                if job.done == job.tokens:
                    job.first = now
                    self.prefilling.remove(job)
                    report.prefilled.append(job)
                    self._tie += 1
                    heappush(self._decoding, (self._steps + max(0, job.output - 1), self._tie, job))
                    self._context += job.tokens + 1
            self._chunks = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, _, job = heappop(self._decoding)
            self._context -= job.tokens + max(1, job.output)
            self.cache.finish(job.hashes, job.private)
            report.finished.append(job)
        self._begin(now, report)
        return report

    def _begin(self, now: float, report: Report) -> None:
        decoding = len(self._decoding)
        room = max(0, self.hardware.step_tokens - decoding)
        pairs = context = 0
        for job in self.prefilling:
            room, pairs, context = self._chunk(job, room, pairs, context)
            if not room:
                break
        while room > 0 and self.waiting and self.active - len(self.waiting) < self.hardware.most_running:
            job = self.waiting[0]
            found = self.cache.start(job.hashes, job.private)
            if found is None:
                break
            self.waiting.popleft()
            # The last token is always computed.
            job.cached = min(found.cached, longest_match(job.tokens, self.block_size)) * self.block_size
            job.done = job.cached
            job.stored = found.stored
            job.parent = job.hashes[found.cached - 1] if found.cached else None
            report.evicted += found.evicted
            self.prefilling.append(job)
            room, pairs, context = self._chunk(job, room, pairs, context)
        self._begun = now
        if self._chunks:
            tokens = sum(count for _, count in self._chunks)
            took = self.hardware.step(tokens, pairs, decoding, self._context + context) * self.pace
            self.busy += took
            self.ends = now + took
        elif decoding:
            self._jump = self._decoding[0][0] - self._steps
            self.ends = now + self._decode(self._jump, decoding, self._context)
        else:
            self.ends = math.inf

    def _chunk(self, job: Job, room: int, pairs: int, context: int) -> tuple[int, int, int]:
        count = min(room, job.tokens - job.done)
        self._chunks.append((job, count))
        return room - count, pairs + count * job.done + count * count // 2, context + job.done
