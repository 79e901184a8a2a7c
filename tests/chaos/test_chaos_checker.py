"""The checker of chaos finds what is planted: a story without a fault, and one that breaks each rule."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections.fleet import FleetState
from kvplane.projections.sessions import Sessions
from tests.chaos.checker import TAIL_SECONDS, TROUBLE_SECONDS, Checker
from tests.chaos.ledger import Ledger
from tests.support.fold_given import Given, registered
from tests.support.naive_fold import Naive, blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from kvplane.events.codec import Message

KILLED_AT = 50.0


class Story:
    """A log and the ledger that goes with it, written side by side."""

    def __init__(self) -> None:
        self.given = Given()
        self.ledger = Ledger()
        self.counters: dict[tuple[str, str], int] = {}
        self.node(registered("a", mode="managed", capacity=8))
        self.node(registered("b"))
        for block in range(1, 4):
            self.acked("b", types.BlocksStored("b", 2, block, pack_hashes([block])))
        self.group(0, 1, 2)
        self.group(3, 4)
        self.flushed(5)
        self.placed("a", [1, 2, 3], [])
        self.placed("a", [4], [1])
        for number in range(1, 4):
            self.routed(f"router-1.{number:x}", "b")
        self.answered("cordon", "b", types.NodeCordoned("b"))
        self.routed("router-2.1", "a")
        self.answered("uncordon", "b", types.NodeUncordoned("b"))
        self.coordinate("node", "b", types.NodeLost("b", "silent"))
        self.coordinate("node", "b", types.NodeRecovered("b"))
        self.coordinate("session", "m", types.SessionAssigned("s", "m", "a"))
        self.answered("end", "", types.SessionEnded("s", "m", ""), topic="session", name="m", session="s", model="m")
        self.answered("policy", "", types.PolicyChanged("cascade"), topic="control", policy="cascade")
        self.coordinate("session", "m", types.SessionAssigned("t", "m", "b"))

    @property
    def last(self) -> int:
        return len(self.given.messages)

    def put(self, topic: Any, name: str, *events: types.Event, writer: str, counter: int = 0) -> int:
        key = (f"{topic}.{name}", writer)
        self.counters[key] = counter or self.counters.get(key, 0) + 1
        self.given.put(topic, name, *events, writer=writer, counter=self.counters[key])
        return self.last

    def coordinate(self, topic: Any, name: str, event: types.Event) -> int:
        return self.put(topic, name, event, writer="coordinator-1")

    def answered(
        self, action: str, node: str, event: types.Event, *, topic: Any = "node", name: str = "", **more: Any
    ) -> None:  # fmt: skip
        sequence = self.coordinate(topic, "" if topic == "control" else name or node, event)
        self.ledger.note("answered", action=action, node=node, sequence=sequence, changed=True, **more)

    def node(self, event: types.NodeRegistered) -> None:
        self.answered("register", event.node, event)

    def placed(self, node: str, stored: list[int], evicted: list[int]) -> None:
        packed, left = pack_hashes(stored), pack_hashes(evicted)
        event = types.BlocksPlaced(node, self.given.state.nodes[node].epoch, packed, left)
        self.answered("admit", node, event, topic="cache", stored=packed.hex(), evicted=left.hex())

    def acked(self, node: str, event: types.Event, *, writer: str = "load-1") -> None:
        sequence = self.put("cache", node, event, writer=writer)
        crc = (self.given.messages[-1].headers or {})["Kv-Crc32"]
        same = {"writer": writer, "subject": f"kv.f.cache.{node}", "counter": self.counters[f"cache.{node}", writer]}
        self.ledger.note("tried", **same, crc=crc)
        self.ledger.note("acked", **same, sequence=sequence)

    def group(self, *batches: int) -> None:
        self.put("cache", "g", *[types.CacheCleared("g", 1, batch) for batch in batches], writer="group-1")

    def flushed(self, events: int) -> None:
        self.ledger.note("flushed", writer="group-1", subject="kv.f.cache.g", events=events)

    def routed(
        self, request: str, node: str, *, model: str = "m", applied: int = 0, recorded: bool = True, answered: str = "",
        exclude: Sequence[str] = (), at: float = 0.0,
    ) -> None:  # fmt: skip
        applied = applied or self.last
        if recorded:
            writer = request.partition(".")[0]
            event = types.RequestRouted(request, model, node, 0, 0, 9, applied=applied, exclude=list(exclude))
            self.put("access", writer, event, writer=writer)
        self.ledger.note(
            "routed", request=request, node=answered or node, model=model, applied=applied, degraded=False,
            exclude=list(exclude),
        )  # fmt: skip
        self.ledger.entries[-1]["at"] = at

    def killed(self, writer: str, how: str = "killed") -> None:
        self.ledger.note(
            "end", process="router", number=1, how=how, code=-9, ready=True, writer=writer, began=KILLED_AT
        )  # fmt: skip

    def trouble(self, begin: float, end: float) -> None:
        self.ledger.note("fault", what="pause", on=["nats-1"], began=begin)
        self.ledger.entries[-1]["at"] = end

    def entry(self, kind: str, at: int = -1) -> dict[str, Any]:
        return self.ledger.of(kind)[at]

    def broken(self) -> set[str]:
        """Rules that the checker finds broken."""
        return found(self.given.messages, self.ledger)


def found(messages: Sequence[Message], ledger: Ledger) -> set[str]:
    checker = Checker("f")
    for message in messages:
        checker.feed(message)
    return {violation.rule for violation in checker.judge(ledger)}


def lost_commit(story: Story) -> None:
    same = {"writer": "load-1", "subject": "kv.f.cache.b", "counter": 4}
    story.ledger.note("tried", **same, crc="0")
    story.ledger.note("acked", **same, sequence=story.last)


def moved_commit(story: Story) -> None:
    story.entry("acked")["sequence"] += 1


def changed_commit(story: Story) -> None:
    story.entry("tried")["crc"] = "00000000"


def lost_event(story: Story) -> None:
    story.flushed(6)


def events_out_of_order(story: Story) -> None:
    story.group(6)


def event_twice(story: Story) -> None:
    story.group(4)


def counter_with_a_hole(story: Story) -> None:
    story.put("cache", "g", types.CacheCleared("g", 1, 5), writer="group-1", counter=4)


def counter_with_a_hole_of_an_appender(story: Story) -> None:
    story.put("cache", "b", types.CacheCleared("b", 2, 5), writer="load-1", counter=6)


def answer_not_there(story: Story) -> None:
    story.entry("answered")["sequence"] = story.last


def answer_undone(story: Story) -> None:
    # Cordoned twice: the second one changes nothing, but was answered as a change.
    story.answered("cordon", "b", types.NodeCordoned("b"))
    story.answered("cordon", "b", types.NodeCordoned("b"))


def answer_with_other_victims(story: Story) -> None:
    story.placed("a", [5], [2])
    story.entry("answered")["evicted"] = pack_hashes([3]).hex()


def answer_about_another_node(story: Story) -> None:
    story.entry("answered", 0)["node"] = "z"


def answer_about_another_session(story: Story) -> None:
    next(entry for entry in story.ledger.of("answered") if entry["action"] == "end")["session"] = "z"


def answer_with_another_node(story: Story) -> None:
    story.routed("router-1.4", "b", answered="a")


def sent_to_a_stranger(story: Story) -> None:
    story.routed("router-1.4", "z")


def sent_to_a_cordoned_node(story: Story) -> None:
    story.coordinate("node", "b", types.NodeCordoned("b"))
    story.routed("router-1.4", "b")


def sent_to_a_lost_node(story: Story) -> None:
    story.coordinate("node", "b", types.NodeLost("b", ""))
    story.routed("router-1.4", "b")


def sent_to_a_removed_node_and_not_recorded(story: Story) -> None:
    story.coordinate("node", "b", types.NodeRemoved("b", ""))
    story.routed("router-3.1", "b", recorded=False, at=KILLED_AT)
    story.killed("router-3")


def sent_to_another_model(story: Story) -> None:
    story.routed("router-1.4", "b", model="other")


def sent_to_an_excluded_node(story: Story) -> None:
    story.routed("router-1.4", "b", exclude=["b"])


def decided_twice(story: Story) -> None:
    event = types.RequestRouted("router-1.3", "m", "b", 0, 0, 9, applied=story.last)
    story.put("access", "router-1", event, writer="router-1")


def unrecorded_by_a_live_router(story: Story) -> None:
    story.routed("router-1.4", "b", recorded=False)


def unrecorded_before_the_last(story: Story) -> None:
    story.routed("router-1.4", "b", recorded=False, at=KILLED_AT)
    story.routed("router-1.5", "b", at=KILLED_AT)
    story.killed("router-1")


def unrecorded_long_before_the_kill(story: Story) -> None:
    story.routed("router-1.4", "b", recorded=False, at=KILLED_AT - TAIL_SECONDS - 1)
    story.killed("router-1")


def unrecorded_though_the_trouble_was_over(story: Story) -> None:
    story.trouble(10, 12)
    story.routed("router-1.4", "b", recorded=False, at=11)
    story.killed("router-1")


def unrecorded_by_one_that_stopped(story: Story) -> None:
    story.routed("router-1.4", "b", recorded=False, at=KILLED_AT)
    story.killed("router-1", "stopped")


def more_unrecorded_than_counted(story: Story) -> None:
    story.ledger.note("unrecorded", writer="router-1", events=1)
    story.routed("router-1.4", "b", recorded=False)
    story.routed("router-1.5", "b", recorded=False)


def concluded_twice(story: Story) -> None:
    story.coordinate("node", "b", types.NodeLost("b", ""))
    story.coordinate("node", "b", types.NodeLost("b", ""))


def gap(story: Story) -> None:
    del story.given.messages[5]


PLANTED: list[tuple[Callable[[Story], None], str]] = [
    (lost_commit, "nothing lost"), (moved_commit, "nothing lost"), (lost_event, "nothing lost"),
    (changed_commit, "unchanged"), (events_out_of_order, "once"), (event_twice, "once"), (decided_twice, "once"),
    (counter_with_a_hole, "no hole"), (counter_with_a_hole_of_an_appender, "no hole"),
    (answer_not_there, "answers hold"), (answer_undone, "answers hold"), (answer_with_other_victims, "answers hold"),
    (answer_about_another_node, "answers hold"), (answer_about_another_session, "answers hold"),
    (answer_with_another_node, "answers hold"), (sent_to_a_stranger, "routed well"),
    (sent_to_a_cordoned_node, "routed well"), (sent_to_a_lost_node, "routed well"),
    (sent_to_a_removed_node_and_not_recorded, "routed well"), (sent_to_another_model, "routed well"),
    (sent_to_an_excluded_node, "routed well"), (unrecorded_by_a_live_router, "routes recorded"),
    (unrecorded_before_the_last, "routes recorded"), (unrecorded_long_before_the_kill, "routes recorded"),
    (unrecorded_though_the_trouble_was_over, "routes recorded"), (unrecorded_by_one_that_stopped, "routes recorded"),
    (more_unrecorded_than_counted, "routes recorded"), (concluded_twice, "concluded once"), (gap, "no gap"),
]  # fmt: skip


def test_a_story_without_a_fault_breaks_no_rule() -> None:
    assert Story().broken() == set()


@pytest.mark.parametrize(("plant", "rule"), PLANTED, ids=lambda part: getattr(part, "__name__", None))
def test_what_is_planted_is_found(plant: Callable[[Story], None], rule: str) -> None:
    story = Story()
    plant(story)
    assert rule in story.broken()


def young_tail(story: Story) -> None:
    story.routed("router-1.4", "b", recorded=False, at=KILLED_AT - TAIL_SECONDS / 2)
    story.killed("router-1")


def tail_in_trouble(story: Story) -> None:
    story.trouble(KILLED_AT - 20, KILLED_AT - TROUBLE_SECONDS / 2)
    story.routed("router-1.4", "b", recorded=False, at=KILLED_AT - 15)
    story.killed("router-1")


def counted(story: Story) -> None:
    story.ledger.note("unrecorded", writer="router-1", events=1)
    story.routed("router-1.4", "b", recorded=False)


def given_up(story: Story) -> None:
    story.ledger.note("given_up", writer="load-1", subject="kv.f.cache.b", counter=4)
    story.put("cache", "b", types.CacheCleared("b", 2, 5), writer="load-1", counter=5)


def copied(story: Story) -> None:
    before = story.given.messages[2]
    story.given.raw(before.subject, before.body, dict(before.headers or {}))


def sent_before_it_was_known(story: Story) -> None:
    known = story.last
    story.coordinate("node", "b", types.NodeRemoved("b", ""))
    story.routed("router-1.4", "b", applied=known)


@pytest.mark.parametrize("legal", [young_tail, tail_in_trouble, counted, given_up, copied, sent_before_it_was_known])
def test_what_is_legal_is_not_found(legal: Callable[[Story], None]) -> None:
    story = Story()
    legal(story)
    assert story.broken() == set()


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """Folds with a defect, for the length of a block."""

    @contextmanager
    def patched(*changes: tuple[type, str, object]) -> Iterator[None]:
        with monkeypatch.context() as context:
            for owner, name, instead in changes:
                context.setattr(owner, name, instead)
            yield

    return patched


def test_a_fold_that_counts_a_commit_twice_is_found(folding: Any) -> None:
    story = Story()
    copied(story)
    with folding((FleetState, "_check_writer", lambda *_: None)):
        assert {"once", "folds agree"} <= story.broken()


def test_a_fold_that_takes_old_news_is_found(folding: Any) -> None:
    story = Story()
    story.given.put("node", "b", types.NodeCordoned("b"), based_on=1)
    with folding((FleetState, "_check_based_on", lambda *_: None)):
        assert "folds agree" in story.broken()


def test_a_fold_that_raises_is_found(folding: Any) -> None:
    def fails(*_: object) -> None:
        raise LookupError

    with folding((FleetState, "_cordoned", fails)):
        assert "no defect" in Story().broken()


def test_more_blocks_than_there_is_room_are_found(folding: Any) -> None:
    def generous(_: object, __: int, ___: str, node: Any, event: Any) -> None:
        node.tiers.setdefault("gpu", set()).update(blocks_of(event.stored))

    story = Story()
    story.given.places("a", *range(20, 30))
    assert "capacity" not in story.broken()
    with folding((Naive, "_placed", generous)):
        assert "capacity" in story.broken()


def test_sessions_that_stay_with_the_dead_are_found(folding: Any) -> None:
    story = Story()
    story.coordinate("node", "b", types.NodeLost("b", ""))
    with folding((Sessions, "node_gone", lambda *_: 0)):
        assert "sessions" in story.broken()
