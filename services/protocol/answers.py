"""Answers of the services that are no more than a few facts; the others are in `messages` and `status`."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from kvplane.events.types import GroupKind, Tier  # noqa: TC001 - a Struct looks its types up


class CompleteAnswer(Struct, frozen=True, kw_only=True):
    """The completion is noted. `degraded`: the log is away, and it waits to be recorded."""

    request: str
    degraded: bool


class RegisterAnswer(Struct, frozen=True, kw_only=True):
    """The node is registered; `epoch` is the sequence of its registration, which its events must name."""

    node: str
    epoch: int
    sequence: int
    format: int = 1
    """The log's format in force, which says what may be written."""


class ChangeAnswer(Struct, frozen=True, kw_only=True):
    """`changed` is false when it was so already. `sequence` is that of the commit, or of the state that was looked at."""

    node: str
    changed: bool
    sequence: int


class GroupRow(Struct, frozen=True, kw_only=True):
    """A further KV cache group: what a hit needs of it, and how many blocks it holds."""

    kind: GroupKind
    window: int
    """Tokens of its window or chunk."""
    span: int
    """Of how many of the node's blocks each of its blocks consists."""
    held_blocks: int


class NodeRow(Struct, frozen=True, kw_only=True):
    """A node with its cache and load."""

    node: str
    state: str
    """`up`, `cordoned` or `lost`."""
    reason: str
    """Why it is lost."""
    address: str
    models: list[str]
    cache_mode: str
    epoch: int
    block_size: int
    held_blocks: dict[Tier, int]
    capacity_blocks: dict[Tier, int]
    active: float
    """Requests that run there: a whole number, written as one with a fraction."""
    max_active: int
    sessions: int
    waiting: int | None
    """Requests that wait there, by its last heartbeat."""
    unheard: bool
    """It serves, and no event about its cache has come."""
    inexact: str | UnsetType = UNSET
    """Why its hits are not foretold exactly, by its last heartbeat."""
    groups: dict[int, GroupRow] | UnsetType = UNSET
    """Further KV cache groups of a hybrid model, by the engine's numbers."""


class NodesAnswer(Struct, frozen=True, kw_only=True):
    """The nodes, by name."""

    fleet: str
    sequence: int
    nodes: list[NodeRow]


class AdmitAnswer(Struct, frozen=True, kw_only=True):
    """Where the blocks were placed and what left for them. Without `address` nothing had to change."""

    node: str
    evicted: bytes
    sequence: int
    address: str | UnsetType = UNSET
    stored_blocks: int | UnsetType = UNSET


class LookupAnswer(Struct, frozen=True, kw_only=True):
    """How many leading blocks each node holds in its fastest tier."""

    model: str
    blocks: int
    matches: dict[str, int]
    sequence: int


class SessionAnswer(Struct, frozen=True, kw_only=True):
    """`changed` is false when there was no such session."""

    session: str
    changed: bool
    sequence: int


class PolicyAnswer(Struct, frozen=True, kw_only=True):
    """From `sequence` on the policy is in force."""

    policy: str
    sequence: int


class Reader(Struct, frozen=True, kw_only=True):
    """One that reads the log, and the newest format that it knows."""

    service: str
    writer: str
    kvplane: str
    format: int


class FormatShown(Struct, frozen=True, kw_only=True):
    """The log's format in force, and who reads which."""

    format: int
    readers: list[Reader]


class FormatAnswer(Struct, frozen=True, kw_only=True):
    """The log's format in force now."""

    format: int
    changed: bool
    sequence: int


class SnapshotAnswer(Struct, frozen=True, kw_only=True):
    """The snapshot's sequence. With `changed` false there was one of it already; otherwise sizes in bytes, times in seconds."""

    sequence: int
    changed: bool | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    seconds: float | UnsetType = UNSET
    pause: float | UnsetType = UNSET
    """How long the coordinator stood still for it."""


class CompactAnswer(Struct, frozen=True, kw_only=True):
    """Where the log begins now, how many messages and bytes went, and the sequences below which it could be purged."""

    first: int
    purged: int
    freed_bytes: int
    snapshot: int
    history: int | UnsetType = UNSET


class SequenceAnswer(Struct, frozen=True, kw_only=True):
    """The sequence that a moment means."""

    sequence: int


class WhatifAnswer(Struct, frozen=True, kw_only=True):
    """How many rows were kept."""

    table: str
    rows: int
