"""Everything that kvplane does, with each part under its own credentials and nothing refused on the way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.client import LogClient
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name
from kvplane.projections.digest import digest
from kvplane.services.diagnosis.doctor import judge
from kvplane.services.diagnosis.examine import examine
from kvplane.services.history.client import table
from kvplane.services.protocol import messages
from kvplane.services.replication.checkpoints import Schedule
from kvplane.services.rpc.client import ask
from tests.support.waiting import until
from tests.support.with_credentials import NAME, Guarded, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.aio.msg import Msg

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as running:
        yield running


@pytest.fixture
def violations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What servers refused to any client of kvplane."""
    found: list[str] = []
    original = LogClient._process_err

    async def process(self: LogClient, message: str) -> None:
        found.append(f"{self.options['name']}: {message}")
        await original(self, message)

    monkeypatch.setattr(LogClient, "_process_err", process)
    return found


async def ask_fleet(client: Client, endpoint: str, request: Any, form: Any = None) -> Any:
    return await ask(client, f"kv.{NAME}.{endpoint}", request, form, seconds=20)


async def test_a_whole_fleet_works_with_each_part_under_its_own_role(
    fleet: Guarded, violations: list[str], tmp_path: Path
) -> None:
    fleet.schedule = Schedule(least_commits=4)
    coordinator = await fleet.coordinator()
    routers = [await fleet.router(), await fleet.router()]
    await fleet.node("node-a")
    await fleet.node("node-b", cache_mode="managed", model="other")
    await fleet.historian(tmp_path / "history")
    client = await fleet.connect("client")
    admin = await fleet.connect("admin")

    for number in range(8):
        blocks = pack_hashes(range(number, number + 4))
        for model, node in (("sim", "node-a"), ("other", "node-b")):
            asked = messages.RouteRequest(model=model, hashes=blocks, session=f"s{number}")
            answer = await ask_fleet(client, "route", asked, messages.RouteAnswer)
            assert answer.node == node
            serve = messages.ServeRequest(request=answer.request, hashes=blocks, tokens=65, output_tokens=1)
            await ask(client, answer.address, serve, messages.ServeAnswer)
    await ask_fleet(client, "complete", messages.CompleteRequest(request="none", node="node-a"))
    await until(lambda: coordinator.state.sequence >= 20 and not any(coordinator.state.load.active))
    assert coordinator.state.skipped == {}
    assert {
        row["held_blocks"]["gpu"]
        for row in (await ask_fleet(client, "coordinator.node.list", messages.ListRequest()))["nodes"]
    } == {11}

    assert (await ask_fleet(admin, "coordinator.node.cordon", messages.NodeRequest(node="node-b")))["changed"]
    assert (await ask_fleet(admin, "coordinator.policy.set", messages.PolicyRequest(policy="cascade")))[
        "policy"
    ] == "cascade"
    decisions = await table(client, NAME, "SELECT request FROM decisions ORDER BY sequence, event")
    explained = await ask_fleet(client, "explain", messages.ExplainRequest(request=decisions["request"][0].as_py()))
    assert explained["verdict"] == "agrees"
    assert (await ask_fleet(client, "history.state", messages.MomentRequest(at="4")))["sequence"] == 4

    taken = await ask_fleet(admin, "coordinator.snapshot", messages.StatusRequest())
    assert await SnapshotStore(admin, NAME).sequences() == [taken["sequence"]]
    purged = await ask_fleet(admin, "coordinator.compact", messages.CompactRequest())
    assert purged["first"] == taken["sequence"] > 1
    late = await fleet.router()
    assert late.replica.began == taken["sequence"]
    sequence = max(router.state.sequence for router in (*routers, late))
    await until(lambda: {router.state.sequence for router in (*routers, late)} == {sequence})
    assert len({digest(router.state) for router in (*routers, late)} | {digest(coordinator.state)}) == 1

    readers = (await ask_fleet(client, "coordinator.format.show", messages.StatusRequest()))["readers"]
    assert sorted(reader["service"] for reader in readers) == [
        "kvplane-coordinator", "kvplane-historian", *["kvplane-router"] * 3
    ]  # fmt: skip
    assert (await ask_fleet(admin, "coordinator.format.raise", messages.FormatRequest()))["changed"]
    assert all(replica.checkpoints.own for replica in (coordinator.replica, routers[0].replica))
    assert coordinator.replica.checkpoints._received

    findings = judge(await examine(admin, NAME))
    assert [finding for finding in findings if finding.level == "problem"] == []

    # No snapshot that can be used: the history helps.
    await SnapshotStore(admin, NAME).put(taken["sequence"], b"spoilt")
    helped = await fleet.router()
    assert helped.replica.began == taken["sequence"]
    assert violations == []


async def test_under_flow_control_and_lost_races_nothing_is_refused(fleet: Guarded, violations: list[str]) -> None:
    """Paths that are rare: a race on a node, a retried commit, a log that is read with the reader held up."""
    coordinators = [await fleet.coordinator(), await fleet.coordinator()]
    admin = await fleet.connect("admin")
    request = messages.RegisterRequest(
        node="node-a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 4000}, cache_mode="managed",
    )  # fmt: skip
    await ask_fleet(admin, "coordinator.node.register", request)
    async with anyio.create_task_group() as group:
        for number in range(100):
            admit = messages.AdmitRequest(
                model="m", node="node-a", hashes=pack_hashes(range(number * 8, number * 8 + 8))
            )
            group.start_soon(ask_fleet, admin, "coordinator.cache.admit", admit)
    assert sum(coordinator.races_lost for coordinator in coordinators) > 0
    appender = Appender(await fleet.connect("router"), NAME, new_writer("router"))
    for number in range(6):
        events = [types.RequestCompleted(f"r{number}-{each}", "node-a", status="x" * 500) for each in range(8000)]
        await appender.append(f"kv.{NAME}.access.{appender.writer}", events)
    late = await fleet.router()
    assert late.state.sequence >= 107
    assert violations == []


async def test_the_admin_backs_the_log_up_and_puts_it_back(fleet: Guarded, violations: list[str]) -> None:
    """As `nats stream backup` and `restore` do, which compose/README.md tells to use."""
    router = await fleet.connect("router")
    await open_stream((await fleet.connect("coordinator")).jetstream(), NAME, create=True)
    appender = Appender(router, NAME, new_writer("router"))
    for _ in range(3):
        events = [types.RequestCompleted(uuid4().hex, "node-a") for _ in range(2000)]
        await appender.append(f"kv.{NAME}.access.{appender.writer}", events)
    admin = await fleet.connect("admin")
    pieces: list[bytes] = []
    whole = anyio.Event()

    async def piece(message: Msg) -> None:
        if not message.data:
            whole.set()
            return
        pieces.append(message.data)
        if message.reply:
            await admin.publish(message.reply)

    async def asked(subject: str, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            (await admin.request(subject, json.dumps(request).encode(), timeout=20)).data
        )
        assert "error" not in answer, answer
        return answer

    inbox = admin.new_inbox()
    await admin.subscribe(inbox, cb=piece)
    log = stream_name(NAME)
    backup = await asked(f"$JS.API.STREAM.SNAPSHOT.{log}", {"deliver_subject": inbox, "chunk_size": 16384})
    with anyio.fail_after(20):
        await whole.wait()
    assert len(pieces) > 1
    await asked(f"$JS.API.STREAM.DELETE.{log}", {})
    restore = await asked(f"$JS.API.STREAM.RESTORE.{log}", {"config": backup["config"], "state": backup["state"]})
    for data in (*pieces, b""):
        await admin.request(restore["deliver_subject"], data, timeout=20)
    assert (await fleet.router()).state.sequence == 3
    assert violations == []
