"""What each role may publish and subscribe to: the whole table.

Everything that is not listed is refused. `{f}` is the fleet, `{log}` its stream, `{box}` the bucket of its snapshots and
`{snapshots}` the bucket's stream, `{name}` the name of a node as a subject token, `{access}` its token in the room `access`.

Nobody but the admin may delete or change a stream, nobody at all a consumer. Nobody may get messages directly: the server sends
them to any subject that the asker names, with the body that a writer chose, so whoever may get could write anything anywhere.
For the same reason those that may not read the log may not make consumers (decision 14).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from kvplane.events.subjects import access_name, check_fleet, stream_name, token

if TYPE_CHECKING:
    from collections.abc import Sequence

Role = Literal["admin", "coordinator", "router", "historian", "node", "client"]
ROLES: tuple[Role, ...] = ("admin", "coordinator", "router", "historian", "node", "client")

INBOXES = "_INBOX.>"

# Following the log: is it there, a consumer of all of it, flow control, and the message behind a sequence.
_READ_LOG = (
    "$JS.API.STREAM.INFO.{log}", "$JS.API.STREAM.MSG.GET.{log}", "$JS.API.CONSUMER.CREATE.{log}.*", "$JS.FC.{log}.>",
)  # fmt: skip
# A bucket is a stream; its client looks the stream up by a subject and reads chunks with an ordered consumer.
_READ_SNAPSHOTS = (
    "$JS.API.STREAM.INFO.{snapshots}", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.MSG.GET.{snapshots}",
    "$JS.API.CONSUMER.CREATE.{snapshots}", "$JS.API.CONSUMER.CREATE.{snapshots}.>", "$JS.FC.{snapshots}.>",
)  # fmt: skip
_WRITE_SNAPSHOTS = (
    "$O.{box}.C.*", "$O.{box}.M.*", "$JS.API.STREAM.CREATE.{snapshots}", "$JS.API.STREAM.PURGE.{snapshots}",
)  # fmt: skip
# Digests at checkpoints, and a state from the history where no snapshot leads to the log.
_BE_REPLICA = ("kv.{f}.checkpoint.*", "kv.{f}.history.snapshot", "kv.{f}.history.*.piece", INBOXES)
_LIST_SERVICES = ("$SRV.PING", "$SRV.PING.>", "$SRV.INFO", "$SRV.INFO.>", "$SRV.STATS", "$SRV.STATS.>")
_ASK = (
    "kv.{f}.route", "kv.{f}.complete", "kv.{f}.serve.*", "kv.{f}.sql", "kv.{f}.sql.*", "kv.{f}.explain",
    "kv.{f}.history.state", "kv.{f}.history.changes", "kv.{f}.history.sequence", "kv.{f}.history.snapshot",
    "kv.{f}.history.*.piece", "kv.{f}.history.status", "kv.{f}.history.*.status", "kv.{f}.coordinator.node.list",
    "kv.{f}.coordinator.cache.lookup", "kv.{f}.coordinator.format.show", "kv.{f}.coordinator.status",
    "kv.{f}.coordinator.*.status", "kv.{f}.router.*.status",
)  # fmt: skip

PUBLISH: dict[Role, tuple[str, ...]] = {
    "admin": (
        "kv.{f}.>", *_LIST_SERVICES, *_READ_LOG, *_READ_SNAPSHOTS, *_WRITE_SNAPSHOTS,
        "$JS.API.INFO", "$JS.API.STREAM.LIST", "$JS.API.STREAM.*.{log}", "$JS.API.STREAM.*.{snapshots}",
        "$JS.API.STREAM.LEADER.STEPDOWN.{log}", "$JS.API.STREAM.PEER.REMOVE.{log}",
        "$JS.API.CONSUMER.NAMES.{log}", "$JS.API.CONSUMER.LIST.{log}", "$JS.API.CONSUMER.INFO.{log}.*",
        # A backup goes on as its pieces are acknowledged; a restore sends them.
        "$JS.SNAPSHOT.ACK.{log}.>", "$JS.SNAPSHOT.RESTORE.{log}.>",
    ),
    "coordinator": (
        "kv.{f}.node.*", "kv.{f}.cache.*", "kv.{f}.session.*", "kv.{f}.control", "kv.{f}.history.status",
        "kv.{f}.history.*.status", *_BE_REPLICA, *_LIST_SERVICES,
        "$JS.API.STREAM.CREATE.{log}", "$JS.API.STREAM.PURGE.{log}", *_READ_LOG, *_READ_SNAPSHOTS, *_WRITE_SNAPSHOTS,
    ),
    "router": ("kv.{f}.access.*", "kv.{f}.session.*", *_BE_REPLICA, *_READ_LOG, *_READ_SNAPSHOTS),
    "historian": (INBOXES, *_READ_LOG, *_READ_SNAPSHOTS),
    "node": (
        "kv.{f}.cache.{name}", "kv.{f}.access.{access}", "kv.{f}.pulse.{name}", "kv.{f}.coordinator.node.register.{name}",
        "kv.{f}.coordinator.cache.admit.{name}", "kv.{f}.coordinator.node.last.{name}",
        "kv.{f}.coordinator.cache.names.{name}", "kv.{f}.coordinator.*.piece", INBOXES,
    ),
    "client": (*_ASK, *_LIST_SERVICES),
}  # fmt: skip
"""Subjects that a role may publish to. `INBOXES` is for those that answer."""


def _listed(service: str) -> tuple[str, ...]:
    """Where a micro service hears that services are listed."""
    verbs = ("PING", "INFO", "STATS")
    return tuple(f"$SRV.{verb}{what}" for verb in verbs for what in ("", f".{service}", f".{service}.*"))


SUBSCRIBE: dict[Role, tuple[str, ...]] = {
    "admin": ("kv.{f}.>",),
    "coordinator": ("kv.{f}.coordinator.>", "kv.{f}.pulse.*", "kv.{f}.checkpoint.*", *_listed("kvplane-coordinator")),
    "router": (
        "kv.{f}.route", "kv.{f}.complete", "kv.{f}.router.*.status", "kv.{f}.router.*.flush", "kv.{f}.checkpoint.*",
        *_listed("kvplane-router"),
    ),
    "historian": (
        "kv.{f}.sql", "kv.{f}.sql.*", "kv.{f}.explain", "kv.{f}.history.*", "kv.{f}.history.*.piece", "kv.{f}.history.*.status",
        *_listed("kvplane-historian"),
    ),
    "node": ("kv.{f}.node.{name}", "kv.{f}.serve.{name}", *_listed("kvplane-simnode")),
    "client": (),
}  # fmt: skip
"""Subjects that a role may subscribe to, beside its own inboxes: `_INBOX.<public key>.>`."""


class Permissions(NamedTuple):
    """What one user may do."""

    publish: Sequence[str]
    subscribe: Sequence[str]


def permissions(role: Role, fleet: str, key: str, name: str = "") -> Permissions:
    """Permissions of a user with this public key. `name` matters for nodes only."""
    log = stream_name(check_fleet(fleet))
    words = {"f": fleet, "log": log, "box": f"{log}_snapshots", "snapshots": f"OBJ_{log}_snapshots"}
    if role == "node":
        words |= {"name": token(name), "access": token_of_access(name)}
    publish = [subject.format(**words) for subject in PUBLISH[role]]
    subscribe = [f"_INBOX.{key}.>", *(subject.format(**words) for subject in SUBSCRIBE[role])]
    return Permissions(list(dict.fromkeys(publish)), list(dict.fromkeys(subscribe)))


def token_of_access(node: str) -> str:
    """Subject token under which a node writes what it completed."""
    return token(access_name(node))
