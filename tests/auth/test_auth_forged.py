"""What a server can't forbid: answers that it sends where the asker says, and consumers that are aimed at others.

The fold, the writers and the services withstand it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from nats.micro.service import DEFAULT_QUEUE_GROUP
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.follow import replay
from kvplane.events.log.inboxes import consumer_names
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.subjects import access_name, token
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused
from kvplane.services.roles import strays
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.rpc.client import ask
from tests.support.waiting import until
from tests.support.with_credentials import NAME, OTHER, TRIED, Guarded, Stranger, guarded, last_sequence, subjects_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from kvplane.services.roles.router import Router

pytestmark = pytest.mark.anyio

COMMANDS = ["coordinator.policy.set", "coordinator.snapshot", "coordinator.compact", "coordinator.node.remove", "route"]
# Everything that is stored, commanded or obeyed.
TARGETS = [
    *subjects_of(NAME, ["control", "node.node-a", "node.node-b", "cache.node-b", "session.m", "access.router-1",
                        "pulse.node-b", *COMMANDS, "complete", "serve.node-b"]),
    f"$JS.API.STREAM.PURGE.KV_{NAME}", f"$JS.API.STREAM.DELETE.KV_{NAME}", f"$O.KV_{NAME}_snapshots.M.x",
    f"kv.{OTHER}.control", "$SRV.INFO",
]  # fmt: skip

LOGGED = tuple(subjects_of(NAME, ["control", "node.", "cache.", "session.", "access."]))


class Watched:
    """A fleet with nodes a and b, and what must stay as it is."""

    def __init__(
        self, fleet: Guarded, admin: Client, coordinator: Coordinator, router: Router, logged: list[Any]
    ) -> None:
        self.fleet = fleet
        self.logged = logged
        self.admin = admin
        self.coordinator = coordinator
        self.router = router
        self.before = self.meaning()

    def meaning(self) -> Any:
        """What the fold says of nodes, caches, sessions and policy."""
        state = self.coordinator.state
        nodes = {
            name: (node.epoch, node.lost, node.cordoned, {tier: state.caches.index(node.model).count(slot)
                                                          for tier, slot in node.slots.items()})
            for name, node in state.nodes.items()
        }  # fmt: skip
        return nodes, state.policy, list(state.sessions.items()), dict(state.load.running)

    def dropped(self) -> Counter[str]:
        """Requests that services received and did not take, by endpoint."""
        lines = [line for line in self.logged if line["event"] == "request_dropped"]
        return Counter(line["endpoint"].removeprefix(f"kv.{NAME}.") for line in lines)

    async def check_unmoved(self) -> None:
        """All junk is skipped, and both replicas and a fold from zero agree."""
        ends = await last_sequence(self.admin)
        await until(lambda: self.coordinator.state.sequence == self.router.state.sequence == ends)
        anew = FleetState(NAME)
        await replay(self.admin, NAME, anew.apply)
        assert digest(anew) == digest(self.coordinator.state) == digest(self.router.state)
        assert self.meaning() == self.before
        assert await SnapshotStore(self.admin, NAME).sequences() == []


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    # What is aimed at others is to arrive there, before a coordinator takes it away.
    monkeypatch.setattr(strays, "LOOK_SECONDS", 3600)
    async with guarded(tmp_path) as fleet:
        logs.configure("warning")
        admin = await fleet.connect("admin")
        coordinator = await fleet.coordinator()
        router = await fleet.router()
        for node, mode in (("node-a", "reported"), ("node-b", "managed")):
            request = messages.RegisterRequest(node=node, address="x", models=[node], block_size=16, capacity_blocks={"gpu": 8},
                                          cache_mode=mode)  # fmt: skip
            await ask(admin, f"kv.{NAME}.coordinator.node.register", request)
        await until(lambda: len(router.state.nodes) == 2)
        with capture_logs() as logged:
            yield Watched(fleet, admin, coordinator, router, logged)
        print(f"\n{TRIED}", end=" ")  # noqa: T201 - a figure for whoever runs this with -s


def stored(epoch: int, batch: int = 1) -> bytes:
    return codec.encode([types.BlocksStored("node-a", epoch, batch, pack_hashes([batch]))])


async def test_an_acknowledgement_that_is_sent_to_an_event_subject_changes_nothing(watched: Watched) -> None:
    node = await watched.fleet.stranger("node", "node-a")
    before, landed = await last_sequence(watched.admin), 0
    for target in TARGETS:
        # Malformed, so that the node's own cache stays the same as well.
        await node.sent(f"kv.{NAME}.cache.node-a", b"junk", reply=target)
        TRIED.withstood += 1
        landed += 1 + target.startswith(LOGGED)
    # A stream stores and acknowledges in order: with the first of these all acknowledgements are on their way, with the second
    # all that land on the log have landed.
    for _ in range(2):
        await node.client.request(f"kv.{NAME}.cache.node-a", b"junk", timeout=5)
        landed += 1
    assert await last_sequence(watched.admin) == before + landed
    # A command that nobody waits for is dropped; `complete` needs no answer, and reads what makes no sense to it.
    await until(lambda: watched.dropped() == Counter(COMMANDS))
    await until(lambda: watched.coordinator.bad_heartbeats == 1)
    await until(lambda: sum(watched.router.tally.answers.values()) == 1)
    await watched.check_unmoved()
    assert sum(watched.coordinator.state.skipped.values()) == landed


async def test_a_service_answers_to_no_event_subject_and_does_not_do_what_was_asked(
    watched: Watched, tmp_path: Path
) -> None:
    await watched.fleet.historian(tmp_path / "history")
    client = await watched.fleet.stranger("client")
    asked = {
        "route": messages.RouteRequest(model="node-a", hashes=pack_hashes([1, 2])),
        "complete": messages.CompleteRequest(request="r", node="node-a"),
        "coordinator.node.list": messages.ListRequest(),
        "coordinator.status": messages.StatusRequest(),
        "sql": messages.SqlRequest(sql="SELECT 1"),
        "explain": messages.ExplainRequest(request="r"),
        "history.status": messages.StatusRequest(),
    }
    before = await last_sequence(watched.admin)
    for target in TARGETS:
        for endpoint, request in asked.items():
            await client.sent(f"kv.{NAME}.{endpoint}", msgspec.json.encode(request), reply=target)
            TRIED.withstood += 1
        for verb in ("PING", "INFO", "STATS"):
            await client.sent(f"$SRV.{verb}", b"", reply=target)
            TRIED.withstood += 1
    await until(lambda: watched.dropped() == Counter([*asked] * len(TARGETS)))
    for verb in ("PING", "INFO", "STATS"):
        await listed(client.client, f"$SRV.{verb}", services=3)
    assert await last_sequence(watched.admin) == before
    await watched.check_unmoved()


async def listed(client: Client, verb: str, *, services: int) -> None:
    """Wait until so many services have answered; each does so in the order in which it was asked."""
    answers: list[Msg] = []

    async def take(message: Msg) -> None:
        answers.append(message)

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=take)
    await client.publish(verb, b"", reply=inbox)
    await until(lambda: len(answers) == services)


async def delivered(admin: Client, last: int) -> bool:
    """Whether every consumer that somebody listens to has delivered all of the log."""
    consumers = await admin.jetstream().consumers_info(f"KV_{NAME}")
    return all(
        consumer.delivered is not None and consumer.delivered.stream_seq == last
        for consumer in consumers
        if consumer.push_bound
    )


async def aimed(admin: Client, stranger: Stranger, target: str, body: bytes) -> dict[str, Any]:
    """Write a body where the stranger may, and have the server deliver it to a target; the server's answer."""
    await stranger.sent(f"kv.{NAME}.access.aimed", body)
    TRIED.withstood += 1
    taken = {info.name for info in await admin.jetstream().consumers_info(f"KV_{NAME}")}
    # The service with the same key has one of its names.
    name = next(name for name in consumer_names(stranger.key) if name not in taken)
    config = {"name": name, "deliver_subject": target, "deliver_policy": "all", "ack_policy": "none",
              "inactive_threshold": 10**10}  # fmt: skip
    if target.removeprefix(f"kv.{NAME}.") in [*COMMANDS, "complete"]:
        # Services listen as this group, and a server delivers to nobody else there.
        config["deliver_group"] = DEFAULT_QUEUE_GROUP
    request = json.dumps({"stream_name": f"KV_{NAME}", "config": config}).encode()
    answer = await stranger.client.request(f"$JS.API.CONSUMER.CREATE.KV_{NAME}.{name}", request, timeout=5)
    created: dict[str, Any] = json.loads(answer.data)
    return created


async def test_a_consumer_that_is_aimed_at_a_service_or_a_stream_changes_nothing(watched: Watched) -> None:
    """Only those that read the log may make consumers. One of them aims what it wrote at what it may not write."""
    other = Appender(await watched.fleet.connect("coordinator", fleet=OTHER), OTHER, new_writer("coordinator"))
    admin_there = await watched.fleet.connect("admin", fleet=OTHER)
    there = Coordinator(other.client, OTHER)
    await watched.fleet.group.start(there.run)
    router = await watched.fleet.stranger("router")
    policy = msgspec.json.encode(messages.PolicyRequest(policy="cascade"))
    refused = 0
    for target in TARGETS:
        body = codec.encode([types.PolicyChanged("cascade", {})]) if target.startswith(f"kv.{OTHER}.") else policy
        refused += "error" in await aimed(watched.admin, router, target, body)
    assert refused == sum(target.startswith(LOGGED) for target in TARGETS)
    # Each consumer delivers all of the log.
    ends = await last_sequence(watched.admin)
    await until(lambda: watched.dropped() == Counter([*COMMANDS, "complete"] * ends))
    await listed(watched.admin, "$SRV.INFO", services=3)
    # A server knows of no interest in a subject that is subscribed to with a wildcard.
    assert watched.coordinator.bad_heartbeats == 0
    await watched.check_unmoved()
    # The other fleet's log takes what is delivered to it, and its fold takes nothing of that.
    await until(lambda: delivered(watched.admin, ends))
    last = (await admin_there.jetstream().publish(f"kv.{OTHER}.control", b"junk")).seq
    assert last > 1
    await until(lambda: there.state.sequence == last)
    assert (there.state.policy, there.state.commits) == ("ttft", 0)
    assert there.state.skipped == {"foreign_subject": last - 1, "invalid": 1}


async def test_a_consumer_that_is_aimed_at_someones_inbox_is_not_believed(watched: Watched) -> None:
    router = await watched.fleet.stranger("router")
    follower = watched.coordinator.replica.follower
    assert follower.deliveries is not None
    inbox = follower.deliveries.inbox
    assert "error" not in await aimed(watched.admin, router, inbox, b"junk")
    await router.sent(f"kv.{NAME}.access.more", b"junk")
    ends = await last_sequence(watched.admin)
    await until(lambda: delivered(watched.admin, ends))
    # What comes on the same connection afterwards is answered afterwards.
    await ask(watched.admin, f"kv.{NAME}.coordinator.status", messages.StatusRequest())
    await watched.check_unmoved()
    assert follower.restarts == 0
    for role, name in (("client", ""), ("node", "node-a")):
        stranger = await watched.fleet.stranger(role, name)  # type: ignore[arg-type]
        await stranger.refused_publish(
            f"$JS.API.CONSUMER.CREATE.KV_{NAME}.x", f"$JS.API.CONSUMER.CREATE.KV_{NAME}.x.{inbox}"
        )


async def test_an_id_that_was_seen_does_not_suppress_what_it_was_for(watched: Watched) -> None:
    """A node hears its own changes with their ids. Ids are the stream's, so it can use one on a subject of its own."""
    node = await watched.fleet.stranger("node", "node-a")
    seen: list[Msg] = []

    async def on_message(message: Msg) -> None:
        seen.append(message)

    await node.client.subscribe(f"kv.{NAME}.node.node-a", cb=on_message)
    await node.settle()
    await ask(watched.admin, f"kv.{NAME}.coordinator.node.cordon", messages.NodeRequest(node="node-a"))
    await until(lambda: seen)
    identity = (seen[0].headers or {})["Nats-Msg-Id"]
    assert len(identity.rpartition(".")[2]) == 32
    before = await last_sequence(watched.admin)
    await node.sent(f"kv.{NAME}.cache.node-a", b"junk", headers={"Nats-Msg-Id": identity})
    assert await last_sequence(watched.admin) == before
    TRIED.withstood += 1

    # The worst case: the node's message is stored first, and then the coordinator's own.
    appender = Appender(await watched.fleet.connect("coordinator"), NAME, new_writer("coordinator"))
    stolen, made = "stolen", appender._headers
    appender._headers = lambda subject, body: made(subject, body) | {"Nats-Msg-Id": stolen}  # type: ignore[method-assign]
    await node.sent(f"kv.{NAME}.cache.node-a", b"junk", headers={"Nats-Msg-Id": stolen})
    sequence = await appender.append(f"kv.{NAME}.node.node-a", [types.NodeUncordoned("node-a")])
    kept = await watched.admin.jetstream().get_msg(f"KV_{NAME}", sequence)
    assert kept.subject == f"kv.{NAME}.node.node-a"
    TRIED.withstood += 1
    await watched.check_unmoved()


async def test_a_node_speaks_for_itself_only_wherever_it_may_write(watched: Watched) -> None:
    node = await watched.fleet.stranger("node", "node-a")
    epoch = watched.coordinator.state.nodes["node-b"].epoch
    own = f"kv.{NAME}.access.{token(access_name('node-a'))}"
    before = sum(watched.coordinator.state.skipped.values())
    forged = [
        (f"kv.{NAME}.cache.node-a", types.BlocksStored("node-b", epoch, 1, pack_hashes([1]))),
        (f"kv.{NAME}.cache.node-a", types.CacheCleared("node-b", epoch, 1)),
        (own, types.RequestCompleted("r", "node-b")),
        (own, types.RequestRouted("r", "node-b", "node-b", 0, 0, 1, b"")),
        (own, types.RequestRouted("r", "node-a", "node-a", 0, 0, 1, b"")),
    ]
    for subject, event in forged:
        await node.sent(subject, codec.encode([event]))
        TRIED.withstood += 1
    await until(lambda: sum(watched.coordinator.state.skipped.values()) == before + len(forged))
    assert watched.coordinator.state.skipped == {"wrong_subject": len(forged)}
    await watched.check_unmoved()

    register = messages.RegisterRequest(node="node-b", address="mine", models=["m"], block_size=16, capacity_blocks={"gpu": 1},
                                   replace=True)  # fmt: skip
    admit = messages.AdmitRequest(model="node-b", node="node-b", hashes=pack_hashes([1]))
    for what, request in (("node.register", register), ("cache.admit", admit)):
        with pytest.raises(Refused, match="of node 'node-a'") as caught:
            await ask(node.client, f"kv.{NAME}.coordinator.{what}.node-a", request)
        assert caught.value.status == 403
        TRIED.withstood += 1
    heartbeat = msgspec.msgpack.encode(
        messages.Heartbeat(node="node-b", epoch=epoch, active=0, waiting=0, used_blocks=0)
    )
    await node.sent(f"kv.{NAME}.pulse.node-a", heartbeat)
    own_heartbeat = messages.Heartbeat(node="node-a", epoch=watched.coordinator.state.nodes["node-a"].epoch)
    await node.sent(f"kv.{NAME}.pulse.node-a", msgspec.msgpack.encode(own_heartbeat))
    await until(lambda: "node-a" in watched.coordinator.liveness.heartbeats)
    assert "node-b" not in watched.coordinator.liveness.heartbeats
    TRIED.withstood += 1
    # What it may say of itself is taken.
    await node.sent(own, codec.encode([types.RequestCompleted("r", "node-a")]))
    await until(lambda: watched.coordinator.state.ignored.get("unknown_request"))


async def test_an_answer_can_not_be_guessed_by_one_who_has_answered_before(watched: Watched) -> None:
    """A node that serves learns the inbox of the one who asks. What is asked next goes to another."""
    node = await watched.fleet.stranger("node", "node-a")
    client = await watched.fleet.connect("client")
    replies: list[str] = []

    async def serve(message: Msg) -> None:
        replies.append(message.reply)
        await message.respond(b"x")

    await node.client.subscribe(f"kv.{NAME}.serve.node-a", cb=serve)
    await node.settle()
    for _ in range(2):
        await client.request(f"kv.{NAME}.serve.node-a", b"x", timeout=5)
    first, second = (reply.rpartition(".")[2] for reply in replies)
    assert len(first) == len(second) == 26
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 8
    TRIED.withstood += 1
