"""Snapshots on the server under attack: killed writers, several at once, readers of what is being deleted, newer ones."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs
from xxhash import xxh3_128, xxh3_128_hexdigest

from kvplane.events.errors import LogUnavailable
from kvplane.events.log.follow import replay
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.projections import snapshot
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.snapshot import load
from kvplane.services.process import hugepages, logs
from kvplane.services.process.forked import in_copy
from kvplane.services.protocol import messages
from kvplane.services.replication.replica import Replica
from tests.support.eventful_fleet import live
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from tests.support.fleet import Fleet


pytestmark = pytest.mark.anyio

MIB = 1 << 20

WRITER = """
import sys, anyio
from kvplane.events.log.connection import connected
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream

async def main(url):
    async with connected([url], "writer") as client:
        await SnapshotStore(client, "default").put(7, bytes(1 << 30))

anyio.run(main, sys.argv[1], backend_options={"use_uvloop": True})
"""


@pytest.fixture
def fleet(fleet: Fleet) -> Fleet:
    """Snapshots may be begun with as soon as they are there."""
    fleet.recent_seconds = 0
    return fleet


async def pieces(client: Client) -> set[str]:
    """Subjects of pieces that are in the bucket."""
    info = await client.jetstream().stream_info(
        "OBJ_KV_default_snapshots", subjects_filter="$O.KV_default_snapshots.C.*"
    )
    return set(info.state.subjects or {})


async def test_a_writer_that_is_killed_leaves_nothing_that_counts_or_stays(fleet: Fleet) -> None:
    await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    whole = await pieces(fleet.client)
    assert len(whole) == 1
    async with await anyio.open_process([sys.executable, "-c", WRITER, fleet.url], stderr=None) as process:
        with anyio.fail_after(30):
            while await pieces(fleet.client) == whole:
                await anyio.sleep(0.01)
        process.kill()
    store = SnapshotStore(fleet.client, "default")
    assert await store.sequences() == [taken["sequence"]]
    late = await fleet.coordinator()
    assert late.replica.began == taken["sequence"]
    # For all that anybody knows it still writes.
    assert await store.sweep() == 0
    assert len(await pieces(fleet.client)) == 2
    assert await store.sweep(seconds=0) == 1
    assert await pieces(fleet.client) == whole
    assert load("default", await store.get(taken["sequence"])).sequence == taken["sequence"]


async def test_two_coordinators_take_one_at_once(fleet: Fleet) -> None:
    both = [await fleet.coordinator() for _ in range(2)]
    await fleet.router()
    await live(fleet)
    await until(lambda: both[0].state.sequence == both[1].state.sequence)
    async with anyio.create_task_group() as group:
        for coordinator in both:
            group.start_soon(coordinator.compaction.take)
    store = SnapshotStore(fleet.client, "default")
    # One, or two when a commit came in between.
    last = (await store.sequences())[0]
    zero = FleetState("default")
    await replay(fleet.client, "default", zero.apply, last=last)
    assert digest(load("default", await store.get(zero.sequence))) == digest(zero)
    # What one of them wrote in vain is swept away.
    await store.sweep(seconds=0)
    assert len(await pieces(fleet.client)) == len(await store.sequences())
    assert digest(load("default", await store.get(zero.sequence))) == digest(zero)


async def test_a_reader_of_what_is_deleted_says_so_and_whoever_reads_gets_all_or_nothing(
    client: Client,
) -> None:
    await open_stream(client.jetstream(), "default", create=True)
    store, data = SnapshotStore(client, "default", idle_seconds=0.5), bytes(range(256)) * (32 * MIB // 256)
    # Listed, and its pieces are gone.
    await store.put(1, data)
    await client.jetstream().purge_stream("OBJ_KV_default_snapshots", subject="$O.KV_default_snapshots.C.*")
    with anyio.fail_after(20), pytest.raises(LogUnavailable, match="pieces are missing"):
        await store.get(1)
    outcomes = set()
    for number in range(8):
        await store.put(2, data)

        async def read() -> None:
            try:
                outcomes.add(xxh3_128_hexdigest(await store.get(2)))
            except LogUnavailable:
                outcomes.add("unavailable")

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await anyio.sleep(0.02 * number)
                await store.delete(2)
    assert outcomes <= {"unavailable", xxh3_128_hexdigest(data)}
    assert "unavailable" in outcomes


async def test_a_newer_one_is_passed_over_with_a_warning_and_the_one_before_is_used(fleet: Fleet) -> None:
    first = await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    taken = await fleet.ask("coordinator.snapshot", messages.StatusRequest())
    store = SnapshotStore(fleet.client, "default")
    good = await store.get(taken["sequence"])
    header, start = snapshot._opened(good)
    for ahead, change in ((1, {"version": snapshot.VERSION + 1}), (2, {"revision": snapshot.FOLD_REVISION + 1})):
        await store.put(
            taken["sequence"] + ahead, snapshot._sealed(msgspec.structs.replace(header, **change), good[start:])
        )
    logs.configure("warning")
    with capture_logs() as logged:
        second = await fleet.coordinator()
    assert second.replica.began == taken["sequence"]
    assert digest(second.state) == digest(first.state)
    warned = [entry["error"] for entry in logged if entry["event"] == "snapshot_passed_over"]
    assert [
        f"this kvplane has {snapshot.FOLD_REVISION}; replay the log" in warned[0],
        "use a newer kvplane" in warned[1],
    ] == [True, True]


async def test_many_bytes_are_a_reason_as_well(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def look(self: Replica) -> int:
        looks.append(vars(self)["bytes_read"])
        return looks[-1]

    def read(self: Replica, count: int) -> None:
        vars(self)["bytes_read"] = count

    async def looked_at(count: int) -> None:
        """Wait until the bytes that were read are looked at, and what comes of it has come."""
        for _ in range(2):
            looks.clear()
            await until(lambda: count in looks)

    monkeypatch.setattr(Replica, "bytes_read", property(look, read), raising=False)
    coordinator = await fleet.coordinator(snapshot_bytes=20 * MIB, snapshot_look_seconds=0.05)
    await fleet.router()
    store = SnapshotStore(fleet.client, "default")
    for _ in range(3):
        await fleet.client.publish("kv.default.control", bytes(6 * MIB))
        await fleet.client.flush()
    await coordinator.replica.reached(3)
    await looked_at(18 * MIB)
    assert await store.sequences() == []
    await fleet.client.publish("kv.default.control", bytes(6 * MIB))
    with anyio.fail_after(10):
        while await store.sequences() != [4]:
            await anyio.sleep(0.05)
    # And the count begins anew.
    await fleet.client.publish("kv.default.control", bytes(6 * MIB))
    await coordinator.replica.reached(5)
    await looked_at(30 * MIB)
    assert await store.sequences() == [4]


@pytest.mark.alone
async def test_gigabytes_are_copied_and_come_back_whole() -> None:
    held = [bytes([number]) * (64 * MIB) for number in range(32)]
    assert hugepages.collapse() >= 0
    copied = await in_copy(lambda: b"".join(held[::2]))
    expected = xxh3_128()
    for part in held[::2]:
        expected.update(part)
    with copied.data.getbuffer() as view:
        assert view.nbytes == 1024 * MIB
        assert xxh3_128(view).digest() == expected.digest()
    assert copied.pause < 5


async def test_an_acknowledgement_that_lands_in_the_bucket_hides_no_snapshot(client: Client) -> None:
    """Whoever may write anything may name a subject of the bucket for the server's answer."""
    await open_stream(client.jetstream(), "default", create=True)
    store, bucket = SnapshotStore(client, "default"), "$O.KV_default_snapshots"
    await store.put(1, b"one")
    stream = await client.jetstream().stream_info("OBJ_KV_default_snapshots", subjects_filter=">")
    subjects = [*(stream.state.subjects or {}), f"{bucket}.M.x", store._described(f"{2:020}"), f"{bucket}.C.x"]
    before = stream.state.messages
    for subject in subjects:
        await client.publish("kv.default.cache.a", b"junk", reply=subject)

    async def landed() -> bool:
        info = await client.jetstream().stream_info("OBJ_KV_default_snapshots")
        return bool(info.state.messages == before + len(subjects))

    await until(landed)
    assert await store.sequences() == [1]
    assert await store.get(1) == b"one"
    await store.put(2, b"two")
    assert (await store.sequences(), await store.get(2)) == ([2, 1], b"two")
    # What it is not goes with the rest that nobody needs, and a snapshot with all that was said of it.
    await store.sweep(seconds=0)
    assert (await store.sequences(), await store.get(1), await store.get(2)) == ([2, 1], b"one", b"two")
    for sequence in (1, 2):
        await store.delete(sequence)
    assert (await client.jetstream().stream_info("OBJ_KV_default_snapshots")).state.messages == 0
