"""Load: the requests that run on each node, and the prefill work that is queued there.

Known from the log alone: a request runs from its `RequestRouted` to its `RequestCompleted`, its node's loss, or, when
nobody ever reports its end, for `ACTIVE_SECONDS` of log time. Its uncached tokens are pending until the node says that it
holds the prompt's last full block, or that a request which came later is computed: engines prefill in order of arrival.
Each such word sets the node's queue right again (`prefill_done`) and measures how fast it really prefills, decoding
beside it and long contexts included; between two words the queue drains at that pace. A single node's measurements are
too noisy to send requests by: it is first of all taken to be as much slower than it says (`speed`) as all nodes are
(`ratio`), and what it is beyond that (`pace`) is learned slowly. A node's word moves its own pace by all that it says, and the
fleet's by a bounded step (`BOUNDED_FORMAT`): one late report must not make everybody slow.

What was routed of late is summed over `WINDOW_SECONDS` in two halves, so that no clock and no power function is needed
and every replica has the same numbers to the last bit.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from kvplane.projections.contexts import CONTEXTS_FORMAT, Contexts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvplane.events.types import RequestRouted

ACTIVE_SECONDS = 900
"""After this long without a completion a request is taken as over, in seconds of log time."""

PREFILL_LABEL = "prefill_tokens_per_s"
"""Node label with the node's prefill speed."""
PREFILL_SPEED = 8000.0
"""Prefill speed of a node that does not say, in tokens per second (an 8B model on one data-centre GPU)."""

WINDOW_SECONDS = 120
"""How long what was routed counts as recent, in seconds of log time; between this and half of it is looked at."""
MEASURED_DECAY = 0.99
"""Share of what was measured before that is kept at each new measurement of a pace."""
TRUSTED_SECONDS = 2.0
"""How many measured seconds of prefill weigh as much as the speeds that nodes say of themselves."""
TRUSTED_ALIKE_SECONDS = 100.0
"""How many measured seconds of one node weigh as much as what was measured of all."""

BOUNDED_FORMAT = 2
"""From this format of the log on, what one node is measured at moves the fleet's pace by a bounded step."""
LEAST_STEP = 1.5
MOST_STEP = 16.0
"""So many times as fast or as slow as is believed a prefill may count for the fleet; in between, half as many as there are
nodes: less than the others can make up for."""

RUNNING_LIMIT = 1_000_000
"""Most requests that run at once; beyond it the oldest are taken as over."""
EARLY_LIMIT = 100_000
"""Most completions remembered of requests that are not known to run; the oldest are forgotten."""

_NS = 1_000_000_000


def prefill_speed(labels: dict[str, str]) -> float:
    """Prefill speed in tokens per second from a node's labels; the default when it is missing or makes no sense."""
    try:
        speed = float(labels.get(PREFILL_LABEL, PREFILL_SPEED))
    except ValueError:
        return PREFILL_SPEED
    return speed if 1 <= speed <= 1e9 else PREFILL_SPEED


class Active(Struct, frozen=True):
    """A request that runs. `hashes` is empty when the router did not record them."""

    node: str
    model: str
    tokens: int
    blocks: int
    uncached: int
    time: int
    hashes: bytes


class Early(NamedTuple):
    """A completion that came before its request was known: where it ran, the log's time, and whether it was served."""

    node: str
    time: int
    served: bool


class NodeLoad(NamedTuple):
    """Load of one node, as in the columns of `Load`. `prefill_done` is when its queued prefill is done, in unix seconds."""

    speed: float
    active: float
    blocks: int
    tokens: int
    prefill_done: float
    pace: float
    pending: int
    said: float
    took: float
    recent_requests: float
    recent_tokens: float
    recent_uncached: float
    half_requests: float
    half_tokens: float
    half_uncached: float
    decoding: float


COLUMNS = NodeLoad._fields


class Prefills:
    """The prompts of one node that are not known to be computed, oldest first."""

    __slots__ = ("ends", "since", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        """Uncached tokens of each request."""
        self.ends: dict[bytes, str] = {}
        """The request that computes a block which ends a prompt; the first one, when several do."""
        self.since = 0.0
        """Since when the node has been at the first of them, in unix seconds."""


class Load:
    """Load of every node, as columns: a decision over 1,000 nodes reads arrays, not objects.

    `ordinal` is a node's place in each column; the places of nodes that left are used again.
    """

    def __init__(self) -> None:
        self.ordinal: dict[str, int] = {}
        self.speed = array("d")
        """Tokens per second that the node says it prefills."""
        self.active = array("d")
        self.blocks = array("q")
        self.tokens = array("q")
        self.prefill_done = array("d")
        self.pace = array("d")
        """Tokens per second that the node is measured to prefill, beside what slows all nodes down."""
        self.pending = array("q")
        """Uncached tokens of prompts that are not known to be computed."""
        self.said = array("d")
        self.took = array("d")
        """Seconds of prefill that `pace` is made of: as `speed` and `ratio` would have it, and as it was."""
        self.recent_requests = array("d")
        self.recent_tokens = array("d")
        self.recent_uncached = array("d")
        """What was routed here in the window: requests, their tokens, and the uncached ones of those."""
        self.half_requests = array("d")
        self.half_tokens = array("d")
        self.half_uncached = array("d")
        """The same in the window's younger half."""
        self.decoding = array("d")
        """Requests that run and whose prompts are known to be computed."""
        self.ratio = 1.0
        """How fast nodes really are, of what they say."""
        self.bounded = False
        """Whether the log is in a format in which one measurement moves `ratio` by a bounded step."""
        self.all_said = self.all_took = 0.0
        """Seconds of prefill that `ratio` is made of: as the nodes' speeds would have it, and as it was."""
        self.routed_recently = self.routed_half = 0
        """Requests in the window and in its younger half, those of nodes that are gone included."""
        self.half_began = 0
        """When the window's younger half began."""
        self.running: dict[str, Active] = {}
        """Requests that run, oldest first."""
        self.running_bytes = 0
        """Bytes of their hashes. It follows from them, so it is in no digest and no snapshot."""
        # The oldest of a plain dictionary lies behind all places that became empty before.
        self.early = OrderedDict[str, Early]()
        """Completions without a request, oldest first: nodes and routers write by themselves, so an end may come first."""
        self.prefills: list[Prefills] = []
        self.contexts = Contexts()
        self.free: list[int] = []
        """Places of nodes that left; which one is used next is part of the state."""

    def in_format(self, in_force: int) -> None:
        """The log is in this format from now on."""
        self.bounded = in_force >= BOUNDED_FORMAT
        self.contexts.kept = in_force >= CONTEXTS_FORMAT

    def add_node(self, node: str, speed: float) -> None:
        """Start counting for a node, from nothing."""
        self.node_gone(node)
        if self.free:
            at = self.free.pop()
            self.prefills[at] = Prefills()
        else:
            at = len(self.speed)
            for name in COLUMNS:
                # A new array, since decisions may look at the old one, which can't grow then.
                setattr(self, name, getattr(self, name) + array(getattr(self, name).typecode, [0]))
            self.prefills.append(Prefills())
            self.contexts.fit(at + 1)
        self.ordinal[node] = at
        for name in COLUMNS:
            getattr(self, name)[at] = 0
        self.speed[at] = self.pace[at] = speed

    def of(self, node: str) -> NodeLoad | None:
        """Load of a node that is known here."""
        at = self.ordinal.get(node)
        if at is None:
            return None
        return NodeLoad(*(getattr(self, name)[at] for name in COLUMNS))

    def routed(self, event: RequestRouted, block_size: int, time: int) -> None:
        """A request goes to a node that is known here."""
        if event.request in self.running:
            self.completed(event.request, time)
        uncached = max(0, event.tokens - event.match * block_size)
        self.running[event.request] = Active(
            event.node, event.model, event.tokens, event.blocks, uncached, time, event.hashes
        )
        self.running_bytes += len(event.hashes)
        at = self.ordinal[event.node]
        self.active[at] += 1
        self.blocks[at] += event.blocks
        self.tokens[at] += event.tokens
        self.pending[at] += uncached
        if self.contexts.kept:
            self.contexts.routed(event, self.ordinal, time)
        now = time / _NS
        prefills = self.prefills[at]
        if not prefills.waiting:
            prefills.since = now
        prefills.waiting[event.request] = uncached
        if event.hashes and event.match < event.blocks:
            prefills.ends.setdefault(event.hashes[-8:], event.request)
        self.prefill_done[at] = max(self.prefill_done[at], now) + uncached / (self.pace[at] * self.ratio)
        self._next_half(time)
        self.routed_recently += 1
        self.routed_half += 1
        self.recent_requests[at] += 1
        self.half_requests[at] += 1
        self.recent_tokens[at] += event.tokens
        self.half_tokens[at] += event.tokens
        self.recent_uncached[at] += uncached
        self.half_uncached[at] += uncached

    def _next_half(self, time: int) -> None:
        """Forget what was routed before the window."""
        half = WINDOW_SECONDS * _NS // 2
        if time - self.half_began < half:
            return
        # After a long pause the half that ends now is too old as well.
        kept = time - self.half_began < 2 * half
        for recent, young in (
            (self.recent_requests, self.half_requests), (self.recent_tokens, self.half_tokens),
            (self.recent_uncached, self.half_uncached),
        ):  # fmt: skip
            for at, value in enumerate(young):
                recent[at] = value if kept else 0
                young[at] = 0
        self.routed_recently = self.routed_half if kept else 0
        self.routed_half = 0
        self.half_began = time - time % half

    def window(self, time: int) -> float:
        """How many seconds what was routed recently speaks of at this time."""
        half = WINDOW_SECONDS / 2
        return half + min(max((time - self.half_began) / _NS, 0.0), half)

    def awaited(self, node: str) -> Mapping[bytes, str]:
        """Blocks, of 8 bytes each, that end a prompt which the node has still to compute; it changes with them."""
        at = self.ordinal.get(node)
        return {} if at is None else self.prefills[at].ends

    def stored(self, node: str, last: bytes, time: int) -> None:
        """The node holds a block, of these 8 bytes, behind which a prompt may end."""
        at = self.ordinal.get(node)
        if at is not None:
            request = self.prefills[at].ends.get(last)
            if request is not None:
                self._prefilled(at, request, time)

    def _prefilled(self, at: int, request: str, time: int) -> None:
        """A request's prompt is computed, and so are those that the node got before it."""
        prefills = self.prefills[at]
        computed = 0
        for other in list(prefills.waiting):
            computed += self._forget_prefill(at, other)
            self.decoding[at] += 1
            if other == request:
                break
        now = time / _NS
        if computed and now > prefills.since:
            self._measured(at, computed / self.speed[at], now - prefills.since)
        prefills.since = now
        self.prefill_done[at] = now + self.pending[at] / (self.pace[at] * self.ratio)

    def _measured(self, at: int, said: float, took: float) -> None:
        """Prefill of a node that by its speed takes `said` seconds took that many."""
        heard = took
        if self.bounded:
            step = min(max(len(self.ordinal) / 2, LEAST_STEP), MOST_STEP)
            believed = said / self.ratio
            heard = min(max(took, believed / step), believed * step)
        self.all_said = self.all_said * MEASURED_DECAY + said
        self.all_took = self.all_took * MEASURED_DECAY + heard
        self.ratio = (self.all_said + TRUSTED_SECONDS) / (self.all_took + TRUSTED_SECONDS)
        self.said[at] = self.said[at] * MEASURED_DECAY + said / self.ratio
        self.took[at] = self.took[at] * MEASURED_DECAY + took
        trusted = TRUSTED_ALIKE_SECONDS
        self.pace[at] = self.speed[at] * (self.said[at] + trusted) / (self.took[at] + trusted)

    def _forget_prefill(self, at: int, request: str) -> int:
        """A request's prompt is pending no longer; its uncached tokens."""
        prefills = self.prefills[at]
        uncached = prefills.waiting.pop(request, 0)
        self.pending[at] -= uncached
        hashes = self.running[request].hashes if request in self.running else b""
        if prefills.ends.get(hashes[-8:]) == request:
            del prefills.ends[hashes[-8:]]
        return uncached

    def completed(self, request: str, time: int, *, served: bool = False) -> Active | None:
        """A request is over; what it was, or none when it was not running. `served` ones were surely computed."""
        active = self.running.get(request)
        if active is None:
            return None
        at = self.ordinal[active.node]
        if request in self.prefills[at].waiting:
            if served:
                self._prefilled(at, request, time)
            else:
                uncached = self._forget_prefill(at, request)
                self.prefill_done[at] -= uncached / (self.pace[at] * self.ratio)
                self.decoding[at] += 1
        self.decoding[at] -= 1
        del self.running[request]
        if self.contexts.asked:
            self.contexts.over(request, time)
        self.running_bytes -= len(active.hashes)
        self.active[at] -= 1
        self.blocks[at] -= active.blocks
        self.tokens[at] -= active.tokens
        if not self.active[at]:
            self.prefill_done[at] = min(self.prefill_done[at], time / _NS)
        return active

    def ended_early(self, request: str, early: Early) -> None:
        """A request that is not known to run has completed."""
        self.early.pop(request, None)
        self.early[request] = early
        if len(self.early) > EARLY_LIMIT:
            self.early.popitem(last=False)

    def early_end(self, event: RequestRouted) -> Early | None:
        """The end of a request that was routed just now, if it came before; once.

        Not one of an earlier try on the same node: such a one was over before this decision was made.
        """
        early = self.early.get(event.request)
        if early is None or early.node != event.node or event.decided * 1000 > early.time:
            return None
        return self.early.pop(event.request)

    def expired(self, time: int) -> list[str]:
        """Requests that have run longer than `ACTIVE_SECONDS` at this log time, or are the oldest of too many."""
        before = time - ACTIVE_SECONDS * _NS
        many = len(self.running) - RUNNING_LIMIT
        old: list[str] = []
        for request, active in self.running.items():
            if active.time > before and len(old) >= many:
                break
            old.append(request)
        return old

    def set_back(self, by: int) -> None:
        """The log's clock was ahead by so many nanoseconds and is right again: all times that it gave move with it."""
        self.running = {request: replace(active, time=active.time - by) for request, active in self.running.items()}
        self.early = OrderedDict(
            (request, early._replace(time=early.time - by)) for request, early in self.early.items()
        )
        for at, prefills in enumerate(self.prefills):
            prefills.since -= by / _NS
            self.prefill_done[at] -= by / _NS
        self.half_began -= by
        self.contexts.set_back(by)

    def node_gone(self, node: str) -> None:
        """Stop counting for a node; the requests that ran there are over."""
        at = self.ordinal.pop(node, None)
        if at is None:
            return
        self.free.append(at)
        self.contexts.node_gone(node, at)
        for request in [request for request, active in self.running.items() if active.node == node]:
            self.running_bytes -= len(self.running.pop(request).hashes)
            self.contexts.gone(request)
