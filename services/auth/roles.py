"""What each role may publish and subscribe to: the whole table. Who may ask which endpoint is in `protocol.endpoints`.

Everything that is not listed is refused. `{f}` is the fleet, `{log}` its stream, `{box}` the bucket of its snapshots and
`{snapshots}` the bucket's stream, `{name}` the name of a node as a subject token, `{access}` its token in the topic `access`.

Nobody but the admin may delete or change a stream. Nobody may get messages directly: the server sends them to any subject that
the asker names, with the body that a writer chose, so whoever may get could write anything anywhere. For the same reason those
that may not read the log may not make consumers (decision 14), and those that read it may make them under `{consumer}` only:
names of their own key (decision 26). Coordinators take away those that are aimed at others; purging is theirs as well, for
they compact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from kvplane.events.log.inboxes import consumer_names, served_inbox
from kvplane.events.subjects import access_name, check_fleet, stream_name, token
from kvplane.services.protocol import endpoints

if TYPE_CHECKING:
    from collections.abc import Sequence

Role = Literal["admin", "coordinator", "router", "historian", "node", "client"]
ROLES: tuple[Role, ...] = ("admin", "coordinator", "router", "historian", "node", "client")

INBOXES = "_INBOX.>"

# Following the log: is it there, consumers of all of it, flow control, and the message behind a sequence.
_READ_LOG = (
    "$JS.API.STREAM.INFO.{log}", "$JS.API.STREAM.MSG.GET.{log}", "$JS.API.CONSUMER.CREATE.{log}.{consumer}",
    "$JS.API.CONSUMER.DELETE.{log}.{consumer}", "$JS.FC.{log}.{consumer}.>",
)  # fmt: skip
# A bucket is a stream.
_READ_SNAPSHOTS = (
    "$JS.API.STREAM.INFO.{snapshots}", "$JS.API.STREAM.MSG.GET.{snapshots}",
    "$JS.API.CONSUMER.CREATE.{snapshots}.{consumer}", "$JS.API.CONSUMER.DELETE.{snapshots}.{consumer}",
    "$JS.FC.{snapshots}.{consumer}.>",
)  # fmt: skip
_ALL_CONSUMERS = tuple(
    f"$JS.API.CONSUMER.{what}" for stream in ("{log}", "{snapshots}") for what in (f"LIST.{stream}", f"DELETE.{stream}.*")
)  # fmt: skip
_WRITE_SNAPSHOTS = (
    "$O.{box}.C.*", "$O.{box}.M.*", "$JS.API.STREAM.CREATE.{snapshots}", "$JS.API.STREAM.PURGE.{snapshots}",
)  # fmt: skip
# Digests at checkpoints.
_BE_REPLICA = ("kv.{f}.checkpoint.{role}.*", INBOXES)
_LIST_SERVICES = ("$SRV.PING", "$SRV.PING.>", "$SRV.INFO", "$SRV.INFO.>", "$SRV.STATS", "$SRV.STATS.>")


def _asks(asker: endpoints.Asker) -> tuple[str, ...]:
    """Endpoints that a role may ask. A node asks for itself only."""
    own = "{name}" if asker == "node" else "*"
    return tuple(
        f"kv.{{f}}.{spec.subject.replace('{node}', own).replace('{writer}', '*').replace('{historian}', '*')}"
        for spec in endpoints.asked_by(asker)
    )


def _serves(server: endpoints.Server, *wide: str) -> tuple[str, ...]:
    """Endpoints that a service answers; those below a wider subject are allowed with it."""
    words = [subject.split(".") for subject in wide]
    patterns = [spec.pattern("{f}") for spec in endpoints.served(server)]
    return (*wide, *(pattern for pattern in patterns if not any(_below(pattern.split("."), each) for each in words)))


def _below(pattern: list[str], wide: list[str]) -> bool:
    """Whether a subject is one of those that a wider one, with `*` or `>` at its end, is for."""
    alike = pattern[: len(wide) - 1] == wide[:-1]
    return alike and (len(pattern) >= len(wide) if wide[-1] == ">" else len(pattern) == len(wide))


PUBLISH: dict[Role, tuple[str, ...]] = {
    "admin": (
        "kv.{f}.>", *_LIST_SERVICES, *_READ_LOG, *_READ_SNAPSHOTS, *_WRITE_SNAPSHOTS,
        "$JS.API.INFO", "$JS.API.STREAM.LIST", "$JS.API.STREAM.*.{log}", "$JS.API.STREAM.*.{snapshots}",
        "$JS.API.STREAM.LEADER.STEPDOWN.{log}", "$JS.API.STREAM.PEER.REMOVE.{log}",
        # Consumers of other names are made by nobody else, and stay until the admin removes them.
        "$JS.API.CONSUMER.CREATE.{log}.*", "$JS.FC.{log}.>", "$JS.API.STREAM.NAMES", *_ALL_CONSUMERS,
        *(f"$JS.API.CONSUMER.{what}" for s in ("{log}", "{snapshots}") for what in (f"NAMES.{s}", f"INFO.{s}.*")),
        # A backup goes on as its pieces are acknowledged; a restore sends them.
        "$JS.SNAPSHOT.ACK.{log}.>", "$JS.SNAPSHOT.RESTORE.{log}.>",
    ),
    "coordinator": (
        "kv.{f}.node.*", "kv.{f}.cache.*", "kv.{f}.session.*", "kv.{f}.control", *_asks("coordinator"), *_BE_REPLICA,
        *_LIST_SERVICES,
        "$JS.API.STREAM.CREATE.{log}", "$JS.API.STREAM.PURGE.{log}", *_READ_LOG, *_READ_SNAPSHOTS, *_WRITE_SNAPSHOTS,
        *_ALL_CONSUMERS,
    ),
    "router": (
        "kv.{f}.access.*", "kv.{f}.session.*", *_asks("router"), *_BE_REPLICA, *_READ_LOG, *_READ_SNAPSHOTS,
        # Whom it asks whether what a historian gives is true.
        "$SRV.INFO.kvplane-coordinator", "$SRV.INFO.kvplane-router",
    ),
    # One that can't work leaves the questions to others, if there are any.
    "historian": ("$SRV.INFO.kvplane-historian", INBOXES, *_READ_LOG, *_READ_SNAPSHOTS),
    "node": (
        "kv.{f}.cache.{name}", "kv.{f}.access.{access}", "kv.{f}.pulse.{name}", *_asks("node"), "_SERVED.{name}.>",
    ),
    "client": (*_asks("client"), *_LIST_SERVICES),
}  # fmt: skip
"""Subjects that a role may publish to. `INBOXES` is for services, which answer; nobody may write where consumers deliver."""


def _listed(service: str) -> tuple[str, ...]:
    """Where a micro service gets the request to list services."""
    verbs = ("PING", "INFO", "STATS")
    return tuple(f"$SRV.{verb}{what}" for verb in verbs for what in ("", f".{service}", f".{service}.*"))


SUBSCRIBE: dict[Role, tuple[str, ...]] = {
    "admin": ("kv.{f}.>",),
    "coordinator": (
        *_serves("coordinator", "kv.{f}.coordinator.>"), "kv.{f}.pulse.*", "kv.{f}.checkpoint.*.*",
        *_listed("kvplane-coordinator"),
    ),
    "router": (*_serves("router"), "kv.{f}.checkpoint.*.*", *_listed("kvplane-router")),
    "historian": (*_serves("historian", "kv.{f}.history.*"), *_listed("kvplane-historian")),
    "node": ("kv.{f}.node.{name}", "kv.{f}.serve.{name}"),
    "client": (),
}  # fmt: skip
"""Subjects that a role may subscribe to, beside its own inboxes (`events.log.inboxes`)."""
_READERS: tuple[Role, ...] = ("admin", "coordinator", "router", "historian")


class Permissions(NamedTuple):
    """What one user may do."""

    publish: Sequence[str]
    subscribe: Sequence[str]


def permissions(role: Role, fleet: str, key: str, name: str = "") -> Permissions:
    """Permissions of a user with this public key. `name` matters for nodes only."""
    log = stream_name(check_fleet(fleet))
    words = {"f": fleet, "log": log, "box": f"{log}_snapshots", "snapshots": f"OBJ_{log}_snapshots", "role": role}
    if role == "node":
        words |= {"name": token(name), "access": token_of_access(name)}
    publish = [
        subject.format(**words, consumer=consumer)
        for subject in PUBLISH[role]
        for consumer in (consumer_names(key) if "{consumer}" in subject else [""])
    ]
    inboxes = [f"_INBOX.{key}.>"]
    if role in _READERS:
        inboxes.append(f"_DELIVER.{key}.>")
    if f"kv.{fleet}.serve.*" in publish or role == "admin":
        inboxes.append(served_inbox("*", key, "*", "*"))
    subscribe = [*inboxes, *(subject.format(**words) for subject in SUBSCRIBE[role])]
    return Permissions(list(dict.fromkeys(publish)), list(dict.fromkeys(subscribe)))


def token_of_access(node: str) -> str:
    """Subject token under which a node writes what it completed."""
    return token(access_name(node))
