"""Sessions of coding agents, a JSON file each, as kv-cache-tester publishes them.

A file has an `id`, a `block_size`, and `requests` in order: `t` (seconds from the session's beginning), `in` and `out`
(tokens), `hash_ids`, and, in newer ones, `think_time` (seconds after the answer before it). An entry with `requests` of its
own is a sub-agent: it begins after the answer before it, and the session goes on when it and those beside it have ended.
Unless `hash_id_scope` is `global`, ids mean something within their file only.

Format: https://github.com/callanjfox/kv-cache-tester, docs/trace_replay_tester.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct, field

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import derive_hash, pack_hashes
from kvplane.services.protocol.errors import BadTrace
from kvplane.services.simulation.blocksize import MOST_BLOCK_SIZE
from kvplane.services.simulation.trace import MOST_DELAY, Trace, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


class Entry(Struct):
    """A request, or a sub-agent that has requests."""

    t: Annotated[float, Meta(ge=0, le=MOST_DELAY)]
    tokens: Annotated[int, Meta(ge=0)] = field(name="in", default=0)
    output: Annotated[int, Meta(ge=0)] = field(name="out", default=0)
    hash_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1 << 18)] = []
    think_time: Annotated[float, Meta(ge=0, le=MOST_DELAY)] | None = None
    requests: list[Entry] = []


class Session(Struct):
    """One file."""

    id: Annotated[str, Meta(max_length=100)]
    requests: list[Entry]
    block_size: Annotated[int, Meta(ge=1, le=MOST_BLOCK_SIZE)] = 64
    hash_id_scope: str = "local"


def read_sessions(
    folder: Path, *, block_size: int | None = None, limit: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Trace:  # fmt: skip
    """Read all files of a folder; every session begins at 0. `limit` is of sessions. Raises `BadTrace` with the file."""
    paths = sorted(folder.glob("*.json"))[:limit]
    decoder = msgspec.json.Decoder(Session)
    work: list[Work] = []
    size, stated = block_size, f"--block-size is {block_size}"
    seen: dict[str, str] = {}
    for number, path in enumerate(paths):
        progress(number, len(paths))
        try:
            session = decoder.decode(path.read_bytes())
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise BadTrace(f"{path.name}: {error}; a session's file is a JSON object with id and requests") from None
        except OSError as error:
            raise BadTrace(f"the sessions can't be read: {error}") from None
        if session.id in seen:
            raise BadTrace(f"{path.name} and {seen[session.id]} are both of session {session.id!r}")
        seen[session.id] = path.name
        if size is None:
            size, stated = session.block_size, f"{path.name} has blocks of {session.block_size} tokens"
        elif session.block_size != size:
            raise BadTrace(f"{path.name} has blocks of {session.block_size} tokens, but {stated}")
        try:
            _check_blocks(session)
            work += _flat(session, session.id, session.requests, "")
        except (BadTrace, BadHashes) as error:
            raise BadTrace(f"{path.name}: {error}") from None
    if not work or size is None:
        raise BadTrace(f"{folder} holds no sessions: files that end in .json, with id and requests")
    return Trace(work, size, "trace")


def _check_blocks(session: Session) -> None:
    """Raise `BadTrace` when the ids of a session can't be of blocks of the size that it says."""
    waiting = session.requests.copy()
    ids = blocks = 0
    while waiting:
        entry = waiting.pop()
        waiting += entry.requests
        full, rest = divmod(entry.tokens, session.block_size)
        if len(entry.hash_ids) > full + bool(rest) and not entry.requests:
            raise BadTrace(
                f"the request of {entry.t:g} s has {len(entry.hash_ids):,} hash_ids for {entry.tokens:,} tokens, more than "
                f"blocks of {session.block_size} tokens"
            )
        ids, blocks = ids + len(entry.hash_ids), blocks + full
    # Some may have none, but not most.
    if ids < blocks / 2:
        raise BadTrace(
            f"its requests have {ids:,} hash_ids in all, and would have {blocks:,} if blocks had {session.block_size} tokens"
        )


def _flat(session: Session, name: str, entries: Sequence[Entry], parent: str) -> Iterator[Work]:
    before: Entry | None = None
    agents = 0
    for entry in entries:
        if before is not None and entry.t < before.t:
            raise BadTrace(
                f"session {name!r} has a request of {entry.t:g} s after one of {before.t:g} s; they must be in order"
            )
        if entry.requests:
            agents += 1
            yield from _flat(session, f"{name}/{agents}", entry.requests, name if before is not None else parent)
            continue
        hashes = entry.hash_ids[: entry.tokens // session.block_size]
        if session.hash_id_scope != "global":
            hashes = [derive_hash(f"{session.id} {block}".encode()) for block in hashes]
        delay = entry.think_time
        if delay is None:
            delay = 0.0 if before is None else entry.t - before.t
        yield Work(pack_hashes(hashes), entry.tokens, entry.output, name, 0.0, delay, parent if before is None else "")
        before = entry
