"""The table of an adapter's states against what it stands for, said without it: flags, and an epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.engines.life import (
    PATIENCE_SECONDS,
    SETTLE_SECONDS,
    TRANSITIONS,
    Event,
    Health,
    Life,
    Looks,
    State,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Flags:
    """The same, naively: what happened, and what is to be done about it."""

    epoch: bool = False
    """The fleet is told of the engine's life."""
    wanted: bool = True
    """A registration is to be sent."""
    asking: bool = False
    stale: bool = False
    """The facts are of an earlier life of the engine."""
    ended: bool = False

    def may(self, event: Event) -> bool:
        """Whether it can happen: what the adapter does itself, it does one at a time."""
        if event is Event.REGISTERED:
            return self.asking
        if event is Event.ASKING:
            return self.wanted and not (self.asking or self.stale or self.ended)
        if event is Event.REFRESHED:
            return self.stale and not (self.asking or self.ended)
        return event is not Event.RESTARTED or not self.asking

    def after(self, event: Event) -> Flags:
        if event is Event.ASKING:
            return replace(self, asking=True, wanted=False)
        if event is Event.REGISTERED:
            return replace(self, asking=False, epoch=True)
        if event is Event.FORGOTTEN:
            return replace(self, wanted=self.wanted or self.epoch)
        if event is Event.DISOWNED:
            return replace(self, ended=self.ended or self.epoch)
        if event is Event.RESTARTED:
            return replace(self, epoch=False, stale=True, wanted=True)
        return replace(self, stale=False)


def compare(life: Life, flags: Flags) -> None:
    assert (life.state is State.ENDED) == flags.ended
    if not flags.ended:
        assert life.reporting == flags.epoch
        assert (life.state is State.REBORN) == flags.stale
        assert (life.state is State.MEMBER) == (flags.epoch and not flags.wanted and not flags.asking)
        if not flags.asking:
            assert life.must_register == flags.wanted


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_the_table_says_what_the_flags_say(events: list[Event]) -> None:
    life, flags = Life(), Flags()
    for event in events:
        if flags.may(event):
            life.on(event)
            flags = flags.after(event)
            compare(life, flags)


def reached() -> Iterator[tuple[State, Event]]:
    """All that can happen, from the beginning on."""
    todo, seen = [(State.JOINING, Flags())], set()
    while todo:
        state, flags = todo.pop()
        if (state, flags) in seen:
            continue
        seen.add((state, flags))
        for event in Event:
            if flags.may(event):
                yield state, event
                todo.append((TRANSITIONS[state][event], flags.after(event)))


def test_the_table_has_all_that_can_happen_and_nothing_else() -> None:
    assert set(reached()) == {(state, event) for state, row in TRANSITIONS.items() for event in row}


def test_a_busy_engine_is_well_for_a_while_and_one_that_says_no_is_not() -> None:
    health = Health()
    assert not health.well(5)
    health.answered(5, well=True)
    health.answered(6, well=None)
    assert health.well(5 + PATIENCE_SECONDS - 0.1)
    assert not health.well(5 + PATIENCE_SECONDS)
    health.answered(20, well=True)
    health.answered(21, well=False)
    assert not health.well(21)


def test_another_beginning_is_suspicious_only_if_both_are_known() -> None:
    for began, known, suspect in (("1", "1", False), ("", "1", False), ("1", "", False), ("1", "2", True)):
        health = Health()
        health.began(began, known)
        health.began("", "")
        assert health.suspect is suspect


def test_it_is_looked_when_idle_and_soon_after_a_connection() -> None:
    looks = Looks(15)
    assert looks.next == 0
    assert not looks.begin(100, 0)
    assert looks.next == 115
    assert looks.begin(101, 1)
    assert looks.next == 101 + SETTLE_SECONDS
    assert not looks.begin(102, 1)
    assert looks.next == 117
