"""A past that does not come from the log is believed only when running replicas have its digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from kvplane.events.errors import LogPurged
from kvplane.events.log.follow import replay, single
from kvplane.events.log.stream import open_stream
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.snapshot import dump, load
from kvplane.services.protocol import messages
from kvplane.services.replication import replica, vouching
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from tests.support.eventful_fleet import live, write_commits
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

NAME = "default"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "SNAPSHOT_TRIES", 1)
    monkeypatch.setattr(vouching, "LIST_SECONDS", 0.3)


class Past:
    """A log that was purged, without a snapshot, and one who answers for the history."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked = 0

    async def answer(self, message: Msg) -> None:
        self.asked += 1
        piece = messages.Piece(result="r", offset=0, size=len(self.data), data=self.data, next="")
        await message.respond(msgspec.msgpack.encode(piece))


async def purged(fleet: Fleet, client: Client) -> Past:
    """Let a fleet live, purge most of its log, and answer with the truth."""
    await live(fleet)
    first = (await open_stream(client.jetstream(), NAME)).last_seq - 20
    truth = FleetState(NAME)
    await replay(client, NAME, truth.apply, last=first)
    await client.jetstream().purge_stream(f"KV_{NAME}", seq=first)
    past = Past(dump(truth))
    await client.subscribe(f"kv.{NAME}.history.snapshot", cb=past.answer)
    return past


def rogue(data: bytes) -> bytes:
    """The same past, but for a node that is somewhere else."""
    state = load(NAME, data)
    state.nodes["n0"].registered = msgspec.structs.replace(state.nodes["n0"].registered, address="http://mine")
    return dump(state)


async def refused(fleet: Fleet, says: str) -> None:
    """A router that starts ends, and has answered nothing."""
    late = Router(await fleet.connect("late"), NAME)
    with pytest.raises(BaseExceptionGroup) as caught, anyio.fail_after(60):
        await late.run()
    error = single(caught.value)
    assert isinstance(error, LogPurged)
    assert says in str(error)
    assert (late.state.sequence, late.serving, dict(late.state.nodes)) == (0, False, {})


async def test_what_a_historian_gives_is_compared_with_coordinators_before_anything_is_answered(
    fleet: Fleet, client: Client
) -> None:
    coordinator = await fleet.coordinator()
    router = await fleet.router()
    past = await purged(fleet, client)
    late = await fleet.router()
    assert late.replica.began == load(NAME, past.data).sequence > 1
    assert digest(late.state) == digest(coordinator.state) == digest(router.state)
    truth, past.data = past.data, rogue(past.data)
    await refused(fleet, "is not the state of 1 of 1 running replicas")
    assert past.asked > 1
    past.data = truth
    assert (await fleet.coordinator()).replica.began == late.replica.began


async def test_without_a_coordinator_all_routers_must_agree(fleet: Fleet, client: Client) -> None:
    """One of them could pretend to be many."""
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            first = Coordinator(await fleet.connect("coordinator"), NAME)
            await group.start(first.run)
            routers = [await fleet.router(), await fleet.router()]
            past = await purged(fleet, client)
            scope.cancel()
    late = await fleet.router()
    assert digest(late.state) == digest(routers[1].state)
    # One of them has gone astray, or lies.
    routers[0].state.parameters["x"] = 1.0
    # A digest is made once for each sequence.
    await write_commits(client, 1)
    await until(lambda: len({each.state.sequence for each in (*routers, late)}) == 1)
    await refused(fleet, "is not the state of 1 of 3 running replicas")
    del routers[0].state.parameters["x"]
    await write_commits(client, 1)
    past.data = rogue(past.data)
    await refused(fleet, "is not the state of 3 of 3 running replicas")


async def test_where_nobody_runs_who_vouches_only_who_is_told_to_trusts_the_historian(
    fleet: Fleet, client: Client
) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            for service in (Coordinator, Router):
                await group.start(service(await fleet.connect("first"), NAME).run)
            past = await purged(fleet, client)
            scope.cancel()
    await refused(fleet, "start a coordinator with --trust-history")
    trusting = await fleet.coordinator(trust_history=True)
    assert trusting.replica.began == load(NAME, past.data).sequence
    # It vouches for the others.
    assert digest((await fleet.router()).state) == digest(trusting.state)
