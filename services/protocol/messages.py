"""Requests and answers of the services, as they travel: JSON or MessagePack, the answer in the manner of the request.

In MessagePack hashes are packed little-endian u64; in JSON they are lists of decimal or hex strings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvplane.events.errors import BadHashes, BadName
from kvplane.events.hashing import MOST_TOKENS, pack_hashes, parse_hash
from kvplane.events.subjects import check_name
from kvplane.events.types import HASHES_LIMIT, TENANT_LIMIT, Count, Length, Text, Tier
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.protocol.hashing import PACKED_FIELDS, Hashing, hashes_as_text
from kvplane.services.protocol.held import Held  # noqa: TC001 - msgspec looks it up as it decodes

_HASH_BYTES = 8
_PROMPT_LIMIT = 1 << 26
SECONDS_LIMIT = 1_000_000
"""Longest time that a completion may say, in seconds; 11 days."""
LEASE_LIMIT = 900
"""Longest lease of a request, in seconds; after as long without a completion every request is taken as over."""

Took = Annotated[float, Meta(ge=0, le=SECONDS_LIMIT)]
"""How long something took, in seconds."""
Moment = str | Count
"""A sequence, or a time (ISO 8601, UTC unless it says otherwise)."""
Packed = Annotated[bytes, Meta(max_length=HASHES_LIMIT * _HASH_BYTES)]


class _Request(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What all requests have in common: unknown fields are refused, and who leaves a field as it is does not name it.

    So a newer client is understood by older services for as long as it asks for nothing that they don't know (decision 6).
    """


class RouteRequest(_Request, frozen=True, kw_only=True):
    """Ask where a request should go. One of `hashes`, `tokens` and `prompt` says what it holds."""

    model: str
    hashes: Packed | None = None
    tokens: Annotated[list[int], Meta(max_length=MOST_TOKENS)] | None = None
    prompt: Annotated[str, Meta(max_length=_PROMPT_LIMIT)] | None = None
    tokens_count: Length | None = None
    """With `hashes`, the prompt's length in tokens; left out, it is taken as the full blocks and one more."""
    session: str = ""
    adapter: Annotated[str, Meta(max_length=512)] = ""
    """LoRA adapter; not needed when `model` is the name of one."""
    salt: Annotated[str, Meta(max_length=512)] = ""
    request: str = ""
    exclude: Annotated[list[str], Meta(max_length=4096)] = []
    dry_run: bool = False
    """Only ask: the decision is neither recorded nor counted as load."""
    lease_seconds: Annotated[float, Meta(ge=0, le=LEASE_LIMIT)] = 0.0
    """For those who may never send it: so long it is load, then it is completed as `abandoned`. 0: until it is completed."""
    traceparent: str = ""
    """W3C trace context, for those who can't set a header of this name."""
    tenant: Annotated[str, Meta(max_length=TENANT_LIMIT)] = ""
    """Whose request it is, for the log and the order of those who wait: the name of a gateway's key."""
    origin: Annotated[str, Meta(max_length=128)] = ""
    leg: Length = 0
    """The request that it is a further attempt of, and which leg of a stream, from 0. Both are recorded."""


class RouteAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where it should go. `kind` is `exact`, `prefix`, `miss`, or `hold`: there is no node yet, and `held` says why."""

    request: str
    node: str
    address: str
    kind: str
    matched_blocks: int
    matched_tokens: int
    blocks: int
    tokens: int
    policy: str
    cost: float
    applied: int
    rank: str = ""
    """Data-parallel rank to name in `X-data-parallel-rank`, of an engine that has several."""
    session: str = ""
    """`kept`, `moved`, `new` or empty."""
    moved_from: str = ""
    fallbacks: list[str] = []
    held: Held | None = None
    degraded: bool = False
    """The log is away: the decision is made from memory and waits to be recorded."""
    hashing: Hashing | None = None
    """In the answer to a dry run without blocks (empty `hashes`)."""


class CompleteRequest(_Request, frozen=True, kw_only=True):
    """Tell how a routed request ended. Times in seconds; without `prompt_tokens`, its usage counts as not known."""

    request: str
    node: str
    status: str = "ok"
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    output_tokens: Count = 0
    ttft: Took = 0.0
    duration: Took = 0.0
    traceparent: str = ""


class RegisterRequest(_Request, frozen=True, kw_only=True):
    """Register a node; its cache starts empty. With `replace`, also when a node of this name is alive."""

    node: str
    address: str
    models: list[str]
    block_size: int
    capacity_blocks: dict[Tier, int]
    cache_mode: str = "reported"
    engine: str = ""
    max_active: int = 0
    pulse_seconds: float = 0.0
    labels: dict[str, str] = {}
    replace: bool = False


class NodeRequest(_Request, frozen=True, kw_only=True):
    """Name a node, and why something is done to it."""

    node: str
    reason: str = ""


class LeaveRequest(_Request, frozen=True, kw_only=True):
    """A node leaves by itself, in the life that began with this epoch; one that has begun another since is left alone."""

    node: str
    epoch: Count
    reason: str = ""


class NodeLast(Struct, frozen=True, kw_only=True):
    """The log's last commit about a node itself: its sequence, 0 without one, and its body as it was written."""

    sequence: int
    body: bytes
    format: int = 1
    """The log's format in force."""


class ListRequest(_Request, frozen=True, kw_only=True):
    """List the nodes, of one model or all."""

    model: str = ""


class AdmitRequest(_Request, frozen=True, kw_only=True):
    """Place blocks on a managed node: on `node`, or on the one that `strategy` chooses."""

    model: str
    hashes: Packed
    node: str = ""
    request: str = ""
    strategy: str = "least_loaded"


class BlocksRequest(_Request, frozen=True, kw_only=True):
    """Touch or evict blocks of a managed node; evict also takes `count`, the least recently used."""

    node: str
    hashes: Packed = b""
    count: Count = 0


class LookupRequest(_Request, frozen=True, kw_only=True):
    """Ask how many leading blocks each node of a model holds."""

    model: str
    hashes: Packed


class SessionRequest(_Request, frozen=True, kw_only=True):
    """End a session."""

    model: str
    session: str
    reason: str = ""


class PolicyRequest(_Request, frozen=True, kw_only=True):
    """Change the policy of all routers."""

    policy: str
    parameters: dict[str, float] = {}


class FormatRequest(_Request, frozen=True, kw_only=True):
    """Raise the log's format to this one, or to the newest; with `force` also when some readers don't know it."""

    format: int | None = None
    force: bool = False


class StatusRequest(_Request, frozen=True, kw_only=True):
    """Ask what a service is and knows; with `digest`, also the digest of its state (slow on large fleets)."""

    digest: bool = False


class CompactRequest(_Request, frozen=True, kw_only=True):
    """Purge the log below the oldest snapshot, and below what the history has stored unless there is to be none."""

    without_history: bool = False


class ServeRequest(_Request, frozen=True, kw_only=True):
    """Ask a simulated node to run a request."""

    request: str
    hashes: Packed
    tokens: Length
    output_tokens: Length = 16
    traceparent: str = ""


class ServeAnswer(Struct, frozen=True, kw_only=True):
    """How it ran. Times in seconds."""

    request: str
    node: str
    cached_tokens: int
    ttft: float
    duration: float


class Heartbeat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's heartbeat, never stored. `unheard`: its engine sends no events; `asleep`: it is to be lost for now.

    `inexact`: why its hits are not foretold exactly.
    """

    node: str
    epoch: int
    active: int = 0
    waiting: int = 0
    used_blocks: int = 0
    unheard: bool = False
    asleep: bool = False
    inexact: Text = ""


class Checkpoint(Struct, frozen=True):
    """What a replica's state was at a sequence. Travels on core NATS and is never stored."""

    writer: str
    sequence: int
    digest: str


class SqlRequest(_Request, frozen=True, kw_only=True):
    """Ask the history in SQL. The answer comes in pages; `next` of a page is the subject to ask for the one after it."""

    sql: Annotated[str, Meta(max_length=1 << 20)]
    form: Literal["rows", "arrow"] = "rows"
    """Rows as plain data, or as an Arrow IPC stream a page."""
    seconds: Annotated[float, Meta(gt=0, le=3600)] | None = None
    """How long it may take; the historian's own limit if not given."""
    rows: Annotated[int, Meta(ge=1)] | None = None
    """How many rows it may give; the historian's own limit if not given."""


class SqlNextRequest(_Request, frozen=True, kw_only=True):
    """Ask for a result's next page, or with `close` for no more."""

    result: str
    close: bool = False


class Column(Struct, frozen=True):
    """One column of a result: its name, and its type as Arrow names it."""

    name: str
    type: str


class SqlAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One page of a result."""

    columns: list[Column]
    rows: list[list[Any]] | None = None
    """One list a row, empty when there is none; absent when the page is Arrow."""
    data: bytes = b""
    """The page as an Arrow IPC stream."""
    stored: int
    """Sequence up to which the history was complete when the query began."""
    result: str = ""
    next: str = ""
    """Subject that gives the next page when asked with `result`; empty on the last one."""


class MomentRequest(_Request, frozen=True, kw_only=True):
    """Ask for the fleet as it was at a sequence, or at a time: ISO 8601 (UTC unless it says otherwise), 10m, 2h, yesterday."""

    at: Moment
    node: str = ""


class ChangesRequest(_Request, frozen=True, kw_only=True):
    """Ask what changed between two moments."""

    first: Moment
    second: Moment


class ExplainRequest(_Request, frozen=True, kw_only=True):
    """Ask why a request was sent where it was; its last decision, or the one at a sequence."""

    request: str
    sequence: Count | None = None


class SnapshotRequest(_Request, frozen=True, kw_only=True):
    """Ask for a snapshot of the fleet's state at a moment; it comes in pieces, see `PieceRequest`."""

    at: Moment


class PieceRequest(_Request, frozen=True, kw_only=True):
    """Ask for a piece of something large."""

    result: str
    offset: Count


class Piece(Struct, frozen=True, kw_only=True):
    """A piece of something large, from `offset` of `size` bytes. `next` is the subject that gives more."""

    result: str
    offset: int
    size: int
    data: bytes
    next: str


class WhatifRequest(_Request, frozen=True, kw_only=True):
    """Keep what came of a what-if: rows of `whatif_runs` or `whatif_requests`, as an Arrow IPC stream."""

    table: Literal["whatif_runs", "whatif_requests"]
    data: bytes


T = TypeVar("T", bound=Struct)
_UNKNOWN_FIELD = "Object contains unknown field `"
_DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {}
_encode = msgspec.msgpack.Encoder().encode


def is_json(body: bytes) -> bool:
    """Whether a request is text: a MessagePack map never begins with a byte below 0x80."""
    return not body or body[0] < 0x80


def decode_request(body: bytes, form: type[T]) -> T:
    """A request from JSON or MessagePack. Raises `BadRequest`."""
    try:
        if not is_json(body):
            decoder = _DECODERS.get(form)
            if decoder is None:
                decoder = _DECODERS[form] = msgspec.msgpack.Decoder(form)
            request: T = decoder.decode(body)
        else:
            raw = msgspec.json.decode(body or b"{}")
            for field in PACKED_FIELDS & raw.keys():
                if isinstance(raw[field], list):
                    raw[field] = pack_hashes(parse_hash(value) for value in raw[field])
            request = msgspec.convert(raw, form, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise BadRequest(_misfit(str(error), form)) from None
    except BadHashes as error:
        raise BadRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError, OverflowError, AttributeError) as error:
        raise BadRequest(f"the request is neither JSON nor MessagePack of a map: {str(error)[:200]}") from None
    packed = getattr(request, "hashes", None)
    if packed is not None and len(packed) % _HASH_BYTES:
        raise BadRequest(f"hashes has {len(packed)} bytes; 8 bytes a block are needed")
    return request


def _misfit(error: str, form: type[Struct]) -> str:
    """Why a request is none of a form: an unknown field by its name, with the one that was probably meant."""
    unknown = error.removeprefix(_UNKNOWN_FIELD)
    if unknown == error:
        return f"the request does not fit: {error}"
    from difflib import get_close_matches  # noqa: PLC0415 - only for mistakes

    known = form.__struct_fields__
    name = unknown.rstrip("`")
    near = get_close_matches(name.lower(), known, 1)
    hint = f"was {near[0]!r} meant? " if near else ""
    return f"the request has an unknown field {name[:60]!r}; {hint}known are {', '.join(known)}, to this version of kvplane"


def encode_answer(answer: object, *, as_json: bool) -> bytes:
    """An answer in the manner of its request."""
    if not as_json:
        return _encode(answer)
    data = msgspec.to_builtins(answer, builtin_types=(bytes,))
    return msgspec.json.encode(hashes_as_text(data))


def names(*pairs: tuple[str, str]) -> None:
    """Check (name, what it is) pairs. Raises `BadRequest`."""
    try:
        for name, what in pairs:
            check_name(name, what)
    except BadName as error:
        raise BadRequest(str(error)) from None


def one_of(request: RouteRequest) -> str:
    """Which of the three forms a route request has. Raises `BadRequest`."""
    given = [name for name in ("hashes", "tokens", "prompt") if getattr(request, name) is not None]
    if len(given) != 1:
        raise BadRequest(f"give one of hashes, tokens and prompt, not {' and '.join(given) or 'none'}")
    return given[0]
