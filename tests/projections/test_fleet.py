"""The rules of the fold, one by one: what a commit changes, what it must not, and by which word it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes
from kvplane.projections import skips
from kvplane.projections.digest import digest
from kvplane.projections.load import ACTIVE_SECONDS, NodeLoad
from kvplane.projections.sessions import Session
from tests.support.fold_given import SECOND, Given, registered, replayed, two_nodes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplane.projections.fleet import FleetState


@pytest.fixture
def two() -> Given:
    return two_nodes()


@pytest.fixture
def managed() -> Given:
    """One managed node with room for four blocks, which holds two."""
    given = Given()
    given.node(registered("a", mode="managed", capacity=4))
    given.places("a", 1, 2)
    return given


def load(given: Given, node: str) -> NodeLoad:
    found = given.state.load.of(node)
    assert found is not None
    return found


def refused_without_a_trace(given: Given, reason: str, act: Callable[[], str | None]) -> None:
    """A refusal counts itself and changes nothing else."""
    before = facts(given.state)
    times = given.state.skipped.get(reason, 0)
    assert act() == reason
    assert facts(given.state) == before
    assert given.state.skipped[reason] == times + 1
    assert reason in {**skips.REASONS, **codec.REASONS}


def facts(state: FleetState) -> dict[str, Any]:
    """What the state says of the fleet, without its counters of messages."""
    return {
        "nodes": {name: (n.registered, n.epoch, n.changed, n.lost, n.cordoned) for name, n in state.nodes.items()},
        "blocks": {
            (name, tier): set(state.caches.index(node.model).held(slot))
            for name, node in state.nodes.items()
            for tier, slot in node.slots.items()
        },
        "sessions": [(key, s.node, s.since, s.was) for key, s in state.sessions.items()],
        "running": dict(state.load.running),
        "load": {name: state.load.of(name) for name in state.nodes},
        "recency": {name: (list(r.order), dict(r.protected)) for name, r in state.recency.items()},
        "policy": (state.policy, dict(state.parameters)),
        "commits": state.commits,
    }


@pytest.mark.parametrize("kind", [types.NodeCordoned, types.NodeLost, types.NodeRemoved])
def test_a_change_of_a_stranger_is_refused(two: Given, kind: type[types.Event]) -> None:
    refused_without_a_trace(two, "unknown_node", lambda: two.change(kind, "c"))
    refused_without_a_trace(two, "unknown_node", lambda: two.stores("c", 1, epoch=1))


def test_a_change_to_what_already_is_is_refused(two: Given) -> None:
    for kind in (types.NodeUncordoned, types.NodeRecovered):
        refused_without_a_trace(two, "no_change", lambda kind=kind: two.change(kind, "a"))  # type: ignore[misc]
    for again in (types.NodeCordoned, types.NodeLost):
        assert two.change(again, "a") is None
        refused_without_a_trace(two, "no_change", lambda again=again: two.change(again, "a"))  # type: ignore[misc]


def test_a_name_of_a_model_has_one_block_size(two: Given) -> None:
    other = registered("c", size=32)
    refused_without_a_trace(two, "block_size", lambda: two.put("node", "c", other))
    alias = registered("c", models=["n", "m"], size=32)
    refused_without_a_trace(two, "block_size", lambda: two.put("node", "c", alias))
    assert two.put("node", "c", registered("c", models=["n"], size=32)) is None


def test_the_last_node_of_a_model_may_come_back_with_another_block_size(two: Given) -> None:
    two.change(types.NodeRemoved, "b")
    assert two.put("node", "a", registered("a", size=32)) is None


def test_a_lost_node_still_binds_the_block_size_of_its_model(two: Given) -> None:
    two.change(types.NodeRemoved, "b")
    two.change(types.NodeLost, "a")
    assert two.put("node", "c", registered("c", size=32)) == "block_size"


def test_an_event_of_an_earlier_or_a_later_life_is_refused(two: Given) -> None:
    epoch = two.state.nodes["a"].epoch
    two.node(registered("a"))
    for wrong in (epoch, two.state.nodes["a"].epoch + 1, 0):
        refused_without_a_trace(two, "stale_epoch", lambda wrong=wrong: two.stores("a", 9, epoch=wrong))  # type: ignore[misc]


def test_one_event_of_an_earlier_life_spoils_its_whole_commit(two: Given) -> None:
    epoch = two.state.nodes["a"].epoch
    events = [types.BlocksRemoved("a", epoch + n, 1, pack_hashes([1])) for n in (0, 1)]
    refused_without_a_trace(two, "stale_epoch", lambda: two.put("cache", "a", *events))


def test_caches_take_only_events_of_their_kind(two: Given, managed: Given) -> None:
    refused_without_a_trace(two, "wrong_mode", lambda: two.places("a", 9))
    refused_without_a_trace(managed, "wrong_mode", lambda: managed.stores("a", 9))
    refused_without_a_trace(managed, "wrong_mode", lambda: managed.drops("a", 1))


@pytest.mark.parametrize("kind", [types.NodeLost, types.NodeRemoved, types.NodeRegistered])
def test_the_end_of_a_life_takes_that_nodes_blocks_and_no_others(two: Given, kind: Any) -> None:
    two.stores("a", 7, tier="cpu")
    two.routes("q", "a", 1)
    two.routes("r", "b", 1)
    event = registered("a") if kind is types.NodeRegistered else kind("a")
    assert two.put("node", "a", event) is None
    assert two.held("b") == {1, 2, 3}
    assert two.matches("b", 1, 2, 3) == 3
    assert list(two.state.load.running) == ["r"]
    assert two.state.caches.index("m").block_copies == 3
    if kind is not types.NodeRemoved:
        assert two.held("a") == two.held("a", "cpu") == set()


def test_a_cleared_cache_is_empty_in_every_tier_and_may_be_filled_again(two: Given) -> None:
    two.stores("a", 7, tier="cpu")
    epoch = two.state.nodes["a"].epoch
    events = types.CacheCleared("a", epoch), types.BlocksStored("a", epoch, 2, pack_hashes([1]))
    assert two.put("cache", "a", *events) is None
    assert (two.held("a"), two.held("a", "cpu"), two.held("b")) == ({1}, set(), {1, 2, 3})


def test_a_tier_is_left_without_touching_the_others(two: Given) -> None:
    two.stores("a", 1, 2, tier="cpu")
    two.drops("a", 2, 3)
    assert (two.held("a"), two.held("a", "cpu"), two.held("b")) == ({1}, {1, 2}, {1, 2, 3})


def test_a_lost_node_comes_back_with_what_it_reported_meanwhile(two: Given) -> None:
    two.change(types.NodeLost, "a")
    two.stores("a", 5)
    two.change(types.NodeRecovered, "a")
    assert two.held("a") == {5}
    assert two.state.nodes["a"].available


def test_a_node_that_registers_again_stays_cordoned_and_one_that_was_removed_does_not(two: Given) -> None:
    for name in ("a", "b"):
        two.change(types.NodeCordoned, name)
    two.change(types.NodeRemoved, "b")
    for name in ("a", "b"):
        two.node(registered(name))
    assert [two.state.nodes[name].cordoned for name in ("a", "b")] == [True, False]


def test_a_loss_ends_with_a_new_registration(two: Given) -> None:
    two.change(types.NodeLost, "a")
    two.node(registered("a"))
    assert two.state.nodes["a"].available
    assert load(two, "a").active == 0


def test_a_writers_counter_that_does_not_go_up_is_a_duplicate() -> None:
    given = Given()
    epoch = given.node(registered("a"))

    def write(block: int, writer: str, counter: int) -> str | None:
        event = types.BlocksStored("a", epoch, 1, pack_hashes([block]))
        return given.put("cache", "a", event, writer=writer, counter=counter)

    assert [write(1, "w", 2), write(2, "w", 5), write(3, "v", 1)] == [None] * 3
    for counter in (5, 4, 1):
        refused_without_a_trace(given, "duplicate", lambda counter=counter: write(9, "w", counter))  # type: ignore[misc]
    assert write(4, "w", 6) is None
    assert given.held("a") == {1, 2, 3, 4}


def test_counters_are_counted_for_each_subject_and_need_a_writer(two: Given) -> None:
    for name in ("a", "b", "a"):
        event = types.CacheCleared(name, two.state.nodes[name].epoch)
        last = two.put("cache", name, event, writer="w", counter=1)
    assert last == "duplicate"
    body = codec.encode([types.PolicyChanged("ttft")])
    for _ in range(2):
        assert two.raw("kv.f.control", body, {codec.WRITER_SEQ: "1"}).skipped is None


def test_a_refused_commit_uses_its_counter_up(two: Given) -> None:
    """Otherwise its retry would be judged again, by another state."""
    event = types.NodeUncordoned("a")
    assert two.put("node", "a", event, writer="w", counter=1) == "no_change"
    two.change(types.NodeCordoned, "a")
    assert two.put("node", "a", event, writer="w", counter=1) == "duplicate"


def test_a_message_that_comes_again_or_late_changes_nothing(two: Given) -> None:
    before, sequence = digest(two.state), two.state.sequence
    forged = two.messages[-1]._replace(sequence=1, body=codec.encode([types.NodeLost("a")]), subject="kv.f.node.a")
    for message in (two.messages[-1], two.messages[0], forged):
        assert two.state.apply(message) == (None, "redelivered", "")
    assert (digest(two.state), two.state.sequence) == (before, sequence)


def test_who_had_not_seen_a_nodes_last_change_may_not_change_it(two: Given) -> None:
    seen = two.state.sequence
    two.change(types.NodeCordoned, "a")
    refused_without_a_trace(two, "stale", lambda: two.change(types.NodeLost, "a", based_on=seen))
    assert two.change(types.NodeLost, "b", based_on=seen) is None
    assert two.change(types.NodeLost, "a", based_on=seen + 1) is None


def test_the_removal_of_a_node_is_remembered_against_those_who_missed_it(two: Given) -> None:
    seen = two.state.sequence
    two.change(types.NodeRemoved, "a")

    def again(based_on: int) -> str | None:
        return two.put("node", "a", registered("a"), based_on=based_on)

    refused_without_a_trace(two, "stale", lambda: again(seen))
    assert again(seen + 1) is None


def test_placements_rest_on_the_cache_and_reports_do_not(managed: Given, two: Given) -> None:
    seen = managed.state.sequence
    assert managed.places("a", 3, based_on=seen) is None
    refused_without_a_trace(managed, "stale", lambda: managed.places("a", 4, based_on=seen))
    managed.put("cache", "a", types.CacheCleared("a", managed.state.nodes["a"].epoch))
    assert managed.places("a", 4, based_on=seen + 1) == "stale"

    cleared = types.CacheCleared("a", two.state.nodes["a"].epoch)
    two.change(types.NodeCordoned, "a")
    assert two.put("cache", "a", cleared, based_on=0) is None


def test_a_node_never_holds_more_than_its_capacity(managed: Given) -> None:
    refused_without_a_trace(managed, "capacity", lambda: managed.places("a", 3, 4, 5))
    refused_without_a_trace(managed, "capacity", lambda: managed.places("a", 3, 4, 5, 6, evicted=[1]))
    assert managed.places("a", 1, 3, 4) is None
    assert managed.places("a", 5, 6, evicted=[1, 3]) is None
    assert managed.held("a") == {2, 4, 5, 6}


@pytest.mark.parametrize(
    ("stored", "evicted"), [([], [9]), ([3], [1, 1]), ([1], [1]), ([], [1, 9])], ids=["absent", "twice", "both", "one"]
)
def test_only_what_is_held_and_not_wanted_may_be_evicted(managed: Given, stored: list[int], evicted: list[int]) -> None:
    refused_without_a_trace(managed, "not_held", lambda: managed.places("a", *stored, evicted=evicted))


def test_what_a_running_request_uses_is_not_evicted(managed: Given) -> None:
    managed.routes("q", "a", 1)
    managed.routes("r", "a", 1)
    refused_without_a_trace(managed, "protected", lambda: managed.places("a", evicted=[2, 1]))
    managed.completes("q", "a")
    assert managed.places("a", evicted=[1]) == "protected"
    managed.completes("r", "a")
    assert managed.places("a", evicted=[2, 1]) is None


def test_a_block_is_protected_before_it_is_placed_and_after_the_cache_is_cleared(managed: Given) -> None:
    managed.routes("q", "a", 3)
    managed.put("cache", "a", types.CacheCleared("a", managed.state.nodes["a"].epoch))
    managed.places("a", 3)
    assert managed.places("a", evicted=[3]) == "protected"


def test_nothing_is_placed_on_a_lost_node(managed: Given) -> None:
    managed.change(types.NodeLost, "a")
    refused_without_a_trace(managed, "node_lost", lambda: managed.places("a", 3))
    managed.change(types.NodeRecovered, "a")
    assert managed.places("a", 3) is None
    assert managed.held("a") == {3}


def test_a_session_without_its_node_remembers_where_it_was(two: Given) -> None:
    for session, node in (("s", "a"), ("t", "b"), ("u", "a")):
        two.assigns(session, node)
    two.change(types.NodeLost, "a")
    assert two.state.sessions.get("m", "s") == Session("", 7 - 2, "a")
    assert two.state.sessions.get("m", "t") == Session("b", 7 - 1, "")
    assert (two.state.sessions.on_node("a"), two.state.sessions.on_node("b")) == (0, 1)
    two.assigns("s", "b")
    assert two.state.sessions.get("m", "s") == Session("b", two.state.sequence, "")
    two.change(types.NodeRecovered, "a")
    assert two.state.sessions.get("m", "u") == Session("", 7, "a")


def test_a_session_stays_with_a_node_that_registers_again(two: Given) -> None:
    two.assigns("s", "a")
    two.node(registered("a"))
    assert two.state.sessions.on_node("a") == 1


@pytest.mark.parametrize(
    ("reason", "event"),
    [
        ("unknown_node", types.SessionAssigned("s", "m", "gone")),
        ("unknown_node", types.SessionAssigned("s", "m", "lost")),
        ("unknown_session", types.SessionEnded("s", "m")),
        ("unknown_node", types.RequestRouted("q", "m", "gone", 0, 0, 9)),
        ("unknown_node", types.RequestRouted("q", "m", "lost", 0, 0, 9)),
        ("unknown_request", types.RequestCompleted("q", "a")),
    ],
)
def test_an_event_about_what_has_gone_is_ignored_and_the_rest_of_its_commit_applied(
    two: Given, reason: str, event: types.Event
) -> None:
    two.node(registered("lost"))
    two.change(types.NodeLost, "lost")
    if isinstance(event, types.SessionAssigned | types.SessionEnded):
        assert two.put("session", "m", event, types.SessionAssigned("good", "m", "a")) is None
    else:
        assert two.put("access", "w", event, types.RequestRouted("good", "m", "a", 0, 0, 9)) is None
    assert two.state.ignored == {reason: 1}
    applied = [session for (_, session), _ in two.state.sessions.items()] + list(two.state.load.running)
    assert applied == ["good"]


def test_load_counts_what_runs_and_queues_its_uncached_tokens(two: Given) -> None:
    two.routes("q", "a", 1, 2, 3, match=2, tokens=3032)
    start = two.now / SECOND
    assert load(two, "a")[:4] == (1000.0, 1, 3, 3032)
    assert load(two, "a").prefill_done == pytest.approx(start + 3, abs=1e-6)
    two.routes("r", "a", 1, match=1, tokens=1016)
    assert load(two, "a")[1:4] == (2, 4, 4048)
    assert load(two, "a").prefill_done == pytest.approx(start + 4, abs=1e-6)
    two.completes("q", "a")
    assert load(two, "a")[1:4] == (1, 1, 1016)
    two.put("access", "w", types.RequestCompleted("r", "a"), after=0)
    assert load(two, "a")[1:4] == (0, 0, 0)
    # Nothing runs there, so nothing is queued, whatever had been expected.
    assert load(two, "a").prefill_done == pytest.approx(start + 2, abs=1e-6)
    assert load(two, "b").active == 0


def test_a_request_that_is_routed_again_runs_once(two: Given) -> None:
    two.routes("q", "a", 1)
    two.routes("q", "b", 1)
    assert (load(two, "a").active, load(two, "b").active) == (0, 1)


def test_a_request_that_nobody_ends_is_over_by_the_time_of_the_log(two: Given) -> None:
    two.routes("q", "a", 1)
    two.routes("r", "a", 1, after=10)
    two.raw("kv.f.control", b"nonsense", after=ACTIVE_SECONDS - 11)
    assert list(two.state.load.running) == ["q", "r"]
    two.raw("kv.f.control", b"nonsense", after=1)
    assert list(two.state.load.running) == ["r"]
    assert load(two, "a").active == 1


def test_a_policy_holds_from_its_sequence_on(two: Given) -> None:
    assert (two.state.policy, two.state.parameters) == ("ttft", {})
    two.put("control", "", types.PolicyChanged("x"), types.PolicyChanged("cascade", {"weight": 2.0}))
    assert (two.state.policy, two.state.parameters) == ("cascade", {"weight": 2.0})


def test_heads_are_the_last_messages_of_deciding_subjects_refused_ones_too(two: Given) -> None:
    two.change(types.NodeUncordoned, "a")
    two.raw("kv.f.cache.a", b"nonsense")
    two.routes("q", "a", 1)
    assert two.state.heads == {"kv.f.node.a": 5, "kv.f.cache.a": 6, "kv.f.node.b": 3, "kv.f.cache.b": 4}


def test_a_defect_skips_the_commit_and_stops_nothing(two: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(two.state, "caches")
        assert two.stores("a", 9) == "defect"
    assert two.stores("a", 9) is None
    assert two.state.skipped == {"defect": 1}


def test_replicas_of_one_log_have_one_digest_however_they_store_it(two: Given) -> None:
    """Here one has cut its runs, freed slots and taken them again; what both hold in the end was stored in other pieces."""
    one, other = two, Given()
    one.stores("a", 4, 5)
    one.drops("a", 2)
    one.stores("a", 2)
    for name in ("a", "b"):
        other.node(registered(name))
        other.stores(name, 3)
    other.stores("a", 5, 4, 2, 1)
    other.stores("b", 1, 2)
    other.change(types.NodeUncordoned, "a")
    assert facts(one.state) != facts(other.state)
    assert digest(one.state) == digest(replayed(one.messages))
    for state in (one.state, other.state):
        state.skipped, state.commits = {}, 0
    for name, node in other.state.nodes.items():
        node.epoch = node.changed = one.state.nodes[name].epoch
    assert digest(one.state) == digest(other.state)


ACTS: list[Callable[[Given], object]] = [
    lambda given: given.stores("a", 4),
    lambda given: given.drops("a", 3),
    lambda given: given.stores("a", 3, tier="cpu"),
    lambda given: given.stores("b", 4),
    lambda given: given.change(types.NodeCordoned, "a"),
    lambda given: given.change(types.NodeLost, "a"),
    lambda given: given.change(types.NodeUncordoned, "a"),
    lambda given: given.assigns("s", "a"),
    lambda given: given.assigns("s", "b"),
    lambda given: given.routes("q", "a", 1),
    lambda given: given.routes("q", "a", 2),
    lambda given: given.completes("q", "a"),
    lambda given: given.put("control", "", types.PolicyChanged("ttft")),
    lambda given: given.put("control", "", types.PolicyChanged("ttft", {"x": 1})),
    lambda given: given.put("control", "", types.PolicyChanged("ttft"), writer="w", counter=1),
    lambda given: given.put("control", "", types.PolicyChanged("ttft"), writer="w", counter=2),
]


def test_logs_of_one_length_that_differ_in_one_commit_have_other_digests() -> None:
    digests = []
    for act in ACTS:
        given = Given()
        for name in ("a", "b"):
            given.node(registered(name))
            given.stores(name, 1, 2, 3)
        act(given)
        assert given.state.sequence == 5
        digests.append(digest(given.state))
    assert len(set(digests)) == len(ACTS)
