"""Who may do what, tried: every action of every role against a real server.

Actions come from the table of endpoints, from the topics of the log, and from the subjects of JetStream's and the system's
API that stand in the server's own program.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from docs.reference.raw import Raw, published, raw
from kvplane.events.log.credentials import read_seed
from kvplane.events.subjects import access_name, stream_name, subject, token
from kvplane.services.auth.folder import FIRST, AuthFolder
from kvplane.services.auth.roles import ROLES, Role
from kvplane.services.embedded.server import Server, free_port, server_binary, start_server
from kvplane.services.protocol.endpoints import ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

FLEET, OTHER = "f", "g"
NODE, ANOTHER = "node-a", "node-b"

_API = re.compile(rb"\$(?:JS\.API|SYS\.REQ)(?:\.[A-Z_]+)+(?:\.(?:\*|%s|>|[A-Z_]+))*")
# Those without a name at their end: in the program other text stands directly behind them.
_API_ALONE = (
    "INFO", "STREAM.LIST", "STREAM.NAMES", "META.LEADER.STEPDOWN", "META.RESCUE", "SERVER.REMOVE", "SERVER.EVACUATE",
)  # fmt: skip


class Action(NamedTuple):
    """Something that is tried. `subject` may hold `{key}`, the own public key, and `{other}`, that of another."""

    family: str
    label: str
    subject: str
    listens: bool = False


class Tried(NamedTuple):
    """What became of it: for every action, the roles to which the server did not refuse it."""

    allowed: dict[Action, frozenset[Role]]

    @property
    def combinations(self) -> int:
        """How many things were tried."""
        return len(self.allowed) * len(ROLES)

    @property
    def refused(self) -> int:
        """How many of them the server refused."""
        return self.combinations - sum(map(len, self.allowed.values()))


@lru_cache(maxsize=1)
def api() -> list[str]:
    """Subjects of the server's API: `*` for names. Those that only the server itself knows are in its program."""
    program = Path(server_binary()).resolve().read_bytes()
    found = {each.decode().replace("%s", "*") for each in _API.findall(program)}
    named = {each for each in found if "*" in each or each.endswith(".>")}
    return sorted(named | {f"$JS.API.{each}" for each in _API_ALONE})


def _of_streams() -> Iterator[Action]:
    """What JetStream's API is asked, for each stream."""
    own, theirs = stream_name(FLEET), stream_name(OTHER)
    streams = {
        "its log": own, "its snapshots": f"OBJ_{own}_snapshots", "another fleet": theirs, "a new stream": "mine",
    }  # fmt: skip
    consumers = {"": "x", " under an own name": "{key}-0", " under another's": "{other}-0"}
    for pattern in api():
        verb = pattern.removeprefix("$JS.API.").removeprefix("$SYS.REQ.").replace(".*", "").replace(".>", "")
        if not pattern.startswith("$JS.API.") or "*" not in pattern:
            yield Action("the server", verb, pattern.replace("*", "x").replace(">", "x"))
            continue
        for what, stream in streams.items():
            subject = pattern.replace("*", stream, 1)
            if "*" not in subject and ">" not in subject:
                yield Action(what, verb, subject)
            for whose, name in consumers.items():
                if "*" in subject or ">" in subject:
                    yield Action(what, verb + whose, subject.replace("*", name, 1).replace("*", "x").replace(">", name))
    for what, stream in streams.items():
        for name, consumer in consumers.items():
            yield Action(what, f"flow control{name}", f"$JS.FC.{stream}.{consumer}.token")
            yield Action(what, f"acknowledgement{name}", f"$JS.ACK.{stream}.{consumer}.1.1.1.1.0")
        yield Action(what, "pieces of a backup", f"$JS.SNAPSHOT.ACK.{stream}.x.1")
        yield Action(what, "pieces of a restore", f"$JS.SNAPSHOT.RESTORE.{stream}.x")
    for what, fleet in (("its snapshots", FLEET), ("another fleet", OTHER)):
        for part in "CM":
            yield Action(what, "objects", f"$O.{stream_name(fleet)}_snapshots.{part}.x")


def _of_fleet(fleet: str) -> Iterator[tuple[str, str, str]]:
    """Subjects of a fleet: family, label, subject."""
    names = {"itself": NODE, "another": ANOTHER}
    for whose, node in names.items():
        for topic in ("node", "cache"):
            yield "the log", f"{topic}.({whose})", subject(fleet, topic, node)
        yield "the log", f"access.node/({whose})", subject(fleet, "access", access_name(node))
        yield "heartbeats and digests", f"pulse.({whose})", f"kv.{fleet}.pulse.{token(node)}"
    yield "the log", "access.(a router)", f"kv.{fleet}.access.router-1"
    yield "the log", "session.(model)", f"kv.{fleet}.session.m"
    yield "the log", "control", f"kv.{fleet}.control"
    for role in ("coordinator", "router"):
        yield "heartbeats and digests", f"checkpoint.{role}.(writer)", f"kv.{fleet}.checkpoint.{role}.w"
    for spec in ENDPOINTS:
        for whose, node in names.items() if "{node}" in spec.subject else [("", "x")]:
            words = [node if word == "{node}" else "x" if word[0] == "{" else word for word in spec.subject.split(".")]
            label = spec.subject.replace("{node}", f"({whose})").replace("{", "(").replace("}", ")")
            yield "endpoints", label, f"kv.{fleet}.{'.'.join(words)}"


def actions() -> list[Action]:
    """All that is tried."""
    found = [*_of_streams()]
    for family, label, where in _of_fleet(FLEET):
        found += [Action(family, label, where), Action(f"{family}: listen", label, where, listens=True)]
    for _, label, where in _of_fleet(OTHER):
        found += [Action("another fleet", label, where), Action("another fleet: listen", label, where, listens=True)]
    for verb in ("PING", "INFO", "STATS"):
        for service in ("", ".kvplane-router", ".kvplane-coordinator", ".kvplane-historian"):
            where = f"$SRV.{verb}{service}"
            label = f"list {service[9:] + 's' if service else 'services'}"
            found += [Action("services", label, where), Action("services: listen", label, where, listens=True)]
    inboxes = {
        "own answers": "_INBOX.{key}.x", "another's answers": "_INBOX.{other}.x",
        "own deliveries": "_DELIVER.{key}.x", "another's deliveries": "_DELIVER.{other}.x",
        f"answers of {NODE} to another": f"_SERVED.{NODE}.{{other}}.life.x",
        f"answers of {ANOTHER} to another": f"_SERVED.{ANOTHER}.{{other}}.life.x",
        "answers of nodes to itself": f"_SERVED.{ANOTHER}.{{key}}.life.x",
    }  # fmt: skip
    for label, where in inboxes.items():
        found += [Action("inboxes", label, where), Action("inboxes: listen", label, where, listens=True)]
    found += [
        Action("everything: listen", f"`{where}`", where, listens=True)
        for where in (
            ">", "*", "*.>", "kv.>", "kv.*.>", f"kv.{FLEET}.>", f"kv.{FLEET}.*", f"kv.{FLEET}.*.*", f"kv.{FLEET}.node.*",
            f"kv.{FLEET}.cache.*", f"kv.{FLEET}.access.*", f"kv.{FLEET}.session.*", f"kv.{FLEET}.serve.*", f"kv.{OTHER}.>",
            "_INBOX.>", "_INBOX.*.>", "_DELIVER.>", "_DELIVER.*.>", "_SERVED.>", f"_SERVED.{NODE}.>", "_SERVED.*.*.*.*",
            "$JS.>", "$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "$JS.EVENT.>", "$SYS.>", "$SRV.>", "$O.>",
        )
    ]  # fmt: skip
    return list({(action.subject, action.listens): action for action in found}.values())


def credentials(path: Path) -> AuthFolder:
    """Keys for two fleets, one with nodes."""
    held = AuthFolder(path)
    held.set_servers([])
    for fleet in (FLEET, OTHER):
        for role in FIRST:
            held.add(fleet, role)
    for node in (NODE, ANOTHER):
        held.add(FLEET, "node", node)
    held.save()
    return held


@asynccontextmanager
async def guarded(path: Path) -> AsyncIterator[tuple[Server, AuthFolder]]:
    """A server with these keys."""
    held = credentials(path / "auth")
    server = await start_server(path / "data", port=free_port(), include=held.place_alone())
    try:
        yield server, held
    finally:
        await server.stop()


@asynccontextmanager
async def as_role(server: Server, held: AuthFolder, role: Role) -> AsyncIterator[tuple[Raw, dict[str, str]]]:
    """A connection with a role's key, and what stands for `{key}` and `{other}` in subjects."""
    own = NODE if role == "node" else ""
    seed = read_seed(held.seed_file(FLEET, role, own))
    other = held.find(FLEET, "router" if role != "router" else "historian")
    async with raw(server.url, seed, held.ca) as connection:
        yield connection, {"key": seed.public, "other": other.key if other else ""}


async def tried(server: Server, held: AuthFolder, these: Sequence[Action]) -> Tried:
    """Try each action as each role. What the server lets through must have no effect: its body is no JSON."""
    allowed: dict[Action, set[Role]] = {action: set() for action in these}
    for role in ROLES:
        async with as_role(server, held, role) as (connection, words):
            subjects = {action: action.subject.format(**words) for action in these}
            speaks = [action for action in these if not action.listens]
            # Not empty: an empty body is a valid request to purge or to delete.
            refused = _named(await connection.refusals(published(subjects[action], b"{") for action in speaks))
            allowed_now = [action for action in speaks if subjects[action] not in refused]
            listens = [action for action in these if action.listens]
            refused = _named(
                await connection.refusals(f"SUB {subjects[each]} {n}\r\n".encode() for n, each in enumerate(listens))
            )
            await connection.refusals(f"UNSUB {n}\r\n".encode() for n in range(len(listens)))
            for action in [*allowed_now, *(each for each in listens if subjects[each] not in refused)]:
                allowed[action].add(role)
    return Tried({action: frozenset(roles) for action, roles in allowed.items()})


def _named(refusals: Sequence[str]) -> set[str]:
    return {
        found[1] for line in refusals if (found := re.search(r"Permissions Violation for \w+ to \"([^\"]+)\"", line))
    }
