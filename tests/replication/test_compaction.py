"""Snapshots on the server and the purged log behind them: whoever starts knows all, and nothing goes too early."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from msgspec import structs

from kvplane.events import types
from kvplane.events.errors import LogCorrupt, LogPurged
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.follow import Follower, replay, single
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name
from kvplane.projections import snapshot_body
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.snapshot import dump
from kvplane.services.control import registrations
from kvplane.services.history.historian import Historian
from kvplane.services.process.forked import in_copy
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused, WorkerDied
from kvplane.services.replication import replica
from kvplane.services.replication.compaction import KEPT
from kvplane.services.replication.replica import Replica
from tests.support.eventful_fleet import live
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js.api import StreamState

    from kvplane.services.embedded.server import Server
    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@pytest.fixture
def fleet(fleet: Fleet) -> Fleet:
    """Snapshots may be begun with as soon as they are there."""
    fleet.recent_seconds = 0
    return fleet


async def at_zero(client: Client) -> FleetState:
    """A fold of the whole log."""
    state = FleetState("default")
    await replay(client, "default", state.apply)
    return state


async def with_history(fleet: Fleet, folder: Path) -> tuple[Coordinator, dict[str, Any]]:
    """A coordinator, what its snapshot says, and a history that has as much."""
    first = await fleet.coordinator()
    await fleet.router()
    history = Historian(await fleet.connect("historian"), "default", folder / "history", servers=[fleet.url])
    await fleet._group.start(history.run)
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    await until(lambda: history.ingest.stored >= taken["sequence"])
    return first, taken


async def test_replicas_begin_with_a_snapshot_and_know_what_a_fold_from_zero_knows(fleet: Fleet) -> None:
    await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="n1"))
    again, router = await fleet.coordinator(), await fleet.router()
    zero = await at_zero(fleet.client)
    for other in (again.replica, router.replica):
        await other.reached(zero.sequence)
        assert other.began == taken["sequence"] < zero.sequence
        assert digest(other.state) == digest(zero)
    assert await fleet.ask("coordinator.snapshot", messages.StatusRequest()) != taken


async def test_a_purged_log_is_enough_for_those_who_come_later(fleet: Fleet, tmp_path: Path) -> None:
    first, taken = await with_history(fleet, tmp_path)
    purged = await fleet.ask("coordinator.compact", messages.CompactRequest())
    assert purged["first"] == taken["sequence"]
    assert (await open_stream(fleet.client.jetstream(), "default")).first_seq == taken["sequence"]
    # Nothing is left on the node's subject, and yet what was expected there holds.
    for endpoint in ("cordon", "uncordon"):
        answer = await fleet.ask(f"coordinator.node.{endpoint}", messages.NodeRequest(node="n1"))
        assert answer["changed"] is True
    await fleet.ask(
        "coordinator.cache.admit", messages.AdmitRequest(model="m", hashes=pack_hashes([901, 902]), node="n2")
    )
    second, router = await fleet.coordinator(), await fleet.router()
    await second.replica.reached(first.state.sequence)
    await router.replica.reached(first.state.sequence)
    assert digest(second.state) == digest(first.state) == digest(router.state)
    assert not first.state.skipped
    # What the log has no more, the history has.
    then = await fleet.ask("history.state", messages.MomentRequest(at=str(taken["sequence"] // 2)))
    assert then["sequence"] == taken["sequence"] // 2


async def test_a_new_history_of_a_purged_log_begins_with_a_snapshot(fleet: Fleet, tmp_path: Path) -> None:
    coordinator = await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    await fleet.ask("coordinator.compact", messages.CompactRequest(without_history=True))
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="n1"))
    for _ in range(2):
        history = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
        async with anyio.create_task_group() as group:
            await group.start(history.run)
            now = coordinator.state.sequence
            then = await fleet.ask("history.state", messages.MomentRequest(at=str(now)))
            assert then["digest"] == digest(coordinator.state)
            asked = messages.SqlRequest(sql="SELECT count(*), min(sequence), max(sequence) FROM commits")
            answer = await fleet.ask("sql", asked)
            assert answer["rows"] == [[now - taken["sequence"], taken["sequence"] + 1, now]]
            assert await fleet.refused("history.state", messages.MomentRequest(at="3")) == "before_history"
            group.cancel_scope.cancel()


async def test_a_stale_writer_gains_nothing_from_a_purged_subject(fleet: Fleet) -> None:
    """The server takes an expectation of nothing on an empty subject; the fold knows better."""
    coordinator = await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    stale = coordinator.state.sequence
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="n0"))
    await fleet.ask("coordinator.session.end", messages.SessionRequest(model="m", session="s1"))
    await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    await fleet.ask("coordinator.compact", messages.CompactRequest(without_history=True))
    appender = Appender(fleet.client, "default", new_writer("late"))
    sequence = await appender.append("kv.default.node.n0", [types.NodeUncordoned("n0")], expected=0, based_on=stale - 1)
    await coordinator.replica.reached(sequence)
    assert coordinator.state.skipped == {"stale": 1}
    assert coordinator.state.nodes["n0"].cordoned


async def test_what_can_not_be_used_is_passed_over(fleet: Fleet) -> None:
    first = await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    store = SnapshotStore(fleet.client, "default")
    good = await store.get(taken["sequence"])
    await store.put(taken["sequence"] + 1, b"not a snapshot")
    await store.put(taken["sequence"] + 2, good[:-5])
    await store.put(taken["sequence"] + 3, dump(FleetState("elsewhere")))
    second = await fleet.coordinator()
    assert second.replica.began == taken["sequence"]
    await second.replica.reached(first.state.sequence)
    assert digest(second.state) == digest(first.state)
    # A moment ago: other routers' decisions of that time are read from the log.
    fleet.recent_seconds = 1000
    third = await fleet.coordinator()
    assert third.replica.began == 0
    await third.replica.reached(first.state.sequence)
    assert digest(third.state) == digest(first.state)
    # Unless the log has it no more.
    for other in await store.sequences():
        if other != taken["sequence"]:
            await store.delete(other)
    await fleet.ask("coordinator.compact", messages.CompactRequest(without_history=True))
    fourth = await fleet.coordinator()
    assert fourth.replica.began == taken["sequence"]
    await fourth.replica.reached(first.state.sequence)
    assert digest(fourth.state) == digest(first.state)


async def test_old_snapshots_go_and_the_log_below_the_oldest_is_purged_only_as_the_history_has_it(
    fleet: Fleet, tmp_path: Path
) -> None:
    await fleet.coordinator()
    await fleet.router()
    assert await fleet.refused("coordinator.compact", messages.CompactRequest(without_history=True)) == "conflict"
    await live(fleet)
    taken = []
    for number in range(KEPT + 2):
        await fleet.ask("coordinator.session.end", messages.SessionRequest(model="m", session=f"s{number}"))
        taken.append((await fleet.ask("coordinator.snapshot", messages.StatusRequest()))["sequence"])
    assert await SnapshotStore(fleet.client, "default").sequences() == taken[::-1][:KEPT]
    assert await fleet.refused("coordinator.compact", messages.CompactRequest()) == "conflict"
    history = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
    await fleet._group.start(history.run)
    # A history that is behind holds the log back.
    history.ingest.follower.pause()
    stored = history.ingest.stored
    newest = []
    for number in range(KEPT):
        await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node=f"n{number}"))
        newest.append((await fleet.ask("coordinator.snapshot", messages.StatusRequest()))["sequence"])
    purged = await fleet.ask("coordinator.compact", messages.CompactRequest())
    assert (purged["snapshot"], purged["history"]) == (newest[0], stored)
    assert purged["first"] == stored < newest[0]


async def test_a_replica_without_a_snapshot_does_not_guess(
    fleet: Fleet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "HISTORIAN_SECONDS", 0)
    await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    await fleet.ask("coordinator.compact", messages.CompactRequest(without_history=True))
    await fleet.client.jetstream().delete_object_store("KV_default_snapshots")
    lost = Replica(await fleet.connect("late"), "default", recent_seconds=0)
    with pytest.raises(LogCorrupt, match=f"begins at {taken['sequence']}, but 1 is needed"):
        try:
            with anyio.fail_after(10):
                await lost.run()
        except BaseExceptionGroup as errors:
            raise single(errors) from None
    assert server.process.returncode is None
    assert (await fleet.client.jetstream().stream_info(stream_name("default"))).state.messages > 0


async def test_a_replica_that_compaction_overtakes_goes_on_from_a_snapshot(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    client = await fleet.connect("slow")
    late = Replica(client, "default", recent_seconds=0)
    late.follower.pause()
    async with anyio.create_task_group() as group:
        group.start_soon(late.run)
        await until(lambda: late.follower.target)
        taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
        await fleet.ask("coordinator.compact", messages.CompactRequest(without_history=True))
        # What the server had sent already goes with the connection.
        await late.follower.client.force_reconnect()
        await until(lambda: late.began)
        late.follower.resume()
        await until(lambda: late.ready and late.state.sequence == coordinator.state.sequence)
        group.cancel_scope.cancel()
    assert late.began == taken["sequence"]
    assert digest(late.state) == digest(coordinator.state)


async def test_a_purge_between_two_looks_at_the_log_is_no_gap(client: Client) -> None:
    class Overtaken(Follower):
        async def _first_look(self) -> StreamState:
            state = await super()._first_look()
            await client.jetstream().purge_stream(stream_name("default"), seq=4)
            return state

    await open_stream(client.jetstream(), "default", create=True)
    appender = Appender(client, "default", new_writer("test"))
    for batch in range(5):
        await appender.append("kv.default.cache.a", [types.CacheCleared("a", 1, batch)])
    with anyio.fail_after(10), pytest.raises(LogPurged, match="begins at 4, but 1 is needed"):
        await Overtaken(client, "default", lambda _: None).run()


async def test_a_coordinator_takes_snapshots_by_itself(fleet: Fleet) -> None:
    await fleet.coordinator(snapshot_commits=30, snapshot_look_seconds=0.05)
    await fleet.router()
    await live(fleet)
    store = SnapshotStore(fleet.client, "default")
    with anyio.fail_after(10):
        while not await store.sequences():
            await anyio.sleep(0.05)
    sequences = await store.sequences()
    assert sequences[-1] >= 30


async def test_what_is_computed_in_a_copy_sees_the_moment_of_the_fork() -> None:
    state = [1, 2, 3]
    size = 3_000_000
    async with anyio.create_task_group() as group:

        async def compute() -> None:
            copied = await in_copy(lambda: bytes(state) * size)
            assert copied.data.read() == bytes([1, 2, 3]) * size
            state.append(99)

        group.start_soon(compute)
        await anyio.lowlevel.checkpoint()
        state[:] = [7]
    assert state == [7, 99]
    with pytest.raises(WorkerDied):
        await in_copy(partial(bytes, -1))


async def test_who_can_not_make_a_snapshot_goes_on_and_says_why(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = await fleet.coordinator()
    request = messages.RegisterRequest(node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 4})
    await fleet.ask("coordinator.node.register", request)
    monkeypatch.setattr(snapshot_body, "MOST_SLOTS", 0)
    with pytest.raises(Refused, match="no snapshot can be made: the fleet has 1 slots, a snapshot holds 0"):
        await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    monkeypatch.setattr(registrations, "AT_ONCE", 3)
    again = structs.replace(request, replace=True)
    for _ in range(2):
        await fleet.ask("coordinator.node.register", again)
    before = coordinator.state.sequence
    with pytest.raises(Refused, match="node 'a' has registered 3 times") as caught:
        await fleet.ask("coordinator.node.register", again)
    assert caught.value.code == "too_often"
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))
    # The log has the cordon and no fourth registration.
    assert coordinator.state.sequence == before + 1


async def test_without_a_usable_snapshot_replicas_begin_with_what_the_history_has(fleet: Fleet, tmp_path: Path) -> None:
    """An upgrade that changes the fold makes all snapshots useless, and the log behind them was purged."""
    first, taken = await with_history(fleet, tmp_path)
    await fleet.ask("coordinator.compact", messages.CompactRequest())
    store = SnapshotStore(fleet.client, "default")
    data = bytearray(await store.get(taken["sequence"]))
    data[-1] ^= 1
    await store.put(taken["sequence"], bytes(data))
    second, router = await fleet.coordinator(), await fleet.router()
    assert second.replica.began == router.replica.began == taken["sequence"]
    await second.replica.reached(first.state.sequence)
    await router.replica.reached(first.state.sequence)
    assert digest(second.state) == digest(first.state) == digest(router.state)
