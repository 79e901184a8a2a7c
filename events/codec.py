"""A commit as bytes: an array of tagged events, in MessagePack (what kvplane writes) or JSON (what people write).

`decode` is the only door from the log into the folds. It knows from the subject which events may be there and whose
they must be, and raises `BadCommit` with one of `REASONS` for everything else. It raises nothing else, for any bytes.

Headers of a commit: `Nats-Msg-Id` (duplicates within the server's window), `Content-Type`, `Kv-Writer` and
`Kv-Writer-Seq` (a counter for each writer and subject, so that a duplicate is known at any distance), `Kv-Based-On` (the
sequence that a deciding writer had applied) and `Kv-Crc32` (8 hex digits over the body).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping  # noqa: TC003 - NamedTuple fields are evaluated
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union

import msgspec
from msgspec import Meta

from kvplane.events import types, versions
from kvplane.events.errors import BadCommit, BadHashes, BadName
from kvplane.events.hashing import format_hash, pack_hashes, parse_hash, unpack_hashes
from kvplane.events.subjects import (
    NAME_LIMIT,
    NODE_ACCESS,
    NODE_ACCESS_LONG,
    Place,
    Topic,
    access_name,
    check_name,
    place_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MSGPACK = "application/msgpack"
JSON = "application/json"

WRITER = "Kv-Writer"
WRITER_SEQ = "Kv-Writer-Seq"
BASED_ON = "Kv-Based-On"
CRC32 = "Kv-Crc32"
CONTENT_TYPE = "Content-Type"

REASONS = {
    "foreign_subject": "the subject is none of this fleet's log",
    "checksum": "the body does not have the checksum of its header",
    "bad_header": "a Kv- header is malformed",
    "undecodable": "the body is neither MessagePack nor JSON of an array of events",
    "unknown_type": "an event's type or version is not known here, or not allowed on this subject",
    "invalid": "an event's fields are not valid",
    "wrong_subject": "an event speaks for another node, model or writer than its subject",
}
"""Why a commit is skipped before any state is looked at."""

DEPTH_LIMIT = 32
"""Deepest nesting of a body. How deep a decoder can go differs between versions of Python, and replicas must agree."""

_PACKED_FIELDS = ("hashes", "stored", "evicted")
_HASH_BYTES = 8
_AT_LATER = (".trace`", ".tenant`", ".origin`", ".leg`")
"""Where a decoder finds fault with fields that came later than their events."""


class Message(NamedTuple):
    """One message of the log as it was stored. `time` is when the server stored it, in unix nanoseconds."""

    sequence: int
    subject: str
    time: int
    headers: Mapping[str, str] | None
    body: bytes
    remade: bool = False
    """Made again from events that were applied once: in today's shapes, whatever the log's format was."""


class Commit(NamedTuple):
    """A decoded commit. `writer` is empty when the message names none."""

    place: Place
    events: Sequence[types.Event]
    writer: str
    writer_seq: int
    based_on: int | None


_UNIONS: dict[Topic, Any] = {
    "node": types.NodeEvent,
    "cache": types.CacheEvent,
    "session": types.SessionEvent,
    "access": types.AccessEvent,
    "control": types.ControlEvent,
}


def _decoder(union: Any) -> tuple[msgspec.msgpack.Decoder[list[types.Event]], Any]:  # noqa: ANN401 - a type form
    form = Annotated[list[union], Meta(min_length=1, max_length=types.EVENTS_LIMIT)]
    return msgspec.msgpack.Decoder(form), form


_DECODERS = {
    topic: _decoder(Union[(union, *versions.FORMER.get(topic, ()))])  # as they are written today and were before
    for topic, union in _UNIONS.items()
}
# The decoders refuse unknown fields, so that they never walk into data whose nesting they don't know.
_FIELDS: dict[object, set[str]] = {
    kind.__struct_config__.tag: {"type", *kind.__struct_fields__} for kind in types.Event.__subclasses__()
}
_ROUTED = types.RequestRouted.__struct_config__.tag
_ENCODER = msgspec.msgpack.Encoder()


def encode(events: Sequence[types.Event]) -> bytes:
    """Body of a commit in MessagePack."""
    return _ENCODER.encode(events)


def encode_one(event: types.Event) -> bytes:
    """One event alone, to be joined by `join`: lets a group commit count bytes as it grows."""
    return _ENCODER.encode(event)


def join(encoded: Sequence[bytes]) -> bytes:
    """Body of a commit from events that are encoded already."""
    count = len(encoded)
    if count < 16:
        head = bytes((0x90 | count,))
    elif count < 1 << 16:
        head = b"\xdc" + count.to_bytes(2, "big")
    else:
        head = b"\xdd" + count.to_bytes(4, "big")
    return head + b"".join(encoded)


def checksum(body: bytes) -> str:
    """Value of the `Kv-Crc32` header."""
    return f"{zlib.crc32(body):08x}"


def to_builtins(event: types.Event) -> dict[str, Any]:
    """An event as plain data for JSON: packed hashes become lists of hex strings."""
    data: dict[str, Any] = msgspec.to_builtins(event, builtin_types=(bytes,))
    for field in _PACKED_FIELDS:
        if isinstance(data.get(field), bytes):
            data[field] = [format_hash(value) for value in unpack_hashes(data[field])]
    if data.get("parent") is not None:
        data["parent"] = format_hash(data["parent"])
    if data.get("engine_hashes"):
        data["engine_hashes"] = [h.hex() if isinstance(h, bytes) else h for h in data["engine_hashes"]]
    return data


def encode_json(events: Sequence[types.Event]) -> bytes:
    """Body of a commit in JSON."""
    return msgspec.json.encode([to_builtins(event) for event in events])


def _from_plain(raw: Any, form: Any) -> list[types.Event]:  # noqa: ANN401 - whatever was decoded
    """Events of plain data, without the fields that are unknown here."""
    if not isinstance(raw, list):
        raise BadCommit("invalid", "the body must be an array of events")
    if _depth(raw) > DEPTH_LIMIT:
        raise BadCommit("undecodable", f"the body is nested more than {DEPTH_LIMIT} deep")
    for event in raw:
        if not isinstance(event, dict):
            raise BadCommit("undecodable", "each event must be an object with a type")
        kind = event.get("type")
        known = _FIELDS.get(kind) if isinstance(kind, str) else None
        if known is not None:
            for field in event.keys() - known:
                del event[field]
            traceparent = event.get("trace", "")
            if not isinstance(traceparent, str) or len(traceparent) > types.TRACEPARENT_LIMIT:
                # To readers that are older than this field it is unknown, whatever is in it.
                del event["trace"]
            if kind == _ROUTED:
                tenant, origin, leg = event.get("tenant", ""), event.get("origin", ""), event.get("leg", 0)
                if not (isinstance(tenant, str) and len(tenant) <= types.TENANT_LIMIT):
                    del event["tenant"]
                if not (isinstance(origin, str) and len(origin) <= NAME_LIMIT):
                    del event["origin"]
                if not (type(leg) is int and 0 <= leg <= types.LENGTH_LIMIT):
                    del event["leg"]
    events: list[types.Event] = msgspec.convert(raw, form, builtin_types=(bytes,))
    return events


def _depth(data: object) -> int:
    """How deep lists and dictionaries are nested; stops counting beyond the limit."""
    level: list[object] = [data]
    depth = 0
    while level and depth <= DEPTH_LIMIT:
        depth += 1
        inner: list[object] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        level = [part for part in inner if isinstance(part, dict | list)]
    return depth


def _from_json(body: bytes, form: Any) -> list[types.Event]:  # noqa: ANN401 - a type form
    raw = msgspec.json.decode(body)
    for event in raw if isinstance(raw, list) else ():
        if isinstance(event, dict):
            for field in _PACKED_FIELDS:
                if isinstance(event.get(field), list):
                    event[field] = pack_hashes(parse_hash(value) for value in event[field])
            if event.get("parent") is not None:
                event["parent"] = parse_hash(event["parent"])
    return _from_plain(raw, form)


def decode_body(topic: Topic, body: bytes, in_force: int = versions.FORMAT) -> Sequence[types.Event]:
    """Events of a body that lies under this topic of a log whose format is `in_force`, in today's shapes.

    Raises `BadCommit`.
    """
    events = _decoded(topic, body)
    if versions.SINCE and in_force < versions.FORMAT:
        versions.check_format(events, in_force)
    return versions.brought_up(topic, events)


def _decoded(topic: Topic, body: bytes) -> Sequence[types.Event]:
    decoder, form = _DECODERS[topic]
    try:
        if body[:1] in b"[ \n\r\t" and body:
            return _from_json(body, form)
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            if "unknown field" not in str(error) and not str(error).endswith(_AT_LATER):
                raise
        return _from_plain(msgspec.msgpack.decode(body), form)
    except msgspec.ValidationError as error:
        detail = str(error)
        unknown = "type`" in detail and detail.startswith(("Invalid value", "Object missing required field `type`"))
        raise BadCommit("unknown_type" if unknown else "invalid", detail) from None
    except BadHashes as error:
        raise BadCommit("invalid", str(error)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError, OverflowError) as error:
        raise BadCommit("undecodable", str(error)[:200] or type(error).__name__) from None


def _packed(packed: bytes, field: str) -> None:
    if len(packed) % _HASH_BYTES:
        raise BadCommit("invalid", f"{field} has {len(packed)} bytes; 8 bytes a block are needed")


def _check_registered(event: types.NodeRegistered) -> None:
    try:
        for model in event.models:
            check_name(model, "model")
    except BadName as error:
        raise BadCommit("invalid", str(error)) from None
    if len(set(event.models)) != len(event.models):
        raise BadCommit("invalid", "models names a model twice")
    if "gpu" not in event.capacity_blocks:
        raise BadCommit("invalid", "capacity_blocks must say how many blocks the tier gpu holds")


def _check_stored(event: types.BlocksStored | types.GroupStored) -> None:
    _packed(event.hashes, "hashes")
    if event.engine_hashes is not None and len(event.engine_hashes) * _HASH_BYTES != len(event.hashes):
        raise BadCommit("invalid", "engine_hashes and hashes must have one entry a block each")


def _check_placed(event: types.BlocksPlaced) -> None:
    _packed(event.stored, "stored")
    _packed(event.evicted, "evicted")


def _check_session(event: types.SessionAssigned | types.SessionEnded) -> None:
    if not event.session.isprintable():
        raise BadCommit("invalid", "session holds a character that can't be printed")


def _check_routed(event: types.RequestRouted) -> None:
    _packed(event.hashes, "hashes")
    if event.match > event.blocks:
        raise BadCommit("invalid", f"match {event.match} is more than the {event.blocks} blocks of the request")
    if len(event.hashes) not in (0, event.blocks * _HASH_BYTES):
        raise BadCommit("invalid", "hashes must be empty or have one entry a block")


def _check_held(event: types.RequestHeld) -> None:
    _packed(event.hashes, "hashes")
    if len(event.hashes) not in (0, event.blocks * _HASH_BYTES):
        raise BadCommit("invalid", "hashes must be empty or have one entry a block")


_CHECKS: dict[type[types.Event], Callable[[Any], None]] = {
    types.NodeRegistered: _check_registered,
    types.BlocksStored: _check_stored,
    types.BlocksRemoved: lambda event: _packed(event.hashes, "hashes"),
    types.GroupStored: _check_stored,
    types.GroupRemoved: lambda event: _packed(event.hashes, "hashes"),
    types.BlocksPlaced: _check_placed,
    types.SessionAssigned: _check_session,
    types.SessionEnded: _check_session,
    types.RequestRouted: _check_routed,
    types.RequestHeld: _check_held,
}


def validate(place: Place, events: Sequence[types.Event]) -> None:
    """Raise `BadCommit` unless every event is valid and may lie in this place. State is not looked at."""
    topic, name = place
    for event in events:
        check = _CHECKS.get(type(event))
        if check is not None:
            check(event)
    if topic in {"node", "cache"}:
        alone = topic == "node"
        for event in events:
            if event.node != name:  # type: ignore[attr-defined]
                spoken = event.node  # type: ignore[attr-defined]
                raise BadCommit("wrong_subject", f"the subject is of node {name!r}, an event of {spoken[:80]!r}")
            alone = alone or type(event) is types.BlocksPlaced
        if alone and len(events) > 1:
            raise BadCommit("invalid", "a node's change or a placement must be alone in its commit")
    elif topic == "session":
        for event in events:
            if event.model != name:  # type: ignore[attr-defined]
                raise BadCommit("wrong_subject", f"the subject is of model {name!r}, an event of another")
    elif topic == "access" and name.startswith((NODE_ACCESS, NODE_ACCESS_LONG)):
        for event in events:
            if type(event) is not types.RequestCompleted or access_name(event.node) != name:
                raise BadCommit("wrong_subject", "a node may say of requests that it completed them, and no more")


def decode(fleet: str, message: Message, in_force: int = versions.FORMAT) -> Commit:
    """Decode and validate one message of a log whose format is `in_force`. Raises `BadCommit` and nothing else."""
    _, subject, _, headers, body, remade = message
    try:
        place = place_of(fleet, subject)
    except BadName as error:
        raise BadCommit("foreign_subject", str(error)) from None
    writer, writer_seq, based_on = "", 0, None
    if headers:
        crc = headers.get(CRC32)
        if crc is not None and crc != checksum(body):
            raise BadCommit("checksum", f"the body has checksum {checksum(body)}, its header says {crc[:16]}")
        writer = headers.get(WRITER, "")
        counter = headers.get(WRITER_SEQ)
        based = headers.get(BASED_ON)
        if writer and counter is not None:
            writer_seq = _number(WRITER_SEQ, counter)
        if based is not None:
            based_on = _number(BASED_ON, based)
        if writer and (len(writer) > NAME_LIMIT or not writer.isprintable()):
            raise BadCommit("bad_header", f"{WRITER} must be at most {NAME_LIMIT} printable characters")
    events = decode_body(place.topic, body, versions.FORMAT if remade else in_force)
    validate(place, events)
    if place.topic == "access" and writer and writer != place.name and not writer.startswith(f"{place.name}."):
        raise BadCommit("wrong_subject", f"the subject is of writer {place.name!r}, {WRITER} says {writer!r}")
    return Commit(place, events, writer, writer_seq, based_on)


def _number(header: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 17):
        raise BadCommit("bad_header", f"{header} is {text[:40]!r}; it must be a number")
    return int(text)
