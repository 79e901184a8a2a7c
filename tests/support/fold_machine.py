"""Random single commits of every kind, good and bad, beside a naive fold that says what must come of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.hashing import pack_hashes
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from tests.support.naive_fold import Naive

if TYPE_CHECKING:
    from collections.abc import Sequence


NAMES = ["a", "b.1", "c/é"]


MODELS = ["m", "org/model v2"]


TIERS: list[types.Tier] = ["gpu", "gpu", "cpu"]


SUBJECTS = {"a": "a", "b.1": "b%2E1", "c/é": "c%2F%C3%A9", "m": "m", "org/model v2": "org%2Fmodel%20v2"}


# A few chains that share beginnings, so that blocks are shared, split and held in part.
CHAINS = [[*range(1, 9)], [*range(1, 5), *range(21, 26)], [*range(31, 40)], [1, 2, 41, 42]]


runs = st.builds(
    lambda chain, start, length: chain[start : start + length],
    st.sampled_from(CHAINS),
    st.integers(0, 6),
    st.integers(1, 9),
).filter(bool)


names = st.sampled_from(NAMES)


models = st.sampled_from(MODELS)


back = st.sampled_from([0, 0, 0, 0, 1, 2, 5])


class FoldMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state = FleetState("f")
        self.naive = Naive()
        self.messages: list[Message] = []
        self.counter = 0

    def put(
        self,
        subject: str,
        events: Sequence[types.Event],
        *,
        writer: str = "",
        counter: int = 0,
        based_on: int | None = None,
        as_json: bool = False,
    ) -> None:
        """Write a commit, and compare what both folds say of it."""
        headers: dict[str, str] = {}
        if writer:
            headers |= {codec.WRITER: writer, codec.WRITER_SEQ: str(counter)}
        if based_on is not None:
            headers[codec.BASED_ON] = str(based_on)
        body = codec.encode_json(events) if as_json else codec.encode(events)
        message = Message(
            len(self.messages) + 1, f"kv.f.{subject}", 10**9 * (len(self.messages) + 1), headers or None, body
        )
        self.messages.append(message)
        applied = self.state.apply(message)
        assert applied.skipped == self.naive.apply(message.sequence, message.subject, events, writer, counter, based_on)

    def put_bad(self, subject: str, body: bytes, reason: str, headers: dict[str, str] | None = None) -> None:
        message = Message(len(self.messages) + 1, subject, 10**9 * (len(self.messages) + 1), headers, body)
        self.messages.append(message)
        assert self.state.apply(message).skipped == reason
        self.naive.skip(reason)

    def epoch(self, name: str, behind: int) -> int:
        node = self.naive.nodes.get(name)
        return max(0, (node.epoch if node else 1) - behind)

    @rule(
        name=names,
        model=models,
        managed=st.booleans(),
        size=st.sampled_from([16, 16, 16, 32]),
        capacity=st.integers(0, 12),
    )
    def register(self, name: str, model: str, managed: bool, size: int, capacity: int) -> None:
        event = types.NodeRegistered(
            name, "x", [model, "alias"], size, {"gpu": capacity, "cpu": 4}, "managed" if managed else "reported"
        )
        self.put(f"node.{SUBJECTS[name]}", [event])

    @rule(
        name=names,
        kind=st.sampled_from(
            [types.NodeCordoned, types.NodeUncordoned, types.NodeLost, types.NodeRecovered, types.NodeRemoved]
        ),
        behind=st.none() | back,
    )
    def change(self, name: str, kind: Any, behind: int | None) -> None:
        based_on = None if behind is None else max(0, len(self.messages) - behind)
        self.put(f"node.{SUBJECTS[name]}", [kind(name)], based_on=based_on)

    @rule(name=names, parts=st.lists(st.tuples(runs, st.sampled_from(TIERS), st.booleans()), min_size=1, max_size=4),
          behind=back, as_json=st.booleans())  # fmt: skip
    def report(self, name: str, parts: list[tuple[list[int], types.Tier, bool]], behind: int, as_json: bool) -> None:
        epoch = self.epoch(name, behind)
        events: list[types.Event] = []
        for run, tier, stored in parts:
            parent = next((chain[chain.index(run[0]) - 1] for chain in CHAINS if run[0] in chain[1:]), None)
            hashes = pack_hashes(run if stored else reversed(run))
            if stored:
                events.append(types.BlocksStored(name, epoch, len(self.messages), hashes, parent, tier))
            else:
                events.append(types.BlocksRemoved(name, epoch, len(self.messages), hashes, tier))
        self.put(f"cache.{SUBJECTS[name]}", events, as_json=as_json)

    @rule(name=names, behind=back)
    def clear(self, name: str, behind: int) -> None:
        self.put(f"cache.{SUBJECTS[name]}", [types.CacheCleared(name, self.epoch(name, behind), 1, "reset")])

    @rule(name=names, stored=runs | st.just([]), victims=st.integers(0, 3), wrong=st.booleans(), recent=st.booleans(),
          behind=back, based=st.none() | back)  # fmt: skip
    def place(
        self, name: str, stored: list[int], victims: int, wrong: bool, recent: bool, behind: int, based: int | None
    ) -> None:
        node = self.naive.nodes.get(name)
        # The blocks used last are those that running requests protect.
        order = (node.order[::-1] if recent else node.order) if node else []
        evicted = [block for block in order if wrong or block not in stored][:victims] + (
            [99] if wrong and victims else []
        )
        event = types.BlocksPlaced(name, self.epoch(name, behind), pack_hashes(stored), pack_hashes(evicted))
        based_on = None if based is None else max(0, len(self.messages) - based)
        self.put(f"cache.{SUBJECTS[name]}", [event], based_on=based_on)

    @rule(name=names, run=runs)
    def evict_under_a_request(self, name: str, run: list[int]) -> None:
        """Place, route there, and try to evict what the request uses."""
        epoch, packed = self.epoch(name, 0), pack_hashes(run)
        self.put(f"cache.{SUBJECTS[name]}", [types.BlocksPlaced(name, epoch, packed)])
        self.put("access.w", [types.RequestRouted("u", "m", name, 0, len(run), 99, packed)])
        self.put(f"cache.{SUBJECTS[name]}", [types.BlocksPlaced(name, epoch, b"", packed[:8])])

    @rule(model=models, session=st.sampled_from(["s", "t"]), name=names, ended=st.booleans())
    def session(self, model: str, session: str, name: str, ended: bool) -> None:
        event = types.SessionEnded(session, model) if ended else types.SessionAssigned(session, model, name)
        self.put(f"session.{SUBJECTS[model]}", [event])

    @rule(request=st.sampled_from(["q", "r", "s"]), name=names, run=runs, match=st.integers(0, 2), model=models)
    def route(self, request: str, name: str, run: list[int], match: int, model: str) -> None:
        event = types.RequestRouted(
            request, model, name, min(match, len(run)), len(run), len(run) * 16 + 3, pack_hashes(run), session="s"
        )
        self.put("access.w", [event, types.RequestCompleted("nobody", name)])

    @rule(request=st.sampled_from(["q", "r", "s"]), name=names)
    def complete(self, request: str, name: str) -> None:
        self.put("access.w", [types.RequestCompleted(request, name, prompt_tokens=3)])

    @rule(name=names, run=runs, repeat=st.booleans())
    def counted(self, name: str, run: list[int], repeat: bool) -> None:
        """A writer with a counter; now and then it repeats itself, as a retry beyond the server's window does."""
        if not repeat:
            self.counter += 1
        event = types.BlocksRemoved(name, self.epoch(name, 0), 1, pack_hashes(run))
        self.put(f"cache.{SUBJECTS[name]}", [event], writer="w", counter=max(1, self.counter))

    @rule(policy=st.sampled_from(["ttft", "cascade"]))
    def set_policy(self, policy: str) -> None:
        self.put("control", [types.PolicyChanged(policy, {"x": 1.5})])

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        """Redelivery and reordering: what is at or below the sequence changes nothing."""
        message = data.draw(st.sampled_from(self.messages))
        before = digest(self.state)
        assert self.state.apply(message).skipped == "redelivered"
        assert digest(self.state) == before

    @rule(name=names, other=names, junk=st.binary(max_size=40), which=st.integers(0, 6))
    def bad(self, name: str, other: str, junk: bytes, which: int) -> None:
        subject = f"kv.f.cache.{SUBJECTS[name]}"
        removed = types.BlocksRemoved(name, self.epoch(name, 0), 1, pack_hashes([1]))
        good = codec.encode([removed])
        if which == 0:
            self.put_bad(subject, b"\xc1" + junk, "undecodable")
        elif which == 1:
            self.put_bad(subject, good[:-8] + junk[:7], "undecodable")
        elif which == 2 and name != other:
            self.put_bad(f"kv.f.cache.{SUBJECTS[other]}", good, "wrong_subject")
        elif which == 3:
            self.put_bad(subject, codec.encode([types.NodeCordoned(name)]), "unknown_type")
        elif which == 4:
            self.put_bad(subject, good, "checksum", {codec.CRC32: "00000000"})
        elif which == 5:
            self.put_bad("kv.g.cache.a", good, "foreign_subject")
        elif which == 6:
            self.put_bad(subject, good, "bad_header", {codec.WRITER: "w", codec.WRITER_SEQ: "-1"})

    @invariant()
    def says_the_same(self) -> None:
        state, naive = self.state, self.naive
        assert {name: (n.lost is not None, n.cordoned, n.epoch, n.changed) for name, n in state.nodes.items()} == {
            name: (n.lost, n.cordoned, n.epoch, n.changed) for name, n in naive.nodes.items()
        }
        for name, node in state.nodes.items():
            index = state.caches.index(node.model)
            held = {tier: set(index.held(slot)) for tier, slot in node.slots.items()}
            expected = naive.nodes[name].tiers
            assert {tier: blocks for tier, blocks in held.items() if blocks} == {t: b for t, b in expected.items() if b}
            assert all(index.count(slot) == len(held[tier]) for tier, slot in node.slots.items())
            if node.managed:
                assert len(held["gpu"]) <= node.registered.capacity_blocks["gpu"]
                if node.lost is None:
                    assert list(state.recency[name].order) == naive.nodes[name].order
        assert {key: s.node for key, s in state.sessions.items()} == naive.sessions
        running = {request: active.node for request, active in state.load.running.items()}
        assert running == {request: where for request, (where, _) in naive.running.items()}
        for name in state.load.ordinal:
            load = state.load.of(name)
            assert load is not None
            assert load.active == sum(where == name for where, _ in naive.running.values())
        assert state.skipped == naive.skipped
        assert state.policy == naive.policy

    @invariant()
    def matches_the_same(self) -> None:
        for node in self.state.nodes.values():
            index = self.state.caches.index(node.model)
            held = self.naive.nodes[node.name].tiers.get("gpu", set())
            for chain in CHAINS:
                length = next((at for at, block in enumerate(chain) if block not in held), len(chain))
                assert index.match(pack_hashes(chain))[node.slots["gpu"]] == length

    def teardown(self) -> None:
        """From zero again, on another replica: the same state, to the bit."""
        again = FleetState("f")
        for message in self.messages:
            again.apply(message)
        assert digest(again) == digest(self.state)
        if self.messages:
            assert digest(FleetState("f")) != digest(self.state)
