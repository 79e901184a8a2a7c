"""Traces of requests: JSON lines with `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`.

A line may also name a `session` (or `session_id`), and say the trace's `block_size` (tokens). With `delay` (ms) the session
is a closed loop: its first request comes at its timestamp, each later one that long after the answer before it, and needs no
timestamp. A sub-agent names its `parent` session on its first line: it begins after the parent's answer before it, and the
parent goes on when it has ended. This is the format of the published Mooncake traces, and AIPerf's: `hash_ids` are chained, so
an equal id means an equal block and an equal prefix, and they can be used as block hashes as they are. A file may be
compressed with gzip.
"""

from __future__ import annotations

import gzip
import zlib
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import pack_hashes
from kvplane.services.protocol.errors import BadTrace
from kvplane.services.simulation.blocksize import MOST_BLOCK_SIZE, BlockSize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import BufferedReader
    from pathlib import Path

PROGRESS_LINES = 256
"""Lines after which progress is reported."""
MOST_DELAY = 1e9
"""Longest delay, in seconds: some thirty years."""
_GZIP = b"\x1f\x8b"


class TraceRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a trace."""

    timestamp: Annotated[float, Meta(ge=0)] | None = None
    input_length: Annotated[int, Meta(ge=0)]
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1 << 18)]
    session: Annotated[str, Meta(max_length=128)] = ""
    session_id: Annotated[str, Meta(max_length=128)] = ""
    delay: Annotated[float, Meta(ge=0, le=MOST_DELAY * 1000)] | None = None
    """Time after the answer before it in the same session, in milliseconds."""
    parent: Annotated[str, Meta(max_length=128)] = ""
    block_size: Annotated[int, Meta(ge=1, le=MOST_BLOCK_SIZE)] | None = None
    """Tokens a block, the same on every line that says it."""


class Work(Struct, frozen=True):
    """One request to be sent: packed block hashes, sizes in tokens, its session, if any, and when, in seconds.

    With a `delay`, it comes that many seconds after the session's answer before it; `arrival` is when a first one comes. The
    first one of a sub-agent names its `parent`: it comes after the answer that the parent had last, and the parent's next waits
    for the sub-agent's end.
    """

    hashes: bytes
    tokens: int
    output_tokens: int
    session: str = ""
    arrival: float = 0.0
    delay: float | None = None
    parent: str = ""


class Sessions:
    """What the lines of a trace say of sessions: from its second line on one has delays or has none, and is in order."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float, bool | None]] = {}
        """Of each session's last line: its number and timestamp, and whether it has a delay, unless it is the first one."""

    def line(self, number: int, request: TraceRequest) -> float:
        """Take a line into account; the line's time in milliseconds. Raises `BadTrace`."""
        name = request.session or request.session_id
        if request.session and request.session_id and request.session != request.session_id:
            raise BadTrace(f"line {number:,} names two sessions, {request.session!r} and {request.session_id!r}")
        before = self._last.get(name) if name else None
        if not name and (request.delay is not None or request.parent):
            what = "a delay" if request.delay is not None else "a parent"
            raise BadTrace(f"line {number:,} has {what} but no session, so there is no answer that it waits for")
        if before is None:
            time = self._first(number, request, name)
            if name:
                self._last[name] = number, time, bool(request.parent) or None
            return time
        line, earlier, waits = before
        if request.parent:
            raise BadTrace(f"line {number:,} names a parent, but session {name!r} began at line {line:,} or before")
        if waits is not None and (request.delay is None) == waits:
            without = number if request.delay is None else line
            raise BadTrace(
                f"line {without:,} of session {name!r} has no delay, and line {number + line - without:,} has one; a session "
                "that waits for its answers has one on every line but its first"
            )
        if request.timestamp is None and request.delay is None:
            raise BadTrace(f"line {number:,} of session {name!r} has neither a timestamp nor a delay")
        time = earlier if request.timestamp is None else request.timestamp
        if request.delay is not None and time < earlier:
            raise BadTrace(
                f"line {number:,} of session {name!r} is of {time:g} ms, before line {line:,} of {earlier:g} ms; a session's "
                "lines must be in order"
            )
        self._last[name] = number, time, request.delay is not None
        return time

    def _first(self, number: int, request: TraceRequest, name: str) -> float:
        if request.parent:
            parent = self._last.get(request.parent)
            if parent is None or request.parent == name:
                raise BadTrace(
                    f"line {number:,}: session {name!r} is a sub-agent of {request.parent!r}, which has no line before it"
                )
            if request.delay is None:
                raise BadTrace(
                    f"line {number:,}: session {name!r} is a sub-agent, and has no delay after its parent's answer"
                )
            return max(parent[1], request.timestamp or 0.0)
        if request.timestamp is None:
            raise BadTrace(
                f"line {number:,} has no timestamp; only what comes after an answer of its session needs none"
            )
        return request.timestamp


class Trace(Struct):
    """A trace that was read: its requests in order, its block size in tokens, and who says that size."""

    work: list[Work]
    block_size: int
    source: Literal["option", "trace", "inferred"]


def work_of(request: TraceRequest, block_size: int) -> Work:
    """A line of a trace as a request to be sent. Only full blocks have a hash. Raises `BadHashes`."""
    return _full(_packed(request, request.timestamp or 0.0), block_size)


def _packed(request: TraceRequest, timestamp: float) -> Work:
    """A line with all its ids, the one of a partial last block included. Raises `BadHashes`."""
    return Work(
        pack_hashes(request.hash_ids), request.input_length, request.output_length, request.session or request.session_id,
        timestamp / 1000, None if request.delay is None else request.delay / 1000, request.parent,
    )  # fmt: skip


def _full(work: Work, block_size: int) -> Work:
    """The same with the hashes of full blocks only."""
    length = work.tokens // block_size * 8
    return work if len(work.hashes) <= length else msgspec.structs.replace(work, hashes=work.hashes[:length])


def read_trace(
    path: Path, *, block_size: int | None = None, limit: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Trace:  # fmt: skip
    """Read a trace. `block_size` is to be given when the trace does not say it and its lines allow several.

    `progress` is called with the bytes read and the size of the file (0 when unknown). Raises `BadTrace` with
    the line that is wrong, or that contradicts the block size.
    """
    decoder = msgspec.json.Decoder(TraceRequest)
    known = BlockSize(block_size)
    sessions = Sessions()
    stated = False
    found = []
    try:
        with path.open("rb") as file:
            # A pipe's size is 0.
            total = path.stat().st_size
            for number, line in enumerate(islice(_opened(file), limit), 1):
                if not number % PROGRESS_LINES and file.seekable():
                    progress(file.tell(), total)
                if not line.strip():
                    continue
                try:
                    request = decoder.decode(line)
                    found.append(_packed(request, sessions.line(number, request)))
                except BadTrace as error:
                    raise BadTrace(f"{path.name}: {error}") from None
                except (msgspec.DecodeError, BadHashes, UnicodeError, RecursionError) as error:
                    raise BadTrace(
                        f"{path.name}, line {number}: {error}; a line must be a JSON object with timestamp, input_length, "
                        "output_length and hash_ids"
                    ) from None
                stated = stated or request.block_size is not None
                try:
                    known.line(number, request.input_length, len(request.hash_ids), request.block_size)
                except BadTrace as error:
                    raise BadTrace(f"{path.name}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadTrace(f"{path.name} is compressed with gzip and damaged: {error}") from None
    except OSError as error:
        raise BadTrace(f"the trace can't be read: {error}") from None
    if not found:
        raise BadTrace(f"{path.name} holds no requests")
    try:
        size = known.size()
    except BadTrace as error:
        raise BadTrace(f"{path.name}: {error}") from None
    source: Literal["option", "trace", "inferred"] = "trace" if stated else "inferred" if known.inferred else "option"
    return Trace([_full(work, size) for work in found], size, source)


def _opened(file: BufferedReader) -> Iterator[bytes]:
    """Its lines, decompressed if need be."""
    return iter(gzip.open(file) if file.peek(2)[:2] == _GZIP else file)
