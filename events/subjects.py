"""Subjects of a fleet's log and the names in them.

    kv.<fleet>.node.<node>      kv.<fleet>.cache.<node>       kv.<fleet>.session.<model>
    kv.<fleet>.access.<writer>  kv.<fleet>.control

The word after the fleet is the *topic*: it decides which events a commit may hold. A name may be any printable text
(`Qwen/Qwen2.5-7B`); as a subject token it is percent-encoded (RFC 3986, with the dot encoded as well), so that each name
has exactly one token and no name can hold a wildcard.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import sha256
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

from kvplane.events.errors import BadName

NAME_LIMIT = 128
"""Longest name of a node, model, session or writer, in characters."""

Topic = Literal["node", "cache", "session", "access", "control"]
TOPICS: tuple[Topic, ...] = ("node", "cache", "session", "access", "control")

NODE_ACCESS, NODE_ACCESS_LONG = "node/", "node:"
"""How names of nodes under the topic `access` begin; the second is of those that are too long, and a hash follows."""
_ACCESS_LIMIT = 100

_FLEET = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Place(NamedTuple):
    """Where a commit lies: its topic and the name that the subject carries (empty in `control`)."""

    topic: Topic
    name: str


def check_fleet(fleet: str) -> str:
    """Return the fleet's name, or raise `BadName`: it is part of a stream name and is not encoded."""
    if not _FLEET.fullmatch(fleet):
        raise BadName(f"fleet name {fleet[:80]!r} must be 1 to 64 of the characters A-Z a-z 0-9 _ -")
    return fleet


def check_name(name: str, what: str = "name") -> str:
    """Return the name, or raise `BadName` when it is empty, too long or holds a character that can't be printed."""
    if not name:
        raise BadName(f"{what} is empty; give it 1 to {NAME_LIMIT} printable characters")
    if len(name) > NAME_LIMIT:
        raise BadName(f"{what} has {len(name)} characters; the limit is {NAME_LIMIT}")
    if not name.isprintable():
        raise BadName(f"{what} {name[:80]!r} holds a character that can't be printed; use printable text")
    return name


@lru_cache(maxsize=65536)
def token(name: str) -> str:
    """Percent-encoded name, one subject token. Raises `BadName`."""
    return quote(check_name(name), safe="").replace(".", "%2E").replace("~", "%7E")


@lru_cache(maxsize=65536)
def name_of(encoded: str) -> str:
    """Name of a subject token. Raises `BadName` when the token is not the one that `token` gives for it."""
    try:
        name = unquote(encoded, errors="strict")
    except UnicodeDecodeError:
        raise BadName(f"subject token {encoded[:80]!r} is not percent-encoded UTF-8") from None
    if token(name) != encoded:
        raise BadName(f"subject token {encoded[:80]!r} is not the canonical form of {name[:80]!r}")
    return name


def stream_name(fleet: str) -> str:
    """Name of the fleet's stream."""
    return f"KV_{check_fleet(fleet)}"


def stream_subjects(fleet: str) -> list[str]:
    """Subjects that the fleet's stream stores. Requests and heartbeats of the fleet are on others and never stored."""
    base = f"kv.{check_fleet(fleet)}"
    return [f"{base}.node.*", f"{base}.cache.*", f"{base}.session.*", f"{base}.access.*", f"{base}.control"]


def subject(fleet: str, topic: Topic, name: str = "") -> str:
    """Subject of a topic, with the name that belongs to it."""
    base = f"kv.{fleet}.{topic}"
    return base if topic == "control" else f"{base}.{token(name)}"


def beginning(fleet: str, topic: Topic, name: str = "") -> str:
    """How all subjects of a topic begin whose names begin like this."""
    return f"kv.{fleet}.{topic}.{token(name) if name else ''}"


def heartbeat_subject(fleet: str, node: str) -> str:
    """Subject of a node's heartbeats and load gauges: core NATS, never stored."""
    return f"kv.{fleet}.pulse.{token(node)}"


def checkpoint_subject(fleet: str, role: str, writer: str) -> str:
    """Subject on which a replica publishes its digests, `*` for those of all: core NATS, never stored.

    Its role is part of it, so that credentials of one role can't speak for another.
    """
    return f"kv.{fleet}.checkpoint.{role}.{writer if writer == '*' else token(writer)}"


def access_name(node: str) -> str:
    """Name under the topic `access` that is this node's alone, so that its credentials can be bound to it.

    A writer there may call itself by the name, or by the name, a dot and anything: a life of its own.
    """
    name = f"{NODE_ACCESS}{node}"
    return name if len(name) <= _ACCESS_LIMIT else f"{NODE_ACCESS_LONG}{sha256(node.encode()).hexdigest()}"


@lru_cache(maxsize=4096)
def asked_node(subject: str) -> str:
    """Token of the node that a request on this subject is for; empty for what services answer."""
    words = subject.split(".")
    return words[3] if len(words) == 4 and (words[0], words[2]) == ("kv", "serve") else ""


@lru_cache(maxsize=65536)
def place_of(fleet: str, subject: str) -> Place:
    """Topic and name of a log subject. Raises `BadName` for a subject that is none of this fleet's log."""
    parts = subject.split(".")
    if parts[:2] == ["kv", fleet]:
        if len(parts) == 3 and parts[2] == "control":
            return Place("control", "")
        if len(parts) == 4 and parts[2] in TOPICS and parts[2] != "control":
            return Place(parts[2], name_of(parts[3]))
    raise BadName(f"subject {subject[:120]!r} is not on the log of fleet {fleet!r}")
