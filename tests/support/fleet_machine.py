"""Random logs in which time passes, clocks go back and forgeries come late, beside a second telling of the fold's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.hashing import pack_hashes
from kvplane.events.subjects import Topic, subject
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from tests.support.fold_given import SECOND, headers_of, registered, replayed
from tests.support.reference_fold import Reference

if TYPE_CHECKING:
    from collections.abc import Sequence


NAMES = ["a", "b/1", "c é"]


CHAINS = [[*range(1, 9)], [1, 2, 3, 11, 12, 13], [21, 22, 23], [8, 7, 1, 1, 23]]


KINDS = [types.NodeCordoned, types.NodeUncordoned, types.NodeLost, types.NodeRecovered, types.NodeRemoved]


names = st.sampled_from(NAMES)


requests = st.sampled_from(["q", "r", "s", "t"])


runs = st.builds(
    lambda chain, start, length: chain[start : start + length], st.sampled_from(CHAINS), st.integers(0, 5),
    st.integers(0, 8),
)  # fmt: skip


parts = st.tuples(st.sampled_from("++-0"), runs, st.sampled_from(types.TIERS))


late = st.sampled_from([0, 0, 0, 0, 0, 1, 3])
"""How many commits ago something was true: mostly it still is."""


pauses = st.sampled_from([1, 1, 1, 1, 1, 0, -30, -200, 200, 900])
"""Seconds to the next commit; a server's clock can go back."""


retries = st.sampled_from([None, None, "next", "next", "same", "older"])


models = st.sampled_from([["m", "alias"], ["m"], ["n"], ["n", "alias"]])


rarely = st.sampled_from([False] * 7 + [True])


modes = st.sampled_from(["managed", "reported"])


class FleetMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state = FleetState("f")
        self.reference = Reference()
        self.messages: list[Message] = []
        self.clock = 10**6
        self.number = 0

    def append(self, where: str, body: bytes, headers: dict[str, str], pause: int = 1) -> Message:
        self.clock += pause
        message = Message(len(self.messages) + 1, where, self.clock * SECOND, headers or None, body)
        self.messages.append(message)
        return message

    def put(self, topic: Topic, name: str, events: Sequence[types.Event], *, pause: int = 1, retry: str | None = None,
            based: int | None = None) -> None:  # fmt: skip
        self.number += retry == "next"
        number = {"next": self.number, "same": self.number, "older": self.number - 2}.get(retry or "", 0)
        based_on = None if based is None else max(0, len(self.messages) - based)
        body = codec.encode(events)
        headers = headers_of(body, writer="w" if number > 0 else "", counter=max(0, number), based_on=based_on)
        message = self.append(subject("f", topic, name), body, headers, pause)
        expected = self.reference.deliver(message.time, (topic, name), events, headers)
        assert self.state.apply(message).skipped == expected

    def epoch(self, name: str, behind: int) -> int:
        return max(0, (self.reference.nodes[name].epoch if name in self.reference.nodes else 1) - behind)

    @initialize(kinds=st.tuples(modes, modes, modes), capacity=st.integers(3, 9))
    def begin(self, kinds: tuple[Any, Any, Any], capacity: int) -> None:
        for name, mode in zip(NAMES, kinds, strict=True):
            self.put("node", name, [registered(name, mode=mode, capacity=capacity)])

    @rule(name=names, models=models, mode=modes, size=st.sampled_from([16] * 6 + [32]),
          capacity=st.integers(0, 9), speed=st.sampled_from([1, 1000]), based=st.none() | late)  # fmt: skip
    def register(
        self, name: str, models: list[str], mode: Any, size: int, capacity: int, speed: int, based: int | None
    ) -> None:
        event = registered(name, models=models, mode=mode, size=size, capacity=capacity, speed=speed)
        self.put("node", name, [event], based=based)

    @rule(name=names, kind=st.sampled_from(KINDS), based=st.none() | late, retry=retries)
    def change(self, name: str, kind: Any, based: int | None, retry: str | None) -> None:
        self.put("node", name, [kind(name)], based=based, retry=retry)

    @rule(name=names, stubborn=rarely, parts=st.lists(parts, min_size=1, max_size=4), behind=late, retry=retries,
          based=st.none() | late)  # fmt: skip
    def report(
        self, name: str, stubborn: bool, parts: list[Any], behind: int, retry: str | None, based: int | None
    ) -> None:
        name = self.pick(name, "reported", stubborn)
        epoch = self.epoch(name, behind)
        events: list[types.Event] = []
        for what, run, tier in parts:
            if what == "0":
                events.append(types.CacheCleared(name, epoch))
            elif what == "+":
                parent = next((chain[chain.index(run[0]) - 1] for chain in CHAINS if run and run[0] in chain[1:]), None)
                events.append(types.BlocksStored(name, epoch, 1, pack_hashes(run), parent, tier))
            else:
                events.append(types.BlocksRemoved(name, epoch, 1, pack_hashes(run), tier))
        self.put("cache", name, events, retry=retry, based=based)

    def pick(self, name: str, mode: str, stubborn: bool) -> str:
        """The next node whose cache is of this kind; a stubborn writer takes the one that it has."""
        order = [*NAMES[NAMES.index(name) :], *NAMES]
        fitting = [
            n for n in order if n in self.reference.nodes and self.reference.nodes[n].registered.cache_mode == mode
        ]
        return name if stubborn or not fitting else fitting[0]

    @rule(name=names, stubborn=rarely, stored=runs, leave=st.lists(st.integers(0, 8), max_size=4, unique=True),
          clumsy=rarely, behind=late, based=st.none() | late, pause=pauses)  # fmt: skip
    def place(self, name: str, stubborn: bool, stored: list[int], leave: list[int], clumsy: bool, behind: int,
              based: int | None, pause: int) -> None:  # fmt: skip
        name = self.pick(name, "managed", stubborn)
        held = sorted(self.reference.held(name, "gpu") - (set() if clumsy else set(stored)))
        evicted = [held[at] for at in leave if at < len(held)] + [99, 99] * clumsy
        event = types.BlocksPlaced(name, self.epoch(name, behind), pack_hashes(stored), pack_hashes(evicted))
        self.put("cache", name, [event], based=based, pause=pause)

    @precondition(lambda self: self.reference.running)
    @rule(at=st.integers(0, 3), away=st.integers(0, 2))
    def evict_in_use(self, at: int, away: int) -> None:
        """What a running request uses is placed, if it can be, and then to be evicted."""
        routed, _ = list(self.reference.running.values())[at % len(self.reference.running)]
        epoch, block = self.epoch(routed.node, 0), routed.hashes[away * 8 : away * 8 + 8]
        for event in (
            types.BlocksPlaced(routed.node, epoch, block),
            types.BlocksPlaced(routed.node, epoch, b"", block),
        ):
            self.put("cache", routed.node, [event])

    @rule(sessions=st.lists(st.tuples(st.sampled_from("xyz"), names | st.just("nobody"), st.booleans()), min_size=1,
          max_size=3), model=st.sampled_from(["m", "n"]), retry=retries)  # fmt: skip
    def session(self, sessions: list[tuple[str, str, bool]], model: str, retry: str | None) -> None:
        self.put("session", model, [
            types.SessionAssigned(session, model, name) if stays else types.SessionEnded(session, model)
            for session, name, stays in sessions
        ], retry=retry)  # fmt: skip

    @rule(todo=st.lists(st.tuples(requests, names | st.just("nobody"), runs, st.integers(0, 3), st.sampled_from(["", "x"])),
          min_size=1, max_size=3), done=st.lists(requests, max_size=2), retry=retries, pause=pauses)  # fmt: skip
    def access(self, todo: list[Any], done: list[str], retry: str | None, pause: int) -> None:
        events: list[types.Event] = [types.RequestCompleted(request, "a") for request in done]
        for request, name, run, match, session in todo:
            found = min(match, len(run))
            tokens = len(run) * 16 + 5
            events.append(types.RequestRouted(request, "m", name, found, len(run), tokens, pack_hashes(run), session))
        self.put("access", "w", events, retry=retry, pause=pause)

    @rule(value=st.floats(0, 1), retry=retries, pause=pauses)
    def policy(self, value: float, retry: str | None, pause: int) -> None:
        self.put("control", "", [types.PolicyChanged("cascade", {"weight": value})], retry=retry, pause=pause)

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), other=st.booleans())
    def late_message(self, data: st.DataObject, other: bool) -> None:
        """A redelivery, or something else under a sequence that is over, out of order."""
        message = data.draw(st.sampled_from(self.messages))
        if other:
            body = codec.encode([types.PolicyChanged("forged")])
            message = Message(message.sequence, "kv.f.control", message.time + 10**15, None, body)
        assert self.state.apply(message).skipped == "redelivered"

    @rule(name=names, which=st.integers(0, 9), pause=pauses)
    def bad(self, name: str, which: int, pause: int) -> None:
        cache, node = subject("f", "cache", name), subject("f", "node", name)
        good = codec.encode([types.CacheCleared(name, self.epoch(name, 0))])
        many = [types.NodeLost(name), types.NodeRecovered(name)]
        where, body, headers, reason = [
            (cache, b"", {}, "undecodable"),
            (cache, good[:-1], {}, "undecodable"),
            (cache, b'{"stream":"KV_f","seq":3}', {}, "invalid"),
            (cache, good, {codec.CRC32: "0"}, "checksum"),
            (cache, good, {codec.WRITER: "w", codec.WRITER_SEQ: "one"}, "bad_header"),
            (cache + ".more", good, {}, "foreign_subject"),
            (subject("f", "cache", "else"), good, {codec.WRITER: "w", codec.WRITER_SEQ: "10000"}, "wrong_subject"),
            (node, good, {}, "unknown_type"),
            (node, codec.encode(many), {}, "invalid"),
            (subject("f", "access", "v"), codec.encode([types.RequestCompleted("q", name)]), {codec.WRITER: "w"},
             "wrong_subject"),
        ][which]  # fmt: skip
        message = self.append(where, body, headers, pause)
        assert self.state.apply(message).skipped == reason
        self.reference.deliver_bad(message.time, reason)

    @invariant()
    def nodes_are_the_same(self) -> None:
        state, reference = self.state, self.reference
        assert {name: (n.epoch, n.changed, n.cordoned, n.lost is not None) for name, n in state.nodes.items()} == {
            name: (n.epoch, n.changed, n.cordoned, n.lost) for name, n in reference.nodes.items()
        }
        assert state.removed == reference.buried
        assert state.time == reference.clock * (len(self.messages) > 0)

    @invariant()
    def blocks_are_the_same(self) -> None:
        for name, node in self.state.nodes.items():
            index = self.state.caches.index(node.model)
            held = {tier: set(index.held(slot)) for tier, slot in node.slots.items()}
            assert {t: b for t, b in held.items() if b} == {
                t: b for t in types.TIERS if (b := self.reference.held(name, t))
            }
            for chain in CHAINS:
                length = next((at for at, block in enumerate(chain) if block not in held["gpu"]), len(chain))
                assert index.match(pack_hashes(chain))[node.slots["gpu"]] == length
            if node.managed:
                assert len(held["gpu"]) <= node.registered.capacity_blocks["gpu"]

    @invariant()
    def recency_is_the_same(self) -> None:
        for name, recency in self.state.recency.items():
            used = self.reference.used
            assert list(recency.order) == sorted(self.reference.held(name, "gpu"), key=lambda block: used[name, block])
            assert recency.protected == self.reference.protected(name)

    @invariant()
    def load_is_the_same(self) -> None:
        running = self.reference.running
        assert list(self.state.load.running) == list(running)
        for name, facts in self.reference.nodes.items():
            load = self.state.load.of(name)
            assert (load is None) == facts.lost
            if load is not None:
                here = [event for event, _ in running.values() if event.node == name]
                totals = (len(here), sum(event.blocks for event in here), sum(event.tokens for event in here))
                assert list(load[1:4]) == list(totals)
                assert load.pending == self.reference.pending(name)
                assert load.decoding == self.reference.decoding(name)
                assert load.pace * self.state.load.ratio == pytest.approx(self.reference.pace(facts))
                assert load.prefill_done == pytest.approx(facts.queue)

    @invariant()
    def sessions_are_the_same(self) -> None:
        expected = sorted(self.reference.sessions.items(), key=lambda item: item[1][3])
        assert [(key, (s.node, s.since, s.was)) for key, s in self.state.sessions.items()] == [
            (key, entry[:3]) for key, entry in expected
        ]
        for name in NAMES:
            assert self.state.sessions.on_node(name) == sum(entry[0] == name for _, entry in expected)

    @invariant()
    def counts_are_the_same(self) -> None:
        state, reference = self.state, self.reference
        assert (state.skipped, state.ignored) == (reference.skipped, reference.ignored)
        assert state.commits == reference.applied
        assert state.writers == reference.counters
        assert (state.policy, state.parameters) == (reference.policy.policy, reference.policy.parameters)

    def teardown(self) -> None:
        """Replayed from zero, each message twice or not, it is the same state to the bit."""
        expected = digest(self.state)
        assert digest(replayed(self.messages)) == expected
        assert digest(replayed([message for message in self.messages for _ in range(2)])) == expected
        if self.messages:
            assert digest(replayed(self.messages[:-1])) != expected
