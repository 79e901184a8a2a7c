"""Digests at checkpoints: replicas agree without being asked at one moment, and one that differs is found."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from structlog.testing import capture_logs

from kvplane.events.log.follow import replay
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.prefix import PrefixIndex
from kvplane.services.diagnosis.doctor import judge
from kvplane.services.diagnosis.examine import examine
from kvplane.services.process import logs
from kvplane.services.process.forked import in_copy
from kvplane.services.protocol import messages
from kvplane.services.protocol.messages import Checkpoint
from kvplane.services.replication import checkpoints
from kvplane.services.replication.checkpoints import DIGEST_DIGITS, KEPT, Checkpoints, Schedule, Voter, due, odd
from kvplane.services.rpc.client import instances
from tests.support.eventful_fleet import live, write_commits
from tests.support.processes import children
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@pytest.fixture
def fleet(fleet: Fleet) -> Fleet:
    """A fleet whose replicas compare soon."""
    fleet.schedule = Schedule(wait_seconds=0.05)
    return fleet


def test_spacing_grows_with_the_state_and_wide_ones_are_among_the_narrow() -> None:
    small, large = FleetState("f"), FleetState("f")
    index = large.caches.by_model["m"] = PrefixIndex()
    index.add_slot(0)
    index._counts[0] = 1_000_000
    found: dict[str, list[int]] = {"small": [], "large": []}
    for sequence in range(1, 200_001):
        for name, state in (("small", small), ("large", large)):
            state.sequence = sequence
            if due(state):
                found[name].append(sequence)
    assert found["small"] == list(range(1000, 200_001, 1000))
    # A million memberships: a digest takes 0.05 s, and is made at most every 40,000 commits.
    assert found["large"] == [64_000, 128_000, 192_000]


@pytest.mark.parametrize(
    ("digests", "named"),
    [
        ("a", ""),
        ("aa", ""),
        ("ab", "01"),
        ("aab", "2"),
        ("abb", "0"),
        ("abc", "012"),
        ("aabb", "0123"),
        ("aaabb", "34"),
    ],
)
def test_who_is_odd(digests: str, named: str) -> None:
    voters = [Voter("router", str(number)) for number in range(len(digests))]
    assert "".join(voter.writer for voter in odd(dict(zip(voters, digests, strict=True)))) == named


@pytest.mark.parametrize(
    ("coordinators", "routers", "named"),
    [("aa", "bbbb", "2345"), ("ab", "aa", "1"), ("a", "bbb", "0"), ("aab", "b", "23"), ("aa", "aa", "")],
)
def test_coordinators_that_agree_decide(coordinators: str, routers: str, named: str) -> None:
    every = [*(("coordinator", each) for each in coordinators), *(("router", each) for each in routers)]
    digests = {Voter(role, str(number)): each for number, (role, each) in enumerate(every)}
    found = odd(digests, [voter for voter in digests if voter.role == "coordinator"])
    assert "".join(voter.writer for voter in found) == named


async def test_replicas_note_the_same_digests_under_load(fleet: Fleet) -> None:
    coordinators = [await fleet.coordinator() for _ in range(2)]
    routers = [await fleet.router() for _ in range(2)]
    await live(fleet)
    replicas = [router.replica for router in routers] + [coordinator.replica for coordinator in coordinators]
    async with anyio.create_task_group() as group:
        group.start_soon(write_commits, fleet.client, 12_500)
        # Asked in the middle of it, when no two are at one sequence for long.
        await until(lambda: set.intersection(*(set(replica.checkpoints.own) for replica in replicas)), seconds=30)
        found = await examine(fleet.client, "default")
    finding = next(finding for finding in judge(found) if finding.what == "digests")
    assert finding.level == "ok"
    assert finding.message.startswith("4 replicas had the same state at sequence ")
    zero, truth = FleetState("default"), {}

    def handle(message: Message) -> None:
        zero.apply(message)
        if message.sequence % checkpoints.LEAST_COMMITS == 0:
            truth[message.sequence] = digest(zero)

    await replay(fleet.client, "default", handle)
    for replica in replicas:
        assert replica.checkpoints.own.items() <= truth.items()
        assert replica.checkpoints.differs == replica.checkpoints.mismatches == 0


def test_who_is_too_slow_notes_fewer_of_the_same() -> None:
    state = FleetState("f")
    for wider in range(checkpoints.MOST_WIDER):
        narrow, wide = set(), set()
        for state.sequence in range(1000, 200_001, 1000):
            narrow |= {state.sequence} if due(state, wider) else set()
            wide |= {state.sequence} if due(state, wider + 1) else set()
        assert wide < narrow
        assert len(wide) == len(narrow) // 2


async def test_a_replica_that_differs_says_so_is_named_and_takes_no_snapshots(fleet: Fleet) -> None:
    # Who is judged before the third has spoken has nobody's majority against it, and none with it.
    fleet.schedule = Schedule(wait_seconds=2)
    victim = await fleet.coordinator()
    others = [await fleet.router(), await fleet.router()]
    await live(fleet)
    await until(lambda: victim.state.sequence == others[0].state.sequence == others[1].state.sequence)
    # A flipped bit in memory, say.
    victim.state.parameters["x"] = 1.0
    logs.configure("warning")
    with capture_logs() as logged:
        await write_commits(fleet.client, 1000)
        await until(lambda: victim.replica.checkpoints.differs)
        await until(lambda: sum(entry["event"] == "other_replica_differs" for entry in logged) >= 2)
    loud = [entry for entry in logged if entry["event"] == "replica_differs"]
    assert {(entry["writer"], entry["log_level"]) for entry in loud} == {(victim.writer, "error")}
    assert [router.replica.checkpoints.differs for router in others] == [0, 0]
    findings = [finding for finding in judge(await examine(fleet.client, "default")) if finding.what == "digests"]
    assert [(finding.level, finding.message.split(". ")[0]) for finding in findings] == [
        ("problem", f"at sequence 1,000 {victim.writer} differ")
    ]
    assert await fleet.refused("coordinator.snapshot", messages.StatusRequest()) == "conflict"
    # It is the state that counts, not the verdict: put right, it is trusted again.
    del victim.state.parameters["x"]
    await write_commits(fleet.client, 1000)
    await until(lambda: not victim.replica.checkpoints.differs and 2000 in victim.replica.checkpoints.own)
    assert victim.replica.checkpoints.mismatches == 1
    assert (await fleet.ask("coordinator.snapshot", messages.StatusRequest()))["sequence"] >= 2000


async def test_strangers_on_the_checkpoint_subject_cost_little_and_change_nothing(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    router = await fleet.router()
    await live(fleet)
    own = coordinator.replica.checkpoints

    async def says(role: str, writer: str, sequence: int, found: str) -> None:
        where = f"kv.default.checkpoint.{role}.{writer}"
        await fleet.client.publish(where, msgspec.msgpack.encode(Checkpoint(writer, sequence, found)))

    for data in (b"", b"\xff" * 40, msgspec.msgpack.encode(Checkpoint(own.writer, 1000, "e" * 32))):
        await fleet.client.publish(f"kv.default.checkpoint.coordinator.{own.writer}", data)
        await fleet.client.publish("kv.default.checkpoint.me", data)
    # Speaks for another.
    forged = msgspec.msgpack.encode(Checkpoint("somebody else", 1000, "e" * 32))
    await fleet.client.publish("kv.default.checkpoint.router.me", forged)
    for number in range(3000):
        await says("router", "x", 1000 * number, "e" * (DIGEST_DIGITS + 1 - number % 2))
    logs.configure("warning")
    with capture_logs() as logged:
        # More votes than there are replicas, of writers that the log does not know.
        for number in range(2 * checkpoints.WRITERS_LIMIT):
            await says("router", f"router-{number}", 1000, "e" * 32)
        await write_commits(fleet.client, 1000)
        await until(lambda: 1000 in own.own and Voter("router", router.writer) in own._received.get(1000, ()))
        # Judged when others have had their time.
        await until(lambda: 1000 not in own._waiting)
        for number in range(500):
            await says("router", f"late-{number}", 1000, "e" * 32)
        await says("coordinator", "coordinator-last", 1000, own.own[1000])
        await until(lambda: Voter("coordinator", "coordinator-last") in own._received[1000])
    assert len(own._received) <= 2 * KEPT
    assert len(own._received[1000]) <= checkpoints.WRITERS_LIMIT
    assert not own.differs
    # A router that hears the forged digest long before the coordinator's own believes it for that while.
    assert [line for line in logged if "differs" in line["event"] and line["writer"] != router.writer] == []
    assert (await fleet.ask("coordinator.snapshot", messages.StatusRequest()))["sequence"] >= 1000


async def test_a_router_in_whose_name_another_speaks_has_no_vote_and_logging_is_bounded() -> None:
    state = FleetState("f")
    mine = Checkpoints(None, state, "coordinator-me")  # type: ignore[arg-type]
    writers = [f"router-{number}" for number in range(900)]
    state.writers = {(f"kv.f.access.{writer}", writer): 1 for writer in writers}
    mine.note(1000, "a" * 32)
    mine.compare(1000)
    logs.configure("warning")
    with capture_logs() as logged:
        for writer in writers[:3]:
            mine.receive(Checkpoint(writer, 1000, "b" * 32), "router")
        assert mine.differs == 1000
        for writer in writers[:3]:
            mine.receive(Checkpoint(writer, 1000, "a" * 32), "router")
        mine.receive(Checkpoint("coordinator-other", 1000, "a" * 32), "coordinator")
        assert not mine.differs
        for writer in writers:
            mine.receive(Checkpoint(writer, 1000, "b" * 32), "router")
    # Two coordinators agree.
    assert not mine.differs
    assert 0 < sum(len(str(line)) for line in logged) < 4000


def test_only_a_few_are_remembered() -> None:
    mine = Checkpoints(None, FleetState("f"), "me")  # type: ignore[arg-type]
    for number in range(1, 3 * KEPT):
        mine.note(number * 1000, "d" * 32)
        for writer in range(2 * checkpoints.WRITERS_LIMIT if number == 5 else 3):
            mine.receive(Checkpoint(str(writer), number * 1000, "d" * 32), "router")
    assert sorted(mine.own) == [number * 1000 for number in range(2 * KEPT, 3 * KEPT)]
    assert max(map(len, mine._received.values())) <= checkpoints.WRITERS_LIMIT


async def test_a_digest_on_demand_is_of_one_moment_and_made_once(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.router()
    await live(fleet)
    answers: list[dict[str, Any]] = []

    async def one() -> None:
        answers.append(await fleet.ask("coordinator.status", messages.StatusRequest(digest=True)))

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(one)
    assert {answer["digest"] for answer in answers if answer["sequence"] == coordinator.state.sequence} == {
        digest(coordinator.state)
    }


ASLEEP = """
import sys, time, anyio
from nats.micro import add_service
from kvplane.events.log.connection import connected
from kvplane.services.process.forked import Copy

def forever():
    time.sleep(600)
    return b""

async def main(url):
    async with connected([url], "victim") as client:
        await add_service(client, name="victim", version="1.0.0")
        await client.flush()
        copy = Copy(forever)
        print(copy._child, flush=True)
        await copy.result()

anyio.run(main, sys.argv[1], backend_options={"use_uvloop": True})
"""


async def test_a_copy_does_not_keep_the_connections_of_a_process_that_was_killed(
    server: Server, client: Client
) -> None:
    """Or requests would still be sent to it for as long as the copy works."""
    async with await anyio.open_process([sys.executable, "-c", ASLEEP, server.url], stderr=None) as process:
        assert process.stdout is not None
        child = int(await process.stdout.receive())
        try:
            assert len(await instances(client, "victim", seconds=2, enough=1)) == 1
            process.kill()
            await process.wait()
            os.kill(child, 0)
            with anyio.fail_after(10):
                while await served(client):
                    await anyio.sleep(0.05)
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


async def served(client: Client) -> bool:
    """Whether the server still has somebody to send a request to."""
    with suppress(NatsTimeoutError):
        try:
            await client.request("$SRV.PING.victim", b"", timeout=0.3)
        except NoRespondersError:
            return False
    return True


async def test_a_copy_leaves_with_the_one_who_waits_for_it() -> None:
    before = children()
    with anyio.move_on_after(0.1) as scope:
        await in_copy(partial(bytes, iter(partial(time.sleep, 600), 0)))
    assert scope.cancelled_caught
    assert children() <= before
