"""Decisions that are made again: of a simulated fleet's whole log, by any policy, and with a router that is not what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.projections.fleet import FleetState
from kvplane.services.routing import policies
from kvplane.services.routing.explain import Explanation, Past, PastHold
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.ttft import ttft
from kvplane.services.simulation.trace import work_of
from kvplane.services.simulation.workloads import GENERATED_BLOCK_SIZE, generate
from kvplane.services.simulation.world import FLEET, Change, Settings, World

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvplane.services.routing.roster import Column
    from kvplane.services.routing.view import Request, View

SETTINGS = Settings(
    nodes=4, capacity=300, block_size=GENERATED_BLOCK_SIZE, delay=0.05, routers=2, most_active=40,
    changes=(Change(12.0, "node-2", joins=False), Change(20.0, "node-9", joins=True)),
)  # fmt: skip


class Recorder(World):
    """A run that keeps its log."""

    log: list[Message]

    def _apply(
        self, visible: float, where: str, events: Sequence[types.Event], headers: dict[str, str] | None = None
    ) -> None:
        if not hasattr(self, "log"):
            self.log = []
        time = int((self.start + visible - self.settings.delay) * 10**9)
        self.log.append(Message(len(self.log) + 1, where, time, dict(headers or {}) or None, codec.encode(events)))
        super()._apply(visible, where, events, headers)


def recorded(settings: Settings, kind: str = "multi-turn", count: int = 250) -> list[Message]:
    work = [work_of(line, GENERATED_BLOCK_SIZE) for line in generate(kind, count, seed=3, rate=20)]
    world = Recorder(settings, work)
    outcome = world.run()
    assert len(outcome.served) + outcome.rejected == count
    return world.log


def decisions(log: Sequence[Message]) -> Iterator[tuple[str, types.RequestRouted]]:
    for message in log:
        commit = codec.decode(FLEET, message)
        for event in commit.events:
            if isinstance(event, types.RequestRouted):
                yield commit.place.name, event


def explained(log: Sequence[Message], router: str, upto: int) -> Explanation:
    """The decision number `upto` of a router, made again from the log's beginning."""
    *own, event = [event for name, event in decisions(log) if name == router][: upto + 1]
    past = Past(FleetState(FLEET), router, own, event)
    for message in log[: event.applied]:
        past.apply(message)
    return past.explain()


@pytest.mark.parametrize("policy", ["ttft", "blocks", "cascade", "e2", "session", "threshold", "round_robin"])
def test_every_decision_of_a_simulated_fleet_is_made_again_as_it_was(policy: str) -> None:
    log = recorded(replace(SETTINGS, policy=policy))
    for router in ("router-0", "router-1"):
        count = sum(name == router for name, _ in decisions(log))
        assert count > 50
        for number in [*range(0, count, 17), count - 1]:
            explanation = explained(log, router, number)
            assert explanation.differences == []
            assert explanation.policy == policy


@pytest.mark.parametrize("named", [True, False])
def test_decisions_of_a_closed_loop_are_made_again_by_what_conversations_need(named: bool) -> None:
    work = [
        replace(
            work_of(line, GENERATED_BLOCK_SIZE), session=line.session if named else "", delay=0.5 if named else None
        )
        for line in generate("multi-turn", 200, seed=3, rate=20)
    ]
    world = Recorder(SETTINGS, work)
    world.run()
    count = sum(name == "router-0" for name, _ in decisions(world.log))
    explanations = [explained(world.log, "router-0", number) for number in range(3, count, 9)]
    assert [each.differences for each in explanations] == [[]] * len(explanations)
    weights = [weight for each in explanations for weight in each.candidates if weight.cost is not None]
    assert any(weight.terms["contexts"] > 0 and weight.terms["evicted"] > 0 for weight in weights)
    for weight in weights:
        assert sum(weight.terms.values()) == pytest.approx(weight.cost, rel=1e-9, abs=1e-12)


def test_decisions_of_a_closed_loop_with_holds_are_made_again_and_so_are_the_holds() -> None:
    work = [
        replace(work_of(line, GENERATED_BLOCK_SIZE), session=line.session, delay=0.5)
        for line in generate("multi-turn", 80, seed=3, rate=20)
    ]
    parameters = {"hold": 1.0, "hold_seconds": 300.0}
    world = Recorder(replace(SETTINGS, nodes=2, capacity=200, most_active=0, changes=(), parameters=parameters), work)
    outcome = world.run()
    assert len(outcome.served) + outcome.rejected == 80
    # Some are let in since others have ended, none beyond the bound.
    assert len(outcome.waited) > 10
    assert max(outcome.waited) <= 301
    for router in ("router-0", "router-1"):
        own = [event for name, event in decisions(world.log) if name == router]
        assert [explained(world.log, router, number).differences for number in range(len(own))] == [[]] * len(own)
    holds = [
        (commit.place.name, event)
        for commit in (codec.decode(FLEET, message) for message in world.log)
        for event in commit.events
        if isinstance(event, types.RequestHeld) and event.hashes
    ]
    assert len(holds) == len(outcome.waited)
    for router, held in holds:
        before = [event for name, event in decisions(world.log) if name == router and event.decided <= held.decided]
        past = PastHold(FleetState(FLEET), router, before, held)
        for message in world.log[: held.applied]:
            past.apply(message)
        assert past.differences() == []


def test_what_the_router_knew_beyond_the_log_is_made_again_as_well() -> None:
    """Requests come faster than the log: without the overlay other nodes would be chosen."""
    log = recorded(replace(SETTINGS, delay=0.5), count=120)
    explanations = [explained(log, "router-0", number) for number in range(50)]
    assert [each.differences for each in explanations] == [[]] * 50
    weights = [weight for each in explanations for weight in each.candidates]
    assert any(weight.on_the_way for weight in weights)
    assert any(weight.match > weight.match_on_log for weight in weights)
    own = [event for name, event in decisions(log) if name == "router-0"]
    forgetful = [Past(FleetState(FLEET), "router-0", [], event) for event in own[:50]]
    for past in forgetful:
        for message in log[: past.event.applied]:
            past.apply(message)
    assert any(past.explain().differences for past in forgetful)


def test_what_was_evicted_after_it_was_predicted_is_not_promised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are small here. A router that went by what it had predicted all the same is found out."""
    small = replace(SETTINGS, capacity=130)
    numbers = range(1, 70, 3)
    log = recorded(small, count=150)
    assert [explained(log, "router-0", number).differences for number in numbers] == [[]] * len(numbers)
    with monkeypatch.context() as former:
        former.setattr(Overlay, "_removed", lambda *_: None)
        log = recorded(small, count=150)
    differing = [each for number in numbers if (each := explained(log, "router-0", number).differences)]
    assert 0 < len(differing) < len(numbers) / 2
    for each in differing:
        assert any(one.what.startswith("match of ") and one.recorded > one.recomputed for one in each)


@pytest.mark.parametrize("policy", ["ttft", "blocks"])
def test_the_terms_of_a_cost_sum_up_to_it(policy: str) -> None:
    log = recorded(replace(SETTINGS, policy=policy), count=150)
    weights = [
        weight
        for number in range(20, 60, 7)
        for weight in explained(log, "router-1", number).candidates
        if weight.cost is not None
    ]
    assert len(weights) > 10
    for weight in weights:
        assert sum(weight.terms.values()) == pytest.approx(weight.cost, rel=1e-9, abs=1e-12)


def test_a_policy_that_was_changed_since_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log = recorded(SETTINGS, count=150)
    right = policies.POLICIES["ttft"]

    def planted(view: View, request: Request, parameters: dict[str, float]) -> Column:
        costs = ttft(view, request, parameters)
        costs -= view.match * 0.5
        return costs

    monkeypatch.setitem(policies.POLICIES, "ttft", right._replace(score=planted))
    found = [explained(log, "router-0", number).differences for number in range(30, 60)]
    differing = [each for each in found if each]
    assert differing
    assert any(difference.what == "node" for each in differing for difference in each)
    assert all(any(difference.what.startswith("cost of ") for difference in each) for each in differing)


def test_nodes_that_may_not_be_chosen_have_no_cost_and_the_longest_match_leaves_them_out() -> None:
    log = recorded(replace(SETTINGS, most_active=3), count=200)
    full = [
        weight
        for number in range(0, 80, 9)
        for weight in explained(log, "router-0", number).candidates
        if weight.cost is None
    ]
    assert full
    assert all(weight.active >= 3 for weight in full)
    for _, event in decisions(log):
        assert event.best >= event.match
