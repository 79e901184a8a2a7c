"""What the server lets a low role do, done with the worst intentions, while a fleet runs; and whether anybody notices.

Every subject that a role may publish to is sent what is empty, what is no JSON and what asks for something, each with every
reply subject that would do harm: the server's own API, the log, commands. Consumers are aimed at the same places.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from docs.reference.attempts import ANOTHER, FLEET, NODE, as_role
from docs.reference.raw import published
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.connection import connected
from kvplane.events.log.inboxes import CONSUMERS
from kvplane.events.log.snapshots import SnapshotStore
from kvplane.events.subjects import stream_name
from kvplane.projections.digest import digest
from kvplane.services.history.historian import Historian
from kvplane.services.protocol import messages
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from nats.aio.client import Client

    from docs.reference.attempts import Tried
    from kvplane.services.auth.folder import AuthFolder
    from kvplane.services.auth.roles import Role
    from kvplane.services.embedded.server import Server

LOW: tuple[Role, ...] = ("router", "historian", "node", "client")
"""Roles that may do their own work and nothing to the fleet's state but by it."""
LOG = stream_name(FLEET)
TARGETS = [
    "", f"$JS.API.STREAM.PURGE.{LOG}", f"$JS.API.STREAM.DELETE.{LOG}", f"$JS.API.STREAM.UPDATE.{LOG}",
    f"$JS.API.STREAM.PURGE.OBJ_{LOG}_snapshots", f"$O.{LOG}_snapshots.M.x", "$SRV.PING", "$SRV.INFO",
    *(f"kv.{FLEET}.{what}" for what in (
        "control", f"node.{NODE}", f"node.{ANOTHER}", f"cache.{ANOTHER}", "session.m", "access.router-1", f"pulse.{ANOTHER}",
        "checkpoint.coordinator.w", "coordinator.policy.set", "coordinator.compact", "coordinator.snapshot",
        "coordinator.node.remove", "coordinator.status", "route", "sql", "history.snapshot",
    )),
]  # fmt: skip
BODIES = (b"", b"junk", b"{}", b'{"policy":"cascade"}', b'{"node":"node-b"}', b'{"without_history":true}')
WAIT_SECONDS = 60.0


class Live:
    """A fleet that runs, and what must stay as it is."""

    def __init__(
        self, admin: Client, coordinator: Coordinator, router: Router, historian: Historian, server: Server
    ) -> None:
        self.admin = admin
        self.coordinator = coordinator
        self.router = router
        self.historian = historian
        self.server = server
        self.snapshots = SnapshotStore(admin, FLEET)
        self.sent = 0
        """How much was sent that the server let through."""

    async def seen(self) -> dict[str, Any]:
        """What others see of the fleet: nodes, sessions, policy, what runs, snapshots, and that nothing of the log is gone."""
        js = self.admin.jetstream()
        info = await js.stream_info(LOG)
        with anyio.fail_after(WAIT_SECONDS):
            # Behind what was sent, so that nothing is still on its way.
            while not (
                self.coordinator.state.sequence == self.router.state.sequence == self.historian.ingest.state.sequence
                == info.state.last_seq
            ):  # fmt: skip
                await anyio.sleep(0.01)
                info = await js.stream_info(LOG)
        for endpoint in ("coordinator.status", "history.status", f"router.{self.router.writer}.status"):
            await ask(self.admin, f"kv.{FLEET}.{endpoint}", messages.StatusRequest())
        state = self.coordinator.state
        return {
            "nodes": {
                name: (node.epoch, node.lost, node.cordoned, node.registered.address)
                for name, node in state.nodes.items()
            },
            "copies": {name: index.block_copies for name, index in state.caches.by_model.items()},
            "policy": (state.policy, str(state.parameters)),
            "sessions": list(state.sessions.items()),
            "running": dict(state.load.running),
            "digests": digest(state) == digest(self.router.state),
            "differs": (self.coordinator.replica.checkpoints.differs, self.router.replica.checkpoints.differs),
            "the log begins": info.state.first_seq,
            "the log has lost": info.state.last_seq - info.state.first_seq + 1 - info.state.messages,
            "the log is": str(info.config),
            "snapshots": [
                (sequence, len(await self.snapshots.get(sequence))) for sequence in await self.snapshots.sequences()
            ],
        }  # fmt: skip


@asynccontextmanager
async def live(server: Server, held: AuthFolder, folder: Path) -> AsyncIterator[Live]:
    """Services, two nodes, a session, a snapshot, under credentials."""
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:

        async def client(role: Role) -> Client:
            seed = held.seed_file(FLEET, role)
            return await stack.enter_async_context(connected([server.url], role, credentials=seed, ca=held.ca))

        coordinator = Coordinator(await client("coordinator"), FLEET)
        await group.start(coordinator.run)
        router = Router(await client("router"), FLEET)
        await group.start(router.run)
        historian = Historian(
            await client("historian"), FLEET, folder, servers=[server.url], ca=held.ca,
            credentials=held.seed_file(FLEET, "historian"),
        )  # fmt: skip
        await group.start(historian.run)
        admin = await client("admin")
        for node, mode in ((NODE, "reported"), (ANOTHER, "managed")):
            register = messages.RegisterRequest(
                node=node, address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 8}, cache_mode=mode
            )
            await ask(admin, f"kv.{FLEET}.coordinator.node.register", register)
        route = messages.RouteRequest(model="m", hashes=pack_hashes([1, 2]), session="s")
        with anyio.fail_after(WAIT_SECONDS):
            while len(router.state.nodes) < 2:  # noqa: ASYNC110 - it follows the log by itself
                await anyio.sleep(0.01)
        await ask(admin, f"kv.{FLEET}.route", route)
        await ask(admin, f"kv.{FLEET}.coordinator.snapshot", messages.StatusRequest())
        yield Live(admin, coordinator, router, historian, server)
        group.cancel_scope.cancel()


async def harmed(
    running: Live, held: AuthFolder, found: Tried, roles: Sequence[Role] = LOW
) -> dict[str, list[str]]:  # fmt: skip
    """What each low role could change that others see, by role; nothing where all is well."""
    changed: dict[str, list[str]] = {}
    objects = await running.admin.jetstream().stream_info(f"OBJ_{LOG}_snapshots", subjects_filter=">")
    targets = [*TARGETS, *(objects.state.subjects or {})]
    for role in roles:
        before = await running.seen()
        async with as_role(running.server, held, role) as (connection, words):
            may = [
                action.subject.format(**words)
                for action, able in found.allowed.items()
                if role in able and not action.listens
            ]
            worst = [
                published(subject, body, target)
                # Its own consumers it may make and remove as it likes.
                for subject in may
                # At the last one it gets an answer, as everyone who asks.
                for target in (*targets, f"_INBOX.{words['key']}.x")
                for body in BODIES
                if not (target == "" and subject.startswith("kv.") and not subject.endswith("complete"))
            ]
            aims = [target for target in targets if target][:CONSUMERS]
            if any(".CONSUMER.CREATE." in subject for subject in may):
                worst += [_aimed(f"{words['key']}-{number}", target) for number, target in enumerate(aims)]
            inboxes = [
                each.deliveries.inbox
                for each in (running.coordinator.replica.follower, running.router.replica.follower)
                if each.deliveries
            ]
            worst += [published(inbox, b"", TARGETS[1]) for inbox in inboxes]
            refused = await connection.refusals(worst)
            running.sent += len(worst) - len(refused)
        # What was asked of the server may still be done.
        quiet = 0
        while quiet < 3:
            quiet = 0 if await running.coordinator.strays.sweep() else quiet + 1
        after = await running.seen()
        changed |= {role: [what for what in before if before[what] != after[what]]}
        for stream in (LOG, f"OBJ_{LOG}_snapshots"):
            left = [
                info.name
                for info in await running.admin.jetstream().consumers_info(stream)
                if info.name.startswith(words["key"])
                and not (info.config.deliver_subject or "").startswith("_DELIVER.")
            ]
            changed[role] += [f"it left {name}" for name in left]
    return {role: what for role, what in changed.items() if what}


def _aimed(name: str, target: str) -> bytes:
    """A consumer under an own name that delivers all of the log to others, with heartbeats."""
    config = {
        "name": name, "durable_name": name, "deliver_subject": target, "deliver_policy": "all", "ack_policy": "none",
        "idle_heartbeat": 100_000_000,
    }  # fmt: skip
    body = json.dumps({"stream_name": LOG, "config": config}).encode()
    return published(f"$JS.API.CONSUMER.CREATE.{LOG}.{name}", body)
