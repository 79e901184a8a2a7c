"""The events: what can happen in a fleet. Frozen, tagged with their name and version, unknown fields are ignored.

Block hashes are packed little-endian u64 (`hashes: bytes`, 8 bytes a block); in JSON they are lists of decimal or hex
strings. Times are seconds, sizes are tokens or blocks as named.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kvplane.events.subjects import NAME_LIMIT

EVENTS_LIMIT = 16384
"""Most events in one commit."""
LENGTH_LIMIT = 1 << 31
"""Longest request, in tokens or blocks."""
HASHES_LIMIT = 1 << 18
"""Most block hashes in one event."""

Name = Annotated[str, Meta(min_length=1, max_length=NAME_LIMIT)]
Text = Annotated[str, Meta(max_length=512)]
Count = Annotated[int, Meta(ge=0, le=(1 << 53))]
Length = Annotated[int, Meta(ge=0, le=LENGTH_LIMIT)]
"""Length of one request, in tokens or blocks."""
Hash = Annotated[int, Meta(ge=0)]
Packed = Annotated[bytes, Meta(max_length=HASHES_LIMIT * 8)]
Seconds = Annotated[float, Meta(ge=0)]
EngineHash = int | bytes
"""An engine's own hash of a block. It differs between engines, versions and seeds."""
TRACEPARENT_LIMIT = 64
Traceparent = Annotated[str, Meta(max_length=TRACEPARENT_LIMIT)]
"""W3C traceparent of a request, empty without one. No fold reads it."""
TENANT_LIMIT = 128
Tenant = Annotated[str, Meta(max_length=TENANT_LIMIT)]
Tier = Literal["gpu", "cpu", "disk"]
TIERS: tuple[Tier, ...] = ("gpu", "cpu", "disk")
Group = Annotated[int, Meta(ge=0, le=63)]
"""The engine's number of a KV cache group."""
GroupKind = Literal["full", "sliding", "chunked", "state"]
"""What a hit needs of a KV cache group: all of its blocks, those of the last window, those of the last chunk, the last one."""


def _tag(name: str) -> str:
    return f"{name}.1"


class Event(Struct, frozen=True, tag=_tag, tag_field="type", omit_defaults=True, gc=False, forbid_unknown_fields=True):
    """Base of all events. The tag is the name and the version of its shape.

    Fields that are unknown here are ignored all the same: `codec` takes them out, see there.
    """


class NodeRegistered(Event, frozen=True, tag=_tag):
    """A node starts a life with an empty cache; its epoch is the sequence of this event."""

    node: Name
    address: Text
    models: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    """The cache's model first, then other names that the node answers to (aliases, LoRAs)."""
    block_size: Annotated[int, Meta(ge=1, le=65536)]
    capacity_blocks: Annotated[dict[Tier, Count], Meta(max_length=3)]
    cache_mode: Literal["managed", "reported"] = "reported"
    engine: Text = ""
    max_active: Count = 0
    """Most requests at once; 0 is no limit."""
    pulse_seconds: Seconds = 0.0
    """How often the node promises to heartbeat; 0 is no promise, and silence then means nothing."""
    labels: Annotated[dict[Name, Text], Meta(max_length=64)] = {}


class NodeCordoned(Event, frozen=True, tag=_tag):
    """The node takes no new requests; what runs goes on."""

    node: Name
    reason: Text = ""


class NodeUncordoned(Event, frozen=True, tag=_tag):
    """The node takes requests again."""

    node: Name


class NodeLost(Event, frozen=True, tag=_tag):
    """The node is concluded to be gone: its blocks and sessions go."""

    node: Name
    reason: Text = ""


class NodeRecovered(Event, frozen=True, tag=_tag):
    """A lost node heartbeats again. Its cache is unknown until it reports or registers."""

    node: Name


class NodeRemoved(Event, frozen=True, tag=_tag):
    """The node leaves the fleet for good."""

    node: Name
    reason: Text = ""


class BlocksStored(Event, frozen=True, tag=_tag):
    """A reported node holds a run of blocks. `parent` is the hash before the first, none at the root of a chain."""

    node: Name
    epoch: Count
    batch: Count
    hashes: Packed
    parent: Hash | None = None
    tier: Tier = "gpu"
    engine_hashes: Annotated[list[EngineHash], Meta(max_length=HASHES_LIMIT)] | None = None


class BlocksRemoved(Event, frozen=True, tag=_tag):
    """A reported node holds these blocks no longer."""

    node: Name
    epoch: Count
    batch: Count
    hashes: Packed
    tier: Tier = "gpu"


class BlocksPlaced(Event, frozen=True, tag=_tag):
    """A managed node is filled: what is stored and what leaves for it are one event."""

    node: Name
    epoch: Count
    stored: Packed = b""
    evicted: Packed = b""
    parent: Hash | None = None
    request: Annotated[str, Meta(max_length=128)] = ""


class GroupStored(Event, frozen=True, tag=_tag):
    """A reported node of a hybrid model holds blocks in a further KV cache group; without blocks, that it has this group.

    `BlocksStored` tells of the group that is followed as the cache itself. No more of that is a hit than every further
    group of the node can serve, see `projections.groups`. All of it is in the tier `gpu`.
    """

    node: Name
    epoch: Count
    batch: Count
    group: Group
    kind: GroupKind
    hashes: Packed = b""
    """The fleet's block that each of the group's blocks ends with."""
    window: Length = 0
    """Tokens of a sliding window, or of a chunk."""
    span: Annotated[int, Meta(ge=1, le=65536)] = 1
    """Of how many of the fleet's blocks each of the group's consists."""
    engine_hashes: Annotated[list[EngineHash], Meta(max_length=HASHES_LIMIT)] | None = None


class GroupRemoved(Event, frozen=True, tag=_tag):
    """A reported node holds these blocks no longer in a further KV cache group."""

    node: Name
    epoch: Count
    batch: Count
    group: Group
    hashes: Packed


class CacheCleared(Event, frozen=True, tag=_tag):
    """The node's cache is empty, or is to be taken as empty."""

    node: Name
    epoch: Count
    batch: Count = 0
    reason: Text = ""


class SessionAssigned(Event, frozen=True, tag=_tag):
    """A session belongs on this node from now on."""

    session: Name
    model: Name
    node: Name
    reason: Text = ""


class SessionEnded(Event, frozen=True, tag=_tag):
    """A session is over."""

    session: Name
    model: Name
    reason: Text = ""


class Candidate(Struct, frozen=True, array_like=True, omit_defaults=True, gc=False, forbid_unknown_fields=True):
    """One node that a decision weighed: its match in blocks and its cost in the policy's unit."""

    node: Name
    match: Count
    cost: float


class RequestRouted(Event, frozen=True, tag=_tag):
    """A router's decision. `applied` is the sequence that its fold had applied.

    With the fold at that sequence, what the router decided before, and `decided`, it can be made again.
    """

    request: Name
    model: Name
    node: Name
    match: Length
    blocks: Length
    tokens: Length
    hashes: Packed = b""
    session: Annotated[str, Meta(max_length=128)] = ""
    policy: Text = ""
    applied: Count = 0
    candidates: Annotated[list[Candidate], Meta(max_length=1024)] = []
    """The chosen node and the next best ones, by cost."""
    best: Length = 0
    """Longest match of all nodes that could have been chosen, in blocks."""
    decided: Count = 0
    """When, by the router's clock, in unix microseconds."""
    exclude: Annotated[list[Name], Meta(max_length=4096)] = []
    """Nodes that the request would not have."""
    trace: Traceparent = ""
    tenant: Tenant = ""
    """The key's name by which it was let in, empty without one. No fold reads it; `projections.tenants` counts by it."""
    origin: Annotated[str, Meta(max_length=NAME_LIMIT)] = ""
    """The request that this is a further attempt of; empty for a first one. No fold reads it, nor `leg`."""
    leg: Length = 0
    """Which part of the answer it makes, from 0: a stream that broke off is gone on with by the next leg."""


class RequestCompleted(Event, frozen=True, tag=_tag):
    """How a routed request ended. `ttft` and `duration` are seconds from its arrival at the node."""

    request: Name
    node: Name
    status: Text = "ok"
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    output_tokens: Count = 0
    ttft: Seconds = 0.0
    duration: Seconds = 0.0
    trace: Traceparent = ""


class RequestHeld(Event, frozen=True, tag=_tag):
    """A router holds a request back, since the caches have no room for its context; again now and then while it does.

    `applied` and `decided` are as of a decision, with which it can be made again.
    """

    request: Name
    model: Name
    tokens: Length
    session: Annotated[str, Meta(max_length=128)] = ""
    tenant: Text = ""
    """Who asks, as far as that is known."""
    turns: Length = 0
    """Requests that its conversation had before, as far as that is known."""
    reason: Text = ""
    place: Count = 0
    """Its place in the queue of its model, from 1."""
    expected: Seconds = 0.0
    """How long it is expected to wait from then on; 0 when that is not known."""
    blocks: Length = 0
    hashes: Packed = b""
    """Of the first time only."""
    applied: Count = 0
    decided: Count = 0
    """When, by the router's clock, in unix microseconds."""
    trace: Traceparent = ""


class RequestReleased(Event, frozen=True, tag=_tag):
    """A request is held no more."""

    request: Name
    model: Name
    reason: Text = ""
    """`room`, `resident`, `bound`, `off`: it was let in; `left`: its client is gone."""
    waited: Seconds = 0.0
    """Since it was first held, by the log's time."""


class PolicyChanged(Event, frozen=True, tag=_tag):
    """From this sequence on, every router decides by this policy."""

    policy: Name
    parameters: Annotated[dict[Name, float], Meta(max_length=64)] = {}


class FormatRaised(Event, frozen=True, tag=_tag):
    """From this sequence on the log may hold events of this format; see `versions`."""

    format: Annotated[int, Meta(ge=2, le=1_000_000)]
    kvplane: Text = ""
    """Version of kvplane that raised it, and so one that knows it."""


NodeEvent = NodeRegistered | NodeCordoned | NodeUncordoned | NodeLost | NodeRecovered | NodeRemoved
CacheEvent = BlocksStored | BlocksRemoved | BlocksPlaced | CacheCleared | GroupStored | GroupRemoved
SessionEvent = SessionAssigned | SessionEnded
AccessEvent = RequestRouted | RequestCompleted | RequestHeld | RequestReleased
ControlEvent = PolicyChanged | FormatRaised
