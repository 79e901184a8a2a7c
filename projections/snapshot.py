"""A snapshot: the state of a fleet as bytes, so that a fold need not begin at the log's first message.

    mark        8 bytes, "kvplane" and 0x1a
    length      4 bytes, little-endian: of the header
    checksum    16 bytes: XXH3-128 of the header
    header      a map in MessagePack, see `Header`; it has the body's length and checksum
    body        MessagePack, see `snapshot_body`; not compressed

The mark, length, checksum and the header's field `version` are the same in every version, so that a reader knows
what it can't read.

A loaded state goes on as the one that was dumped: same digest, same orders, same columns to the last bit. Only the count
of changes, by which derived things are made again, begins elsewhere. Whatever the bytes, `load` gives a state that
`apply` can go on from, or raises `BadSnapshot`. Checksums find accidents, not forgeries: who can write a snapshot can
write the log.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from xxhash import xxh3_128_digest

from kvplane.projections import snapshot_body
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadSnapshot
from kvplane.projections.fleet import FleetState

VERSION = 1
"""Version of the format."""
FOLD_REVISION = 2
"""Raised with every change of what the fold makes of a log: a state of another revision is not the log's any more."""
HEADER_BYTES = 1024
"""So many bytes from the beginning are enough for `peek`."""

_MARK = b"kvplane\x1a"
_PRELUDE = struct.Struct("<8sI16s")
_REPLAY = "use another snapshot, or replay the log"

_Natural = Annotated[int, Meta(ge=0)]


class Header(Struct, frozen=True, kw_only=True):
    """What a snapshot is of. `digest` is that of the state, `length` in bytes and `checksum` are the body's."""

    version: int
    revision: int
    """`FOLD_REVISION` of the kvplane that made it."""
    fleet: str
    sequence: _Natural
    time: _Natural
    """Log time in unix nanoseconds."""
    digest: str
    length: _Natural
    checksum: bytes


class _Version(Struct):
    version: int


_BODY = msgspec.msgpack.Decoder(snapshot_body.BodyWithGroups)
_HEADER = msgspec.msgpack.Decoder(Header)
_VERSION = msgspec.msgpack.Decoder(_Version)


def dump(state: FleetState, *, known_digest: str | None = None) -> bytes:
    """A snapshot of the state. Most of the time goes into the digest, unless the caller knows it.

    Raises `BadSnapshot` for a fleet with more than `snapshot_body.MOST_SLOTS` slots, and for a state that is of no use.
    """
    if state.failure is not None:
        raise BadSnapshot(f"no snapshot can be made: {state.failure}")
    try:
        body = msgspec.msgpack.encode(snapshot_body.take(state))
    except ValueError as error:
        raise BadSnapshot(f"no snapshot can be made: {error}; start from the log instead") from None
    header = Header(
        version=VERSION, revision=FOLD_REVISION, fleet=state.fleet, sequence=state.sequence, time=state.time,
        digest=digest(state) if known_digest is None else known_digest,
        length=len(body), checksum=xxh3_128_digest(body),
    )  # fmt: skip
    return _sealed(header, body)


def _sealed(header: Header, body: bytes) -> bytes:
    encoded = msgspec.msgpack.encode(header)
    return b"".join((_PRELUDE.pack(_MARK, len(encoded), xxh3_128_digest(encoded)), encoded, body))


def peek(data: bytes) -> Header:
    """What a snapshot is of, from its first `HEADER_BYTES`; the body is not looked at. Raises `BadSnapshot`."""
    return _opened(data)[0]


def _opened(data: bytes) -> tuple[Header, int]:
    """The header, and where the body begins."""
    if data[: len(_MARK)] != _MARK[: len(data)]:
        raise BadSnapshot(f"these bytes are no snapshot of kvplane; {_REPLAY}")
    if len(data) < _PRELUDE.size:
        raise BadSnapshot(f"the snapshot is cut off after {len(data)} bytes; {_REPLAY}")
    _, length, checksum = _PRELUDE.unpack_from(data)
    end = _PRELUDE.size + length
    if end > HEADER_BYTES:
        raise BadSnapshot(f"the snapshot is damaged: its header can't have {length} bytes; {_REPLAY}")
    if len(data) < end:
        raise BadSnapshot(f"the snapshot is cut off after {len(data)} bytes; {_REPLAY}")
    encoded = data[_PRELUDE.size : end]
    if xxh3_128_digest(encoded) != checksum:
        raise BadSnapshot(f"the snapshot is damaged: its header has another checksum; {_REPLAY}")
    try:
        version = _VERSION.decode(encoded).version
        if version == VERSION:
            return _HEADER.decode(encoded), end
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadSnapshot(f"the snapshot is damaged: its header makes no sense ({error}); {_REPLAY}") from None
    remedy = "use a newer kvplane, or replay the log" if version > VERSION else _REPLAY
    raise BadSnapshot(f"the snapshot is of version {version}, this kvplane reads {VERSION}; {remedy}")


def load(fleet: str, data: bytes, *, verify: bool = False) -> FleetState:
    """The state that a snapshot is of. With `verify` its digest is made again and compared. Raises `BadSnapshot`."""
    header, start = _opened(data)
    if header.fleet != fleet:
        raise BadSnapshot(f"the snapshot is of fleet {header.fleet[:80]!r}, not of {fleet!r}; use one of this fleet")
    if header.revision != FOLD_REVISION:
        raise BadSnapshot(
            f"the snapshot is of revision {header.revision} of the fold, this kvplane has {FOLD_REVISION}; replay the log"
        )
    body = memoryview(data)[start:]
    if len(body) < header.length:
        raise BadSnapshot(f"the snapshot is cut off after {len(data)} of {start + header.length} bytes; {_REPLAY}")
    if len(body) != header.length or xxh3_128_digest(body) != header.checksum:
        raise BadSnapshot(f"the snapshot is damaged: its body has another checksum; {_REPLAY}")
    state = FleetState(fleet)
    state.sequence, state.time = header.sequence, header.time
    # What was derived from another state must not pass for derived from this one; small counts would meet.
    state.changes = int.from_bytes(header.checksum[:8], "little")
    try:
        snapshot_body.put(state, _BODY.decode(body))
        found = digest(state) if verify else header.digest
    except Exception as error:  # noqa: BLE001 - whoever can't use a snapshot must still be able to replay the log
        raise BadSnapshot(f"the snapshot doesn't fit together: {str(error)[:200] or repr(error)}; {_REPLAY}") from None
    if found != header.digest:
        raise BadSnapshot(f"the snapshot has the digest {found}, its header says {header.digest[:80]!r}; {_REPLAY}")
    return state
