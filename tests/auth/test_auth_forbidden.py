"""Each role logs in and tries what is not its own; the server refuses every single thing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvplane.events.log.inboxes import CONSUMERS
from kvplane.services.auth.roles import ROLES, permissions
from tests.support.with_credentials import NAME, OTHER, TRIED, Guarded, Stranger, guarded, last_sequence, subjects_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvplane.services.auth.roles import Role

pytestmark = pytest.mark.anyio

LOG = f"KV_{NAME}"
BOX = f"{LOG}_snapshots"
OBJECTS = f"OBJ_{BOX}"
PLAIN: tuple[Role, ...] = ("coordinator", "router", "historian", "client")

COMMANDS = [
    "node.register", "node.cordon", "node.uncordon", "node.remove", "cache.admit", "cache.touch", "cache.evict",
    "session.end", "policy.set", "snapshot", "compact", "node.register.node-b", "cache.admit.node-b",
    "node.last", "cache.names", "node.last.node-b", "cache.names.node-b",
    "node.leave", "node.leave.node-b",
]  # fmt: skip
# What the log is made of, as far as a role has no right to it.
TOPICS: dict[str, list[str]] = {
    "coordinator": ["access.router-1", "access.node%2Fnode-a"],
    "router": ["node.node-a", "cache.node-a", "control"],
    "historian": ["node.node-a", "cache.node-a", "control", "session.m", "access.router-1"],
    "client": ["node.node-a", "cache.node-a", "control", "session.m", "access.client", "access.router-1"],
    "node": [
        "node.node-a", "node.node-b", "cache.node-b", "control", "session.m", "access.router-1", "access.node-a",
        "access.node%2Fnode-b", "cache.node-a.x",
    ],
}  # fmt: skip
# What changes streams or gets around the order of the log, refused to everyone but the admin.
CHANGES = [
    *(f"$JS.API.STREAM.{what}.{stream}" for what in ("UPDATE", "DELETE", "SNAPSHOT", "RESTORE", "MSG.DELETE")
      for stream in (LOG, OBJECTS)),
    f"$JS.API.STREAM.PEER.REMOVE.{LOG}", f"$JS.API.STREAM.LEADER.STEPDOWN.{LOG}", "$JS.API.STREAM.CREATE.mine",
    "$JS.API.ACCOUNT.PURGE.x", "$JS.API.META.LEADER.STEPDOWN",
]  # fmt: skip
# For the admin and for coordinators, which purge the log and take away consumers that are aimed at others.
CLEANS = [
    *(f"$JS.API.{what}.{stream}" for what in ("STREAM.PURGE", "CONSUMER.LIST") for stream in (LOG, OBJECTS)),
    *(f"$JS.API.CONSUMER.DELETE.{stream}.x" for stream in (LOG, OBJECTS)),
]  # fmt: skip
# Refused to everyone.
NOBODY = [
    f"$JS.API.CONSUMER.CREATE.{OBJECTS}", f"$JS.API.CONSUMER.CREATE.{OBJECTS}.x", f"$JS.API.CONSUMER.CREATE.{LOG}.x.y",
    f"$JS.API.CONSUMER.DURABLE.CREATE.{LOG}.x", f"$JS.API.CONSUMER.CREATE.{LOG}", f"$JS.API.CONSUMER.MSG.NEXT.{LOG}.x",
    f"$JS.API.CONSUMER.PAUSE.{LOG}.x", f"$JS.API.CONSUMER.UNPIN.{LOG}.x", f"$JS.API.CONSUMER.LEADER.STEPDOWN.{LOG}.x",
    f"$JS.API.DIRECT.GET.{LOG}", f"$JS.API.DIRECT.GET.{LOG}.kv.{NAME}.control", f"$JS.API.DIRECT.GET.{OBJECTS}",
    f"$JS.ACK.{LOG}.x.1.1.1.1.0", f"$JS.API.STREAM.INFO.KV_{OTHER}", f"$JS.API.STREAM.PURGE.KV_{OTHER}",
    f"$JS.API.CONSUMER.CREATE.KV_{OTHER}.x", f"$JS.API.STREAM.MSG.GET.KV_{OTHER}", f"$JS.API.STREAM.DELETE.KV_{OTHER}",
    f"$JS.API.STREAM.UPDATE.KV_{OTHER}", f"kv.{OTHER}.control", f"kv.{OTHER}.cache.node-a", f"kv.{OTHER}.node.node-a",
    f"kv.{OTHER}.coordinator.policy.set", f"kv.{OTHER}.route", f"$O.KV_{OTHER}_snapshots.C.x",
    "$SYS.REQ.SERVER.PING", "$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.REQ.SERVER.X.RELOAD", "$SYS.REQ.CLAIMS.UPDATE",
    "anything", "kv", ">",
]  # fmt: skip
READS = [f"$JS.API.STREAM.MSG.GET.{LOG}", f"$JS.API.CONSUMER.CREATE.{LOG}.x",
         f"$JS.API.CONSUMER.CREATE.{LOG}.x.kv.{NAME}.control",
         f"$JS.API.STREAM.INFO.{LOG}", f"$JS.API.CONSUMER.NAMES.{LOG}", f"$JS.API.CONSUMER.LIST.{LOG}",
         f"$JS.API.CONSUMER.INFO.{LOG}.x", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST", "$JS.API.INFO"]  # fmt: skip


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as running:
        # With a log, a bucket of snapshots and another fleet, so that what is refused would have had an effect.
        admin = await running.connect("admin")
        await (await running.coordinator()).compaction.take()
        ends = await last_sequence(admin)
        assert (await admin.jetstream().stream_info(OBJECTS)).state.messages > 0
        yield running
        assert await last_sequence(admin) == ends
        print(f"\n{TRIED}", end=" ")  # noqa: T201 - a figure for whoever runs this with -s


async def everyone(fleet: Guarded) -> list[Stranger]:
    strangers = [await fleet.stranger(role) for role in ("admin", *PLAIN)]
    return [*strangers, await fleet.stranger("node", "node-a")]


async def test_nobody_writes_what_another_role_writes(fleet: Guarded) -> None:
    objects = [f"$O.{BOX}.M.x", f"$O.{BOX}.C.x"]
    for role in PLAIN:
        stranger = await fleet.stranger(role)
        await stranger.refused_publish(*subjects_of(NAME, TOPICS[role]), *(objects if role != "coordinator" else []))
    node = await fleet.stranger("node", "node-a")
    await node.refused_publish(*subjects_of(NAME, TOPICS["node"]), *objects)


async def test_only_the_admin_commands_and_a_node_for_itself(fleet: Guarded) -> None:
    for role in PLAIN:
        await (await fleet.stranger(role)).refused_publish(
            *subjects_of(NAME, [f"coordinator.{name}" for name in COMMANDS])
        )
    node = await fleet.stranger("node", "node-a")
    await node.refused_publish(*subjects_of(NAME, [f"coordinator.{name}" for name in COMMANDS]))
    await node.refused_publish(
        *subjects_of(NAME, ["pulse.node-b", "serve.node-b", "route", "complete", "sql", "explain"])
    )
    await (await fleet.stranger("client")).refused_publish(*subjects_of(NAME, ["pulse.node-a", "history.whatif"]))


async def test_nobody_changes_streams_or_deletes_consumers_or_reaches_another_fleet_or_the_system(
    fleet: Guarded,
) -> None:
    for stranger in await everyone(fleet):
        if stranger.label != "admin":
            await stranger.refused_publish(*CHANGES)
            await stranger.refused_publish(*(CLEANS if stranger.label != "coordinator" else []))
        else:
            await stranger.refused_publish("$JS.API.STREAM.CREATE.mine", "$JS.API.ACCOUNT.PURGE.x")
        await stranger.refused_publish(*NOBODY)
        others = [user.key for user in fleet.held.users if user.key != stranger.key][:3]
        await stranger.refused_publish(*(f"_DELIVER.{key}.stranger" for key in (*others, stranger.key)))
        if stranger.label != "admin":
            names = ["x", *(f"{key}-0" for key in others), f"{stranger.key}-{CONSUMERS}"]
            await stranger.refused_publish(
                *(f"$JS.API.CONSUMER.CREATE.{stream}.{name}" for stream in (LOG, OBJECTS) for name in names),
                *(f"$JS.FC.{LOG}.{name}.token" for name in names),
            )


async def test_those_that_do_not_read_the_log_see_nothing_of_it(fleet: Guarded) -> None:
    """Message ids are 128 random bits; who can't see one can't use it again."""
    for stranger in (await fleet.stranger("client"), await fleet.stranger("node", "node-a")):
        await stranger.refused_publish(*READS)
        await stranger.refused_subscribe(
            *subjects_of(NAME, ["node.*", "node.node-b", "cache.*", "cache.node-a", "cache.node-b", "session.*", "access.*",
                                "access.router-1", "control", "*.*", ">"]),
        )  # fmt: skip
    for role in ("router", "historian", "coordinator"):
        stranger = await fleet.stranger(role)
        await stranger.refused_subscribe(*subjects_of(NAME, ["node.*", "cache.*", "control", "access.*", ">"]))


async def test_nobody_hears_what_is_for_others(fleet: Guarded) -> None:
    keys = {user.key for user in fleet.held.users}
    for stranger in await everyone(fleet):
        others = sorted(keys - {stranger.key})[:4]
        await stranger.refused_subscribe(
            "_INBOX.>", "_INBOX.*.>", "_DELIVER.>", "_DELIVER.*.>", "_SERVED.>", "_SERVED.*.>", "_SERVED.node-a.>",
            "_SERVED.*.*.*.*", "_INBOX.*.stranger.>", "_INBOX.*", ">", "*", "*.>", "$SYS.>", "$JS.>", "$JS.API.>",
            "$JS.ACK.>", "$JS.EVENT.ADVISORY.>", "$O.>", f"kv.{OTHER}.>", f"kv.{OTHER}.route", f"$O.{BOX}.>",
            *(f"_DELIVER.{key}.>" for key in others), *(f"_SERVED.*.{key}.*.*" for key in others),
            *(f"_INBOX.{key}.>" for key in others), *(f"_INBOX.{key}.stranger.*" for key in others),
        )  # fmt: skip


async def test_nobody_answers_for_a_service_that_it_is_not(fleet: Guarded) -> None:
    answered = {
        "router": ["route", "complete"],
        "historian": ["sql", "explain", "history.status", "history.state"],
        "coordinator": ["coordinator.status", "coordinator.policy.set", "coordinator.node.register", "pulse.*"],
        "node": ["serve.node-b", "serve.*"],
    }
    listed = {"router": "kvplane-router", "historian": "kvplane-historian", "coordinator": "kvplane-coordinator"}
    strangers = [stranger for stranger in await everyone(fleet) if stranger.label != "admin"]
    for stranger in strangers:
        for role, endpoints in answered.items():
            if role == "node" or not stranger.label.startswith(role):
                await stranger.refused_subscribe(*subjects_of(NAME, endpoints))
                await stranger.refused_subscribe(*subjects_of(NAME, endpoints), queue="q")
        for role, service in listed.items():
            if not stranger.label.startswith(role):
                await stranger.refused_subscribe(f"$SRV.INFO.{service}", f"$SRV.PING.{service}")
    await (await fleet.stranger("client")).refused_subscribe("$SRV.INFO", "$SRV.PING", "$SRV.>")


async def test_a_client_may_ask_but_not_answer(fleet: Guarded) -> None:
    """Those that serve nobody have no business with others' inboxes."""
    inboxes = [f"_INBOX.{user.key}.stranger.x" for user in fleet.held.users][:6]
    for role in ("client", "admin"):
        await (await fleet.stranger(role)).refused_publish(*inboxes, "_SERVED.node-a.key.life.token")
    node = await fleet.stranger("node", "node-a")
    # A node answers those that sent it a request, and writes to no other inbox.
    await node.refused_publish(*inboxes, "_SERVED.node-b.key.life.token", "_SERVED.node-a")
    await node.sent("_SERVED.node-a.key.life.token", b"")


async def test_a_consumer_that_is_made_for_one_subject_must_say_so(fleet: Guarded) -> None:
    """Whoever may read all of the log names no filter; the server binds a filter to the API's subject."""
    router = await fleet.stranger("router")
    name = f"{router.key}-0"
    config = {"name": name, "deliver_subject": f"_DELIVER.{router.key}.x", "ack_policy": "none", "durable_name": name,
              "filter_subject": f"kv.{NAME}.control"}  # fmt: skip
    request = json.dumps({"stream_name": f"KV_{OTHER}", "config": config}).encode()
    answer = json.loads((await router.client.request(f"$JS.API.CONSUMER.CREATE.{LOG}.{name}", request, timeout=5)).data)
    assert "error" in answer
    TRIED.withstood += 1


def test_no_role_may_what_nobody_may() -> None:
    for role in ROLES:
        allowed = permissions(role, NAME, "KEY", "node-a")
        assert not [
            s
            for s in allowed.publish
            if s.startswith((">", "_DELIVER")) or "DIRECT" in s or "DURABLE" in s or "SYS" in s
        ]
        assert [s for s in allowed.subscribe if s.startswith("_INBOX")] == ["_INBOX.KEY.>"]
        own = ("_INBOX.KEY.", "_DELIVER.KEY.", "_SERVED.*.KEY.")
        assert all(s.startswith((*own, f"kv.{NAME}.", "$SRV.")) for s in allowed.subscribe)
        if role not in {"admin", "coordinator"}:
            cleans = [s for s in allowed.publish if ".PURGE." in s or ".DELETE." in s]
            assert [s for s in cleans if ".CONSUMER.DELETE." not in s or ".KEY-" not in s] == []
