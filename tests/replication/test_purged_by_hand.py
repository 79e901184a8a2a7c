"""A log that was purged by hand, or whose settings or consumers were changed so: what runs goes on, what starts gets there."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events.errors import LogHole, LogUnfit
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.follow import replay
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.diagnosis.doctor import judge
from kvplane.services.diagnosis.examine import examine
from kvplane.services.history.historian import Historian
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from tests.support.eventful_fleet import registration, write_commits
from tests.support.findings import sentence, wrong
from tests.support.purging import consumer_of
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

NEVER = 3600.0


async def filled(fleet: Fleet) -> None:
    """Nodes, blocks, and commits on another subject: a log to which nothing is on its way."""
    for number in range(3):
        await fleet.ask("coordinator.node.register", registration(f"n{number}"))
        for _ in range(5):
            hashes = pack_hashes(range(number * 100, number * 100 + 5))
            await fleet.ask(
                "coordinator.cache.admit", messages.AdmitRequest(model="m", hashes=hashes, node=f"n{number}")
            )
        await write_commits(fleet.client, 5)


async def keep_history(fleet: Fleet, folder: Path) -> Historian:
    """A historian that has stored what is on the log now."""
    history = Historian(await fleet.connect("historian"), "default", folder, servers=[fleet.url])
    await fleet.start(history.run)
    last = (await open_stream(fleet.client.jetstream(), "default")).last_seq
    await until(lambda: history.ingest.stored >= last)
    return history


async def change(client: Client, fleet: str, **settings: Any) -> None:
    """Change settings of the log, as its owner may by hand."""
    info = json.loads((await client.request(f"$JS.API.STREAM.INFO.KV_{fleet}", b"")).data)
    body = json.dumps({**info["config"], **settings}).encode()
    answer = json.loads((await client.request(f"$JS.API.STREAM.UPDATE.KV_{fleet}", body)).data)
    assert "error" not in answer, answer


async def test_what_starts_after_everything_was_purged_begins_with_the_history(
    fleet: Fleet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when the historian starts later than those who need it."""
    first = await fleet.coordinator(snapshot_look_seconds=NEVER)
    await filled(fleet)
    last = first.state.sequence
    async with anyio.create_task_group() as group:
        history = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
        await group.start(history.run)
        await until(lambda: history.ingest.stored == last)
        group.cancel_scope.cancel()
    js = fleet.client.jetstream()
    await js.purge_stream("KV_default")
    assert (await js.stream_info("KV_default")).state.first_seq == last + 1
    found = await examine(fleet.client, "default")
    assert f"begins at {last + 1:,}, and no snapshot leads there (there is none)" in sentence(found, "snapshots")
    assert "`kvplane snapshot take` makes one" in sentence(found, "snapshots")
    logs.configure("warning")
    second: list[Coordinator] = []

    async def start() -> None:
        second.append(await fleet.coordinator(snapshot_look_seconds=NEVER))

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        await until(lambda: "historian_waited_for" in capfd.readouterr().err)
        await keep_history(fleet, tmp_path / "history")
    assert second[0].replica.began == last
    assert digest(second[0].state) == digest(first.state)
    await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    assert ("problem", "snapshots") not in wrong(await examine(fleet.client, "default"))


async def test_a_coordinator_takes_a_snapshot_when_somebody_else_purges(fleet: Fleet) -> None:
    first = await fleet.coordinator(snapshot_look_seconds=0.05)
    await filled(fleet)
    await fleet.client.jetstream().purge_stream("KV_default", seq=12)
    store = SnapshotStore(fleet.client, "default")
    await until(store.sequences)
    second = await fleet.coordinator(snapshot_look_seconds=NEVER)
    assert second.replica.began == (await store.sequences())[0] >= 11
    await second.replica.reached(first.state.sequence)
    assert digest(second.state) == digest(first.state)


async def test_a_purge_by_subject_leaves_a_hole_that_a_snapshot_leads_over(fleet: Fleet, tmp_path: Path) -> None:
    first = await fleet.coordinator(snapshot_look_seconds=NEVER)
    router = await fleet.router()
    await filled(fleet)
    history = await keep_history(fleet, tmp_path / "history")
    before = first.state.sequence
    then = await fleet.ask("history.state", messages.MomentRequest(at=str(before // 2)))
    await fleet.client.jetstream().purge_stream("KV_default", subject="kv.default.access.*")
    assert "deleted messages between" in sentence(await examine(fleet.client, "default"), "log")
    # Those who run have it all, and go on through a new connection.
    running = (first.replica.follower, router.replica.follower, history.ingest.follower)
    for follower in running:
        await follower.client.force_reconnect()
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="n1"))
    await until(lambda: all(follower.restarts and follower.applied > before for follower in running))
    # The past is read from rows.
    again = await fleet.ask("history.state", messages.MomentRequest(at=str(before // 2)))
    assert again["digest"] == then["digest"]
    # The history leads over it, and so does a snapshot.
    second = await fleet.coordinator(snapshot_look_seconds=NEVER)
    assert second.replica.began > before
    assert digest(second.state) == digest(first.state)
    await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    third = await fleet.coordinator(snapshot_look_seconds=NEVER)
    assert third.replica.began == (await SnapshotStore(fleet.client, "default").sequences())[0]
    await fleet.ask("coordinator.compact", messages.CompactRequest(without_history=True))
    found = await examine(fleet.client, "default")
    assert {finding.level for finding in judge(found) if finding.what in {"log", "snapshots"}} == {"ok"}


async def test_a_hole_makes_a_coordinator_take_a_snapshot(fleet: Fleet) -> None:
    await fleet.coordinator(snapshot_look_seconds=0.05)
    await filled(fleet)
    assert not (store := await SnapshotStore(fleet.client, "default").sequences())
    await fleet.client.jetstream().purge_stream("KV_default", subject="kv.default.access.*")
    await until(SnapshotStore(fleet.client, "default").sequences)
    assert not store


@pytest.mark.parametrize("last", ["a", "b"])
async def test_a_hole_is_found_wherever_it_is(client: Client, last: str) -> None:
    """Also where nothing comes behind it."""
    js = client.jetstream()
    await open_stream(js, "default", create=True)
    for name in ("a", "b", last):
        await js.publish(f"kv.default.access.{name}", b"x")
    await js.purge_stream("KV_default", subject="kv.default.access.b")
    seen: list[int] = []
    with (
        anyio.fail_after(10),
        pytest.raises(LogHole, match="missing on the log of fleet 'default'.*kvplane snapshot take"),
    ):
        await replay(client, "default", lambda message: seen.append(message.sequence))
    assert seen == ([1] if last == "a" else [])


SETTINGS: list[dict[str, Any]] = [
    {"max_age": 3600 * 10**9}, {"max_msgs_per_subject": 1000}, {"discard": "old"}, {"retention": "interest"},
    {"allow_rollup_hdrs": True}, {"allow_msg_ttl": True}, {"no_ack": True}, {"max_msg_size": 65536},
    {"subject_transform": {"src": "kv.x.>", "dest": "other.>"}},
]  # fmt: skip


async def test_settings_under_which_a_log_forgets_are_named_with_what_to_do(client: Client) -> None:
    js = client.jetstream()
    for number, settings in enumerate(SETTINGS):
        fleet, (name,) = f"f{number}", settings
        await open_stream(js, fleet, create=True)
        await change(client, fleet, **settings)
        with pytest.raises(LogUnfit, match=rf"can't be a log.*{name}.*nats stream edit KV_{fleet}"):
            await open_stream(js, fleet)
    assert "max_age" in sentence(await examine(client, "f0"), "log")


async def test_who_runs_goes_on_when_the_log_gets_an_age(
    fleet: Fleet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = await fleet.coordinator()
    router = await fleet.router()
    history = await keep_history(fleet, tmp_path / "history")
    await change(fleet.client, "default", max_age=3600 * 10**9)
    before = first.state.sequence
    running = (first.replica.follower, router.replica.follower, history.ingest.follower)
    for follower in running:
        await follower.client.force_reconnect()
    logs.configure("error")
    said = ""

    def counted() -> int:
        nonlocal said
        said += capfd.readouterr().err
        return said.count("log_unfit")

    await until(lambda: counted() == len(running))
    assert "max_age" in said
    await fleet.client.jetstream().publish("kv.default.access.a", b"x")
    await until(lambda: all(follower.applied > before for follower in running))
    await change(fleet.client, "default", max_age=0)
    assert ("problem", "log") not in wrong(await examine(fleet.client, "default"))


async def test_who_loses_its_consumer_makes_another(client: Client) -> None:
    js = client.jetstream()
    await open_stream(js, "default", create=True)
    state = FleetState("default")
    await write_commits(client, 3)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(replay, client, "default", state.apply, last=6))
        await until(lambda: state.sequence == 3)
        await js.delete_consumer("KV_default", (await consumer_of(client, "KV_default", "follower")).name)
        await write_commits(client, 3)
    assert state.sequence == 6
