"""Traces of requests: JSON lines with `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`.

A line may also name a `session`. This is the format of the published Mooncake traces: `hash_ids` are chained, so an
equal id means an equal block and an equal prefix, and they can be used as block hashes as they are.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import pack_hashes
from kvplane.services.protocol.errors import BadTrace

if TYPE_CHECKING:
    from pathlib import Path

TRACE_BLOCK_SIZE = 512
"""Tokens a block in the published traces."""


class TraceRequest(Struct, frozen=True):
    """One line of a trace."""

    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=0)]
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1 << 18)]
    session: Annotated[str, Meta(max_length=128)] = ""


class Work(Struct, frozen=True):
    """One request to be sent: packed block hashes, sizes in tokens, its session, if any, and when, in seconds."""

    hashes: bytes
    tokens: int
    output_tokens: int
    session: str = ""
    arrival: float = 0.0


def work_of(request: TraceRequest, block_size: int) -> Work:
    """A line of a trace as a request to be sent. Only full blocks have a hash. Raises `BadHashes`."""
    full = request.hash_ids[: request.input_length // block_size]
    return Work(
        pack_hashes(full), request.input_length, request.output_length, request.session, request.timestamp / 1000
    )


def read_trace(path: Path, *, block_size: int = TRACE_BLOCK_SIZE, limit: int | None = None) -> list[Work]:
    """Requests of a trace, in order. Raises `BadTrace` with the line that is wrong."""
    decoder = msgspec.json.Decoder(TraceRequest)
    found = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                if not line.strip():
                    continue
                try:
                    request = decoder.decode(line)
                    found.append(work_of(request, block_size))
                except (msgspec.DecodeError, BadHashes, UnicodeError, RecursionError) as error:
                    raise BadTrace(
                        f"{path.name}, line {number}: {error}; a line must be a JSON object with timestamp, input_length, "
                        "output_length and hash_ids"
                    ) from None
    except OSError as error:
        raise BadTrace(f"the trace can't be read: {error}") from None
    if not found:
        raise BadTrace(f"{path.name} holds no requests")
    return found
