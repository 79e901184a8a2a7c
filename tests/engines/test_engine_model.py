"""Whatever is lost and whoever restarts: at rest the fleet knows of no block that the engine doesn't hold.

The adapter's pure half against a model of an engine, its sockets and the log. Where nothing was beyond the replay buffer the
two are equal; what may be missing is what had several copies when only the log remembered it (copies are not on the log).
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvplane.events import codec
from kvplane.events.hashing import pack_hashes
from kvplane.services.engines.sequence import Track, Verdict
from kvplane.services.engines.translate import Translator
from kvplane.services.protocol.remembered import Remembered
from kvplane.services.roles.memory import Memory
from tests.support.naive_engine import NaiveEngine
from tests.support.one_node_fold import Folded

SIZE = 4
# Short prompts of few kinds, so that they share prefixes and push each other out.
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(
    lambda parts: [part for part in parts for _ in range(SIZE)]
)

REQUESTS = st.tuples(PROMPTS, st.sampled_from(["", "", "s"]), st.booleans())


class Engines(RuleBasedStateMachine):
    @initialize(
        buffer=st.sampled_from([2, 5, 1000]), dialect=st.sampled_from(["maps", "arrays", "map_batch"]),
        names=st.sampled_from(["int", "bytes", "same"]), has_start_time=st.booleans(),
    )  # fmt: skip
    def begin(self, buffer: int, dialect: str, names: str, has_start_time: bool) -> None:
        self.options: Any = {"buffer": buffer, "dialect": dialect, "names": names, "capacity": 5, "size": SIZE}
        self.has_start_time = has_start_time
        self.engine = NaiveEngine(0, **self.options)
        self.connections = 1
        self.inbox: list[tuple[int, bytes]] = []
        self.log: list[codec.Commit] = []
        self.folded = Folded(block_size=SIZE)
        self.uncertain: set[int] = set()
        """Blocks that the fleet need not know of although the engine holds them."""
        self.holed = False
        self.blind = False
        """Something was beyond the replay buffer in this life of the engine."""
        self.away = False
        self.behind = False
        self.start_adapter()

    def start_adapter(self) -> None:
        self.track = Track(Translator("a", SIZE, {"gpu": self.options["capacity"]}))
        self.inbox = []
        self.connections_seen = 0
        epoch = self.folded.state.nodes["a"].epoch
        memory = Memory(epoch)
        for commit in self.log:
            memory.apply(commit)
        if memory.position is not None and self.life_known() and self.registered_life == self.engine.life:
            tiers = {tier: (pack_hashes(names.values()), list(names)) for tier, names in memory.engine_hashes().items()}
            before = Remembered(epoch=epoch, block_size=SIZE, labels={}, position=memory.position, tiers=tiers)
            self.track.restore(before, memory.position)
            if self.engine.sequence > len(self.engine.buffer):
                self.uncertain |= {block for block, copies in self.engine.copies().items() if copies > 1}
        self.look()
        self.register()

    def life_known(self) -> bool:
        return self.has_start_time and hasattr(self, "registered_life")

    def register(self) -> None:
        self.folded.register()
        self.track.translator.epoch = self.folded.state.nodes["a"].epoch
        self.registered_life = self.engine.life
        self.behind = False
        self.put(self.track.translator.report(self.track.position))

    def put(self, events: Any) -> None:
        if self.behind or not events:
            return
        if self.away:
            # More than can wait: the rest is reported anew when the log is back.
            self.behind = True
            return
        self.folded.put(events)
        self.log.append(codec.Commit(None, events, "", 0, None))  # type: ignore[arg-type]

    def look(self, missing: bool = False) -> None:  # noqa: FBT002
        connected = self.connections_seen != self.connections
        self.connections_seen = self.connections
        self.inbox = []
        same: bool | None = True
        if connected and hasattr(self, "registered_life"):
            same = self.registered_life == self.engine.life if self.has_start_time else None
        position = self.track.next is not None
        before = self.track.next or 0
        look = self.track.resync(self.engine.replay(self.track.ask_from), ended=True, same_life=same, missing=missing)
        first = self.engine.buffer[0][0] if self.engine.buffer else 0
        if look.verdict is Verdict.RESTARTED:
            self.track.restart()
            self.blind = first > 0 or self.holed
            self.uncertain = set()
            self.track.resync(self.engine.replay(0), ended=True, same_life=None)
            if self.track.translator.epoch:
                self.register()
        elif look.verdict is Verdict.GAP or not position:
            # Only where batches had left the buffer may anything be forgotten.
            assert look.verdict is Verdict.SAME or self.holed or first > max(0, before - 1)
            self.blind |= first > 0
            if self.track.translator.epoch:
                self.put([*self.track.cleared(look.reason), *self.track.translator.report(self.track.position)])
        elif self.track.translator.epoch:
            self.put(look.events)

    def drain(self) -> None:
        while self.inbox:
            if self.connections_seen != self.connections:
                self.look()
                continue
            number, payload = self.inbox.pop(0)
            events = self.track.live(number, payload)
            if events is not None:
                self.put(events)
            elif self.track.next is None or number > self.track.next:
                self.look(missing=True)
        if self.connections_seen != self.connections:
            self.look()

    @rule(asked=st.lists(REQUESTS, min_size=1, max_size=4), lost=st.sampled_from([False, False, True]))
    def traffic(self, asked: list[tuple[list[int], str, bool]], lost: bool) -> None:
        """A batch a request, received or lost."""
        for prompt, salt, twice in asked:
            self.engine.request(prompt, salt=salt, twice=twice)
            self.publish(lost=lost)

    @rule()
    def reset(self) -> None:
        self.engine.reset()

    @rule(prompt=PROMPTS)
    def batch_fails(self, prompt: list[int]) -> None:
        """The engine could not encode a batch: its number is used, and what it would have said is lost for ever."""
        self.engine.request(prompt)
        if self.engine.queue:
            self.engine.queue = []
            self.engine.sequence += 1
            self.blind = self.holed = True

    def publish(self, *, lost: bool) -> None:
        batch = self.engine.step()
        if batch is not None and not lost:
            self.inbox.append(batch)

    @rule()
    def hear(self) -> None:
        self.drain()

    @rule(published=st.integers(0, 6))
    def restart_engine(self, published: int) -> None:
        """Another life, whose first batches nobody hears."""
        self.engine = NaiveEngine(self.engine.life + 1, **self.options)
        self.connections += 1
        self.uncertain = set()
        self.blind = self.holed = False
        for number in range(published):
            self.engine.request([number % 3] * SIZE * (1 + number % 4))
            self.engine.step()

    @rule()
    def connection_breaks(self) -> None:
        self.connections += 1

    @rule()
    def restart_adapter(self) -> None:
        self.away = False
        self.start_adapter()

    @rule()
    def log_goes(self) -> None:
        self.away = True

    @precondition(lambda self: self.away)
    @rule()
    def log_comes(self) -> None:
        self.away = False
        if self.behind:
            self.behind = False
            self.put([*self.track.cleared("away"), *self.track.translator.report(self.track.position)])

    @rule()
    def node_is_lost(self) -> None:
        if not self.away:
            self.drain()
            self.register()

    def teardown(self) -> None:
        if hasattr(self, "track"):
            self.rest()

    @rule()
    def rest(self) -> None:
        """Everything arrives, the log is there, and the replay buffer is asked once more."""
        if self.holed:
            # A number that was used for nothing shows by the next one only.
            self.engine.request([self.engine.sequence + 10] * SIZE)
        self.publish(lost=False)
        if self.away:
            self.log_comes()
        self.drain()
        self.look()
        held, known = self.engine.held(), self.folded.held()
        assert known <= held
        if not self.blind:
            assert held - known <= self.uncertain
        self.uncertain -= known
        assert self.track.translator.held() == known

    @invariant()
    def the_map_is_bounded(self) -> None:
        if hasattr(self, "track"):
            assert self.track.translator.used() <= self.options["capacity"]


TestEngines = Engines.TestCase
TestEngines.settings = settings(max_examples=300, stateful_step_count=25, deadline=None)
