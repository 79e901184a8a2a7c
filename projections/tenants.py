"""What each tenant has asked for of late and has running, over all gateways of a fleet: what its limits are held against.

Every gateway keeps this for itself: its own requests as they come, and those of all others as their decisions and ends come by
on the log. So a gateway knows what the others let in but for what is on its way to the log, and no gateway asks another. It is
no part of a fleet's state: nothing of it is in a digest, and where no gateway has keys, nothing is kept.

A minute is a window that slides by seconds, and never shorter than a minute. Tokens are those of prompts, as far as they are
known when a request is sent somewhere, and those of answers, when the engine has said how many they were.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from kvplane.events.types import RequestCompleted, RequestRouted
from kvplane.projections.load import ACTIVE_SECONDS

if TYPE_CHECKING:
    from kvplane.events.codec import Commit

MINUTE = 60
TENANTS_LIMIT = 10_000
"""Most tenants that are remembered; the one that asked longest ago is forgotten."""
RUNNING_LIMIT = 200_000
"""Most running requests of other gateways that are remembered; the oldest are taken as over."""
SILENT_SECONDS = 10
"""A gateway of which the log has heard nothing for so long may be gone, with what it had running."""

_NS = 1_000_000_000


class Limits(Struct, frozen=True, omit_defaults=True):
    """What a tenant may; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent: int = 0


class Excess(NamedTuple):
    """A limit that a request would exceed: `requests`, `tokens` or `concurrent`; and when it may be asked again, in seconds."""

    limit: str
    seconds: float
    """0 where that is not known: a request has to end first."""


class Usage:
    """What one tenant uses. Seconds of unix time come with each call; they may go back a little."""

    __slots__ = ("_seconds", "elsewhere", "here", "requests", "tokens")

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()
        """Of each second in which something was asked for, oldest first: the second, requests and tokens."""
        self.requests = self.tokens = 0
        """Those of the last minute."""
        self.here = self.elsewhere = 0
        """Requests that run: of this gateway, and of all others."""

    @property
    def running(self) -> int:
        """Requests that run."""
        return self.here + self.elsewhere

    def pass_time(self, now: int) -> None:
        """Forget what is older than a minute."""
        seconds = self._seconds
        while seconds and seconds[0][0] < now - MINUTE:
            _, requests, tokens = seconds.popleft()
            self.requests -= requests
            self.tokens -= tokens

    def add(self, second: int, requests: int, tokens: int) -> None:
        """Count what was asked for; negative ones take back what came to nothing."""
        seconds = self._seconds
        if seconds and seconds[-1][0] >= second:
            # Clocks of several machines: what comes late counts a little longer.
            seconds[-1][1] += requests
            seconds[-1][2] += tokens
        else:
            seconds.append([second, requests, tokens])
        self.requests += requests
        self.tokens += tokens

    def until(self, now: float, *, requests: int = 0, tokens: int = 0) -> float:
        """Seconds until so many requests or tokens of the last minute are older than that; a minute when they never are."""
        for second, asked, counted in self._seconds:
            requests -= asked
            tokens -= counted
            if requests <= 0 and tokens <= 0:
                return max(second + MINUTE + 1 - now, 0.0)
        return float(MINUTE)

    def reset(self, now: float) -> float:
        """Seconds until nothing of the last minute counts any more."""
        return max(self._seconds[-1][0] + MINUTE + 1 - now, 0.0) if self._seconds else 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing is known of it any more."""
        return not (self._seconds or self.here or self.elsewhere)


class _Elsewhere(NamedTuple):
    writer: str
    tenant: str
    time: int


class Tenants:
    """What all tenants use, as one gateway knows it; `writer` is its own name as a writer of the log."""

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self._used: OrderedDict[str, Usage] = OrderedDict()
        # The oldest of a plain dictionary lies behind all places that became empty before.
        self._elsewhere: OrderedDict[str, _Elsewhere] = OrderedDict()
        """Requests that run at other gateways, oldest first."""
        self._heard: dict[str, int] = {}
        """When each of their writers was last heard of on the log, in unix nanoseconds, as long as it has any running."""

    def __len__(self) -> int:
        return len(self._used)

    def of(self, tenant: str, now: float) -> Usage:
        """What a tenant uses at this time."""
        used = self._used.get(tenant)
        if used is None:
            used = self._used[tenant] = Usage()
            if len(self._used) > TENANTS_LIMIT:
                self._used.popitem(last=False)
        else:
            self._used.move_to_end(tenant)
        used.pass_time(int(now))
        return used

    def runs(self, request: str) -> bool:
        """Whether a request of this name runs at another gateway."""
        return request in self._elsewhere

    def enter(self, tenant: str, limits: Limits, now: float) -> Excess | None:
        """Count a request in that begins here; or say which limit forbids it, and count nothing."""
        used = self.of(tenant, now)
        most, tokens = limits.requests_per_minute, limits.tokens_per_minute
        if most and used.requests >= most:
            return Excess("requests", used.until(now, requests=used.requests - most + 1))
        if tokens and used.tokens >= tokens:
            return Excess("tokens", used.until(now, tokens=used.tokens - tokens + 1))
        if limits.concurrent and used.running >= limits.concurrent:
            return Excess("concurrent", 0.0)
        used.add(int(now), 1, 0)
        used.here += 1
        return None

    def prompt(self, tenant: str, limits: Limits, tokens: int, now: float) -> Excess | None:
        """Count the tokens of a prompt in, of a request that was counted; or say that they are too many, and count nothing."""
        used, most = self.of(tenant, now), limits.tokens_per_minute
        if most and used.tokens + tokens > most:
            return Excess("tokens", used.until(now, tokens=used.tokens + tokens - most))
        used.add(int(now), 0, tokens)
        return None

    def over(self, tenant: str, now: float, *, output: int = 0) -> None:
        """A request that began here has ended, with so many tokens of its answer."""
        used = self.of(tenant, now)
        used.here = max(0, used.here - 1)
        if output:
            used.add(int(now), 0, output)

    def observe(self, commit: Commit, time: int) -> None:
        """Count what others say on the log; `time` is when it was stored, in unix nanoseconds."""
        place = commit.place
        if place.topic != "access" or place.name == self._writer:
            return
        if place.name in self._heard:
            self._heard[place.name] = time
        for event in commit.events:
            if type(event) is RequestRouted:
                if event.tenant:
                    self._routed(event, place.name, time)
            elif type(event) is RequestCompleted:
                known = self._end(event.request)
                if known is not None and event.output_tokens:
                    self.of(known.tenant, time / _NS).add(time // _NS, 0, event.output_tokens)

    def _routed(self, event: RequestRouted, writer: str, time: int) -> None:
        self._end(event.request)
        used = self.of(event.tenant, time / _NS)
        used.add(time // _NS, 1, event.tokens)
        used.elsewhere += 1
        self._elsewhere[event.request] = _Elsewhere(writer, event.tenant, time)
        self._heard[writer] = time
        while self._elsewhere:
            request, oldest = next(iter(self._elsewhere.items()))
            if oldest.time >= time - ACTIVE_SECONDS * _NS and len(self._elsewhere) <= RUNNING_LIMIT:
                break
            self._end(request)

    def _end(self, request: str) -> _Elsewhere | None:
        known = self._elsewhere.pop(request, None)
        if known is not None:
            used = self._used.get(known.tenant)
            if used is not None:
                used.elsewhere = max(0, used.elsewhere - 1)
        return known

    def silent_writers(self, now: float) -> set[str]:
        """Gateways that have requests running, and of which the log has heard nothing for a while."""
        before = (now - SILENT_SECONDS) * _NS
        return {writer for writer, heard in self._heard.items() if heard < before}

    def gone(self, writer: str) -> int:
        """A gateway is gone, and its requests with it; how many those were."""
        lost = [request for request, each in self._elsewhere.items() if each.writer == writer]
        for request in lost:
            self._end(request)
        self._heard.pop(writer, None)
        return len(lost)

    def sweep(self, now: float) -> None:
        """Forget tenants that use nothing, and writers that have nothing running."""
        for tenant, used in list(self._used.items()):
            used.pass_time(int(now))
            if used.idle:
                del self._used[tenant]
        writers = {each.writer for each in self._elsewhere.values()}
        self._heard = {writer: time for writer, time in self._heard.items() if writer in writers}
