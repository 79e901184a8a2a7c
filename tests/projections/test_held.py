"""Who is held: a queue in the fold, with places that are kept and leases in log time, and nothing of it unless asked for."""

from __future__ import annotations

import pytest

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.subjects import subject
from kvplane.events.versions import FORMAT
from kvplane.projections import held, snapshot
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadSnapshot
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.replay import hold_events
from kvplane.projections.history.rows import Rows, Waiting
from tests.support.fold_given import SECOND, Given, registered, replayed


def fleet(in_force: int = FORMAT, hold: float = 1) -> Given:
    given = Given()
    given.put("control", "", types.PolicyChanged("ttft", {"hold": hold}))
    if in_force > 1:
        given.put("control", "", types.FormatRaised(in_force))
    for name in "ab":
        given.node(registered(name, capacity=1000))
    return given


def holds(given: Given, request: str, *, tokens: int = 100, after: float = 1, **fields: object) -> str | None:
    event = types.RequestHeld(request, "m", tokens, **fields)  # type: ignore[arg-type]
    return given.put("access", "w", event, after=after)


def test_who_is_held_keeps_the_place_until_released() -> None:
    given = fleet()
    holds(given, "one", tokens=5, tenant="t", session="s", turns=2)
    since = given.now
    holds(given, "two")
    holds(given, "one", after=20)
    assert list(given.state.queue.items()) == [
        ("one", held.Held("m", "s", 5, "t", 2, since, given.now)),
        ("two", held.Held("m", "", 100, "", 0, since + SECOND, since + SECOND)),
    ]
    given.put("access", "w", types.RequestReleased("one", "m", "room"))
    assert list(given.state.queue) == ["two"]
    given.put("access", "w", types.RequestReleased("one", "m", "room"))
    assert given.state.ignored == {"unknown_request": 1}


def test_who_is_sent_to_a_node_waits_no_longer() -> None:
    given = fleet()
    holds(given, "one")
    given.routes("one", "a", 1, 2, tokens=40)
    assert not given.state.queue


def test_what_was_let_in_is_counted_for_a_while_and_who_left_is_not() -> None:
    given = fleet()
    for request in ("one", "two", "three"):
        holds(given, request)
    given.put("access", "w", types.RequestReleased("one", "m", "room"))
    given.put("access", "w", types.RequestReleased("two", "m", held.LEFT))
    queue, now = given.state.queue, given.now
    assert 100 / (2 * held.RATE_SECONDS) <= queue.rate(now) <= 100 / held.RATE_SECONDS
    assert queue.rate(now + 2 * held.RATE_SECONDS * SECOND) == 0


def test_a_router_that_is_gone_holds_nobody() -> None:
    given = fleet()
    holds(given, "of the dead")
    holds(given, "of the living")
    for _ in range(3):
        holds(given, "of the living", after=held.LEASE_SECONDS / 2)
    assert list(given.state.queue) == ["of the living"]


@pytest.mark.parametrize(("in_force", "hold"), [(FORMAT, 0), (3, 1), (1, 1)])
def test_where_nobody_holds_there_is_no_queue(in_force: int, hold: float) -> None:
    given = fleet(in_force, hold)
    skipped = holds(given, "one")
    assert (skipped, not given.state.holding) == (None if in_force == FORMAT else "unknown_type", True)
    assert not given.state.queue
    assert given.state.load.contexts.talks == {}


def test_a_policy_that_holds_no_more_forgets_who_waited() -> None:
    given = fleet()
    holds(given, "one")
    given.put("control", "", types.PolicyChanged("ttft", {"hold": 1, "hold_seconds": 5}))
    assert list(given.state.queue) == ["one"]
    given.put("control", "", types.PolicyChanged("ttft"))
    assert (given.state.holding, len(given.state.queue)) == (False, 0)


def test_the_queue_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "HELD_LIMIT", 2)
    given = fleet()
    for request in ("one", "two", "three"):
        holds(given, request)
    assert list(given.state.queue) == ["one", "two"]
    assert given.state.ignored == {"queue_full": 1}


def test_a_clock_that_was_ahead_holds_nobody_for_longer() -> None:
    given = fleet()
    given.now += 5000 * SECOND
    holds(given, "one")
    given.now -= 5000 * SECOND
    holds(given, "two")
    holds(given, "two", after=held.LEASE_SECONDS)
    assert list(given.state.queue) == ["two"]


def test_a_conversation_is_heard_of_when_it_asks_and_when_it_is_answered() -> None:
    given = fleet()
    given.routes("r", "a", 1, 2, session="s")
    contexts = given.state.load.contexts
    (key,) = contexts
    assert contexts.heard(key) > given.now
    given.put("access", "w", types.RequestCompleted("r", "a"), after=50)
    assert contexts.heard(key) == given.now
    given.routes("q", "a", 1, 2, session="s")
    given.change(types.NodeLost, "a")
    assert (contexts.talks, contexts.asked) == ({}, {})


def busy() -> Given:
    given = fleet()
    for request in ("one", "two", "three"):
        holds(given, request, session=request)
    given.put("access", "w", types.RequestReleased("one", "m", "room"))
    given.routes("one", "a", 1, 2, session="s")
    given.routes("again", "b", 1, 2, 3, session="s")
    given.routes("no name", "b", 7, 8)
    given.put("access", "w", types.RequestCompleted("no name", "b"))
    return given


def test_replicas_and_snapshots_have_the_same_queue() -> None:
    given = busy()
    state = given.state
    loaded = snapshot.load("f", snapshot.dump(state), verify=True)
    assert digest(replayed(given.messages)) == digest(loaded) == digest(state)
    # And they go on alike.
    for at, event in enumerate((types.RequestCompleted("again", "b"), types.RequestHeld("four", "m", 9))):
        time = given.now + held.LEASE_SECONDS * SECOND // 2 * (at + 1)
        message = Message(state.sequence + 1, subject("f", "access", "w"), time, None, codec.encode([event]))
        for each in (state, loaded):
            each.apply(message)
    assert list(state.queue) == ["four"]
    assert digest(loaded) == digest(state)


@pytest.mark.parametrize("change", ["queue", "talk", "rate"])
def test_the_digest_has_the_queue(change: str) -> None:
    one, other = busy().state, busy().state
    assert digest(one) == digest(other)
    if change == "queue":
        other.queue.popitem()
    elif change == "talk":
        next(iter(other.load.contexts.talks.values())).answered += 1
    else:
        other.queue.let_in += 1
    assert digest(one) != digest(other)


@pytest.mark.parametrize("what", ["asked", "talks", "queue"])
def test_a_snapshot_of_a_queue_that_can_not_be_is_refused(what: str) -> None:
    state = busy().state
    contexts = state.load.contexts
    if what == "asked":
        next(iter(contexts.talks.values())).running.append("x")
    elif what == "talks":
        contexts.talks[b"nobody"] = next(iter(contexts.talks.values()))
    else:
        state.queue["x"] = held.Held("m", "", -1, "", 0, 0, 0)
    with pytest.raises(BadSnapshot, match="who is held"):
        snapshot.load("f", snapshot.dump(state))


def test_the_history_has_all_that_the_fold_knows_of_it() -> None:
    given = fleet()
    state, rows, waiting = FleetState("f"), Rows(), Waiting()
    holds(given, "one", session="s", tenant="t", turns=2, reason="no room", place=1, expected=9.0, decided=77)
    holds(given, "one", place=1, after=20)
    given.put("access", "w", types.RequestReleased("one", "m", "bound", 7.5))
    for message in given.messages:
        rows.add(message, state.apply(message), state, waiting)
    table = rows.tables()["holds"]
    assert table["change"].to_pylist() == ["held", "still held", "released"]
    assert (table["waited"].to_pylist(), table["router"].to_pylist()) == ([None, None, 7.5], ["w"] * 3)
    plain = table.drop_columns(["time"]).set_column(
        table.schema.get_field_index("decided") - 1, "decided", table["decided"].cast("int64")
    )
    written = [event for message in given.messages[-3:] for event in codec.decode("f", message).events]
    assert list(hold_events(plain).values()) == written
