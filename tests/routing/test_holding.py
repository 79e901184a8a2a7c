"""Who waits, beside a naive reference: who goes on never does, others in a fair order, nobody beyond the bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.versions import FORMAT
from kvplane.projections.contexts import LIVE_SECONDS
from kvplane.projections.load import ACTIVE_SECONDS
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.routing import policies
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.holding import IDLE_SECONDS, ROOM_SHARE, TOKENS_A_SECOND, release_reason
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.query import Query
from tests.support.fold_given import SECOND, Given, registered

if TYPE_CHECKING:
    from kvplane.services.routing.holding import Hold

BOUND = 1000
CAPACITY = 100
"""Blocks a node."""
ROOM = int(ROOM_SHARE * 2 * CAPACITY * 16)


@dataclass
class Conversation:
    """What the reference knows of one."""

    tokens: int
    turns: int
    routed: int
    answered: int = 0
    running: dict[str, int] = field(default_factory=dict)
    """When each request that runs was sent."""

    def silent(self, now: int) -> bool:
        return not self.running and now - max(self.routed, self.answered) >= IDLE_SECONDS * SECOND


@dataclass
class Waiting:
    """A request that waits, for the reference."""

    request: str
    session: str
    tokens: int
    tenant: str
    turns: int
    since: int

    @property
    def when(self) -> tuple[bool, int]:
        return self.turns == 0, self.since + self.tokens * SECOND // TOKENS_A_SECOND


def in_order(waiting: list[Waiting]) -> list[Waiting]:
    """One of each tenant after the other, each tenant's by when they came."""
    lines: dict[str, list[Waiting]] = {}
    for each in sorted(waiting, key=lambda each: each.when):
        lines.setdefault(each.tenant, []).append(each)
    order = []
    while lines:
        order += sorted((line[0] for line in lines.values()), key=lambda each: each.when)
        lines = {tenant: line[1:] for tenant, line in lines.items() if line[1:]}
    return order


def fleet(hold: str = "hold", policy: str = "ttft") -> Given:
    given = Given()
    given.put("control", "", types.PolicyChanged(policy, {hold: 1, "hold_seconds": BOUND}))
    given.put("control", "", types.FormatRaised(FORMAT))
    for name in "ab":
        given.node(registered(name, capacity=CAPACITY // 2))
        given.state.nodes[name].registered.capacity_blocks["cpu"] = CAPACITY // 2
    return given


def query(request: str, session: str, tokens: int, tenant: str = "", first: int = 1) -> Query:
    hashes = pack_hashes(range(first, first + tokens // 16))
    return Query(request, "m", hashes, tokens, len(hashes) // 8, 16, session, tenant=tenant)


class Queueing(RuleBasedStateMachine):
    """Conversations ask, think and fall silent; a router holds and lets in by what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.given = fleet()
        self.chooser = Chooser(self.given.state, Overlay())
        self.known: dict[str, Conversation] = {}
        self.waiting: list[Waiting] = []
        self.number = 0

    @property
    def now(self) -> int:
        return self.given.now

    def live(self) -> int:
        return sum(each.tokens for each in self.known.values() if not each.silent(self.now))

    def expected(self, each: Waiting) -> bool:
        """Whether the reference holds it."""
        own = self.known.get(each.session)
        if own is not None and not own.silent(self.now):
            return False
        if self.now - each.since >= BOUND * SECOND:
            return False
        order = in_order([*(other for other in self.waiting if other.request != each.request), each])
        before = order[: order.index(each)]
        return self.live() + sum(other.tokens for other in before) + each.tokens > ROOM

    def asks(self, each: Waiting) -> Hold | None:
        hold = self.chooser.hold(query(each.request, each.session, each.tokens, each.tenant), self.now)
        assert (hold is not None) == self.expected(each)
        return hold

    def routed(self, each: Waiting) -> None:
        hashes = query(each.request, "", each.tokens).hashes
        event = types.RequestRouted(each.request, "m", "a", 0, len(hashes) // 8, each.tokens, hashes, each.session)
        self.given.put("access", "w", event, after=0)
        # Whose last request was sent long ago is not expected to go on.
        self.known = {name: own for name, own in self.known.items() if self.now - own.routed <= LIVE_SECONDS * SECOND}
        before = self.known.get(each.session)
        turns = 1 if before is None else before.turns + 1
        running = {} if before is None else before.running
        answered = 0 if before is None else before.answered
        self.known[each.session] = Conversation(
            each.tokens, turns, self.now, answered, {**running, each.request: self.now}
        )

    @rule(session=st.sampled_from("stuvwxyz"), blocks=st.integers(1, 80), tenant=st.sampled_from(["", "t"]))
    def ask(self, session: str, blocks: int, tenant: str) -> None:
        self.pass_time(1)
        self.number += 1
        own = self.known.get(session)
        each = Waiting(f"r{self.number}", session, blocks * 16, tenant, 0 if own is None else own.turns, self.now)
        hold = self.asks(each)
        if hold is None:
            self.routed(each)
            return
        order = in_order([*self.waiting, each])
        assert hold.place == order.index(each) + 1
        assert (hold.live, hold.room, hold.turns) == (self.live(), ROOM, each.turns)
        held = hold.event(query(each.request, session, each.tokens, tenant), self.now, 0, first=True)
        self.given.put("access", "w", held, after=0)
        self.waiting.append(each)

    @rule(seconds=st.sampled_from([20, 30, 55]))
    def pass_time(self, seconds: int) -> None:
        """The router says again whom it holds."""
        says: list[types.Event] = [types.RequestHeld(each.request, "m", each.tokens) for each in self.waiting]
        self.given.put("access", "w", *(says or [types.RequestCompleted("nobody", "a")]), after=seconds)
        for own in self.known.values():
            for request, since in list(own.running.items()):
                if self.now - since >= ACTIVE_SECONDS * SECOND:
                    self.over(own, request)

    def over(self, own: Conversation, request: str) -> None:
        del own.running[request]
        own.answered = self.now

    @rule(times=st.integers(5, 12))
    def be_silent(self, times: int) -> None:
        for _ in range(times):
            self.pass_time(55)

    @rule(times=st.integers(4, 20), quiet=st.sets(st.sampled_from("stuvwxyz"), max_size=4))
    def go_on(self, times: int, quiet: set[str]) -> None:
        """Those who live ask and are answered all the while, but for a few."""
        for _ in range(times):
            self.pass_time(55)
            for session in list(self.known):
                own = self.known.get(session)
                if own is None:
                    # Forgotten as another one asked.
                    continue
                for request in list(own.running):
                    self.given.put("access", "w", types.RequestCompleted(request, "a"), after=0)
                    self.over(own, request)
                if session not in quiet and not own.silent(self.now):
                    self.number += 1
                    each = Waiting(f"r{self.number}", session, own.tokens, "", own.turns, self.now)
                    assert self.asks(each) is None
                    self.routed(each)

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        running = sorted(request for own in self.known.values() for request in own.running)
        if not running:
            return
        request = data.draw(st.sampled_from(running))
        self.given.put("access", "w", types.RequestCompleted(request, "a"), after=0)
        for own in self.known.values():
            if request in own.running:
                self.over(own, request)

    @rule()
    def let_in(self) -> None:
        ready = self.chooser.ready("m", self.now)
        for request in ready:
            each = next((each for each in self.waiting if each.request == request), None)
            if each is None:
                continue
            assert self.asks(each) is None
            waited = (self.now - each.since) / SECOND
            reason = release_reason(waited, self.given.state)
            assert reason == ("bound" if waited >= BOUND else "room")
            self.waiting.remove(each)
            self.given.put("access", "w", types.RequestReleased(request, "m", reason, waited), after=0)
            self.routed(each)
            break

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiting:
            each = data.draw(st.sampled_from(self.waiting))
            self.waiting.remove(each)
            self.given.put("access", "w", types.RequestReleased(each.request, "m", "left"), after=0)

    @invariant()
    def the_queue_is_that_of_the_reference(self) -> None:
        assert list(self.given.state.queue) == [each.request for each in self.waiting]
        assert self.chooser.holding.line("m").order == [each.request for each in in_order(self.waiting)]
        for each in self.waiting:
            hold = self.chooser.hold(query(each.request, each.session, each.tokens, each.tenant), self.now)
            assert (hold is not None) == self.expected(each)


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_without_hold_nothing_is_held_and_policies_do_not_see_the_parameters() -> None:
    given = fleet("held_seconds")
    chooser = Chooser(given.state, Overlay())
    assert chooser.hold(query("r", "s", 10_000_000), given.now) is None
    seen = policies.policy("ttft").complete({"hold": 1, "hold_seconds": 5})
    assert "hold" not in seen
    assert seen == policies.policy("ttft").complete({})


@pytest.mark.parametrize("name", list(policies.POLICIES))
def test_every_policy_can_hold(name: str) -> None:
    policies.check(name, {"hold": 1, "hold_seconds": 30})
    with pytest.raises(BadRequest, match="hold is 2; it must be from 0 to 1"):
        policies.check(name, {"hold": 2})


def test_who_is_just_let_in_counts_before_the_log_says_so() -> None:
    given = fleet()
    chooser = Chooser(given.state, Overlay())
    asked = query("one", "s", ROOM)
    assert chooser.hold(asked, given.now) is None
    chooser.count_in(asked, chooser.decide(asked, given.now), given.now, given.state.sequence)
    hold = chooser.hold(query("two", "t", 16), given.now)
    assert hold is not None
    assert hold.reason == f"live conversations need {ROOM:,} of {ROOM:,} tokens, 0 before it and itself 16"
    assert hold.expected == BOUND


def test_nobody_waits_beyond_the_bound() -> None:
    given = fleet()
    chooser = Chooser(given.state, Overlay())
    hashes = query("one", "", ROOM).hashes
    given.put("access", "w", types.RequestRouted("one", "m", "a", 0, len(hashes) // 8, ROOM, hashes, "s"))
    asked = query("two", "t", 160)
    waited = []
    for seconds in range(0, BOUND + 100, 50):
        given.put("access", "w", types.RequestHeld("two", "m", 160), after=50 if seconds else 1)
        if chooser.hold(asked, given.now) is not None:
            waited.append(seconds)
    assert waited == [*range(0, BOUND, 50)]
    assert chooser.ready("m", given.now) == ["two"]


def test_who_has_begun_goes_before_who_has_not_and_the_small_before_the_large() -> None:
    given = fleet()
    for request, tokens, turns in (("large", 1000, 0), ("small", 100, 0), ("begun", 5000, 3)):
        given.put("access", "w", types.RequestHeld(request, "m", tokens, turns=turns))
    given.put("access", "w", types.RequestHeld("of another", "m", 5000, tenant="u"))
    # The first of each tenant goes before the second of any.
    assert Chooser(given.state, Overlay()).holding.line("m").order == ["begun", "of another", "small", "large"]
