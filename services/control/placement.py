"""Decisions of the coordinator: pure functions from a fold and a command to one event, or an error.

What they return is only a proposal. It is committed with the subject's last sequence as expectation and `based_on` the
fold's sequence, and the fold of every replica judges it again.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from kvplane.events import types
from kvplane.events.codec import decode_body, encode, validate
from kvplane.events.errors import BadCommit, BadName
from kvplane.events.hashing import derive_hash, pack_hashes, unpack_hashes
from kvplane.events.subjects import Place, Room, check_name, subject
from kvplane.projections.fleet import NODES_LIMIT, TIER_LIMIT
from kvplane.services.protocol.errors import BadRequest, Conflict, NodeExists, NoRoom, UnknownModel, UnknownNode

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplane.projections.fleet import FleetState
    from kvplane.projections.nodes import Node
    from kvplane.services.protocol.messages import (
        AdmitRequest,
        BlocksRequest,
        NodeRequest,
        PolicyRequest,
        RegisterRequest,
        SessionRequest,
    )


class Proposal(NamedTuple):
    """An event to be committed, and where."""

    room: Room
    name: str
    event: types.Event

    def subject(self, fleet: str) -> str:
        """Subject of the commit."""
        return subject(fleet, self.room, self.name)


def propose(room: Room, name: str, event: types.Event) -> Proposal:
    """A proposal that every reader will take as valid. Raises `BadRequest` for one that none would."""
    try:
        validate(Place(room, name), decode_body(room, encode([event])))
    except BadCommit as error:
        raise BadRequest(str(error)) from None
    return Proposal(room, name, event)


def _known(state: FleetState, name: str) -> Node:
    node = state.nodes.get(name)
    if node is None:
        raise UnknownNode(f"node {name[:80]!r} is not registered; `kvplane node list` shows those that are")
    return node


def register(state: FleetState, request: RegisterRequest) -> Proposal:
    """Register a node. Raises `BadRequest`, `NodeExists`, or `Conflict` when the model's block size is another."""
    try:
        check_name(request.node, "node")
    except BadName as error:
        raise BadRequest(str(error)) from None
    if request.cache_mode not in {"managed", "reported"}:
        raise BadRequest(f"cache_mode is {request.cache_mode[:40]!r}; it must be managed or reported")
    if request.block_size < 1:
        raise BadRequest(f"block_size is {request.block_size}; it must be at least 1 token")
    for what, value in [*request.capacity_blocks.items(), ("max_active", request.max_active)]:
        if value < 0:
            raise BadRequest(f"{what} is {value}; it must not be negative")
    for tier, blocks in request.capacity_blocks.items():
        if blocks > TIER_LIMIT:
            raise BadRequest(f"capacity_blocks says {blocks:,} for {tier}; a tier can have {TIER_LIMIT:,} at the most")
    if not 0 <= request.pulse_seconds <= 3600:
        raise BadRequest(f"pulse_seconds is {request.pulse_seconds}; it must be from 0 to 3600")
    event = types.NodeRegistered(
        node=request.node, address=request.address, models=request.models, block_size=request.block_size,
        capacity_blocks=request.capacity_blocks, cache_mode=request.cache_mode,  # type: ignore[arg-type]
        engine=request.engine, max_active=request.max_active, pulse_seconds=request.pulse_seconds,
        labels=request.labels,
    )  # fmt: skip
    if not request.models:
        raise BadRequest("models is empty; name at least one model")
    proposal = propose("node", request.node, event)
    before = state.nodes.get(request.node)
    if before is None and len(state.nodes) >= NODES_LIMIT:
        raise Conflict(f"the fleet has {NODES_LIMIT:,} nodes, more it can't have; remove some, or begin another fleet")
    if before is not None and before.lost is None and not request.replace:
        raise NodeExists(
            f"node {request.node!r} is registered already (epoch {before.epoch}); remove it first, or register with "
            "replace if it restarted: its cache then counts as empty"
        )
    for other in state.nodes.values():
        size = other.registered.block_size
        shared = [model for model in other.registered.models if model in request.models]
        if other.name != request.node and shared and size != request.block_size:
            raise Conflict(
                f"node {other.name!r} serves {shared[0]!r} with blocks of {size} tokens; all nodes of a model must "
                "have one block size"
            )
    return proposal


def cordon(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Keep new requests from a node; none when it is so already."""
    node = _known(state, request.node)
    return None if node.cordoned else propose("node", node.name, types.NodeCordoned(node.name, request.reason))


def uncordon(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Let a node take requests again; none when it does already."""
    node = _known(state, request.node)
    return propose("node", node.name, types.NodeUncordoned(node.name)) if node.cordoned else None


def remove(state: FleetState, request: NodeRequest) -> Proposal:
    """Take a node out of the fleet."""
    node = _known(state, request.node)
    return propose("node", node.name, types.NodeRemoved(node.name, request.reason))


def lost(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Conclude that a node is lost; none when that is known."""
    node = _known(state, request.node)
    return None if node.lost is not None else propose("node", node.name, types.NodeLost(node.name, request.reason))


def recovered(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Conclude that a lost node is back; none when it is not lost."""
    node = _known(state, request.node)
    return None if node.lost is None else propose("node", node.name, types.NodeRecovered(node.name))


class _Room(NamedTuple):
    """What a placement would mean for one node: blocks that are new there, free and evictable room."""

    node: Node
    new: int
    free: int
    active: int
    used: int


def _managed(state: FleetState, name: str) -> Node:
    node = _known(state, name)
    if not node.managed:
        raise Conflict(f"node {name!r} reports its own cache; only managed nodes take placements")
    if node.lost is not None:
        raise Conflict(f"node {name!r} is lost ({node.lost}); register it again first")
    return node


def _room(state: FleetState, node: Node, wanted: set[int]) -> _Room:
    order = state.recency[node.name].order
    used = len(order)
    new = sum(block not in order for block in wanted)
    free = node.registered.capacity_blocks["gpu"] - used
    return _Room(node, new, free, int(state.load.active[state.load.ordinal[node.name]]), used)


def _least_loaded(room: _Room) -> tuple[float, ...]:
    """Fewest requests, then the smallest share of the cache in use."""
    return (room.active, room.used / max(1, room.node.registered.capacity_blocks["gpu"]))


def _best_fit(room: _Room) -> tuple[float, ...]:
    """The least room that is left over."""
    return (room.free - room.new, room.active)


STRATEGIES: dict[str, Callable[[_Room], tuple[float, ...]]] = {"least_loaded": _least_loaded, "best_fit": _best_fit}


def admit(state: FleetState, request: AdmitRequest) -> Proposal:
    """Place blocks on a managed node, evicting the least recently used for them; those that are there are used anew.

    A node with room goes before one that must evict. Raises `NoRoom` when eviction can't make room anywhere.
    """
    if request.strategy not in STRATEGIES:
        raise BadRequest(f"strategy {request.strategy[:40]!r} is not one of {', '.join(STRATEGIES)}")
    blocks = unpack_hashes(request.hashes)
    wanted = set(blocks)
    if not blocks:
        raise BadRequest("hashes is empty; name the blocks to be placed")
    if len(wanted) != len(blocks):
        raise BadRequest("hashes names a block twice")
    if request.node:
        node = _managed(state, request.node)
        if request.model not in node.registered.models:
            raise UnknownModel(f"node {node.name!r} does not serve model {request.model[:80]!r}")
        rooms = [_room(state, node, wanted)]
    else:
        rooms = [
            _room(state, node, wanted)
            for node in state.nodes.values()
            if node.available and node.managed and request.model in node.registered.models
        ]
        if not rooms:
            raise UnknownModel(f"no managed node is available for model {request.model[:80]!r}")
    key = STRATEGIES[request.strategy]
    tie = request.request.encode() or request.hashes[:8]
    rooms.sort(key=lambda room: (*key(room), derive_hash(tie, room.node.name.encode())))
    for room in rooms:
        if room.new <= room.free:
            return _place(room.node, request, b"")
    for room in rooms:
        need = room.new - room.free
        victims = state.recency[room.node.name].victims(need, wanted)
        if len(victims) == need:
            return _place(room.node, request, pack_hashes(victims))
    raise NoRoom(_why_no_room(state, rooms))


def _place(node: Node, request: AdmitRequest, evicted: bytes) -> Proposal:
    event = types.BlocksPlaced(
        node=node.name, epoch=node.epoch, stored=request.hashes, evicted=evicted, request=request.request[:128]
    )
    return propose("cache", node.name, event)


def _why_no_room(state: FleetState, rooms: list[_Room]) -> str:
    best = min(rooms, key=lambda room: room.new - room.free)
    capacity = best.node.registered.capacity_blocks["gpu"]
    recency = state.recency[best.node.name]
    protected = sum(block in recency.order for block in recency.protected)
    return (
        f"{best.new} new blocks don't fit on any of {len(rooms)} nodes; on {best.node.name!r} {best.free} of {capacity} "
        f"are free and {protected} are protected by running requests. Wait for requests to complete, or add capacity"
    )


def touch(state: FleetState, request: BlocksRequest) -> Proposal | None:
    """Mark held blocks as used now; none when the node holds none of them."""
    node = _managed(state, request.node)
    order = state.recency[node.name].order
    held = [block for block in unpack_hashes(request.hashes) if block in order]
    if not held:
        return None
    return propose("cache", node.name, types.BlocksPlaced(node.name, node.epoch, stored=pack_hashes(held)))


def evict(state: FleetState, request: BlocksRequest) -> Proposal | None:
    """Evict named blocks, or the `count` least recently used; none when there is nothing to evict."""
    node = _managed(state, request.node)
    recency = state.recency[node.name]
    if bool(request.hashes) is bool(request.count):
        raise BadRequest("give either hashes or count")
    if request.count:
        victims = recency.victims(request.count)
        if len(victims) < request.count:
            raise NoRoom(f"node {node.name!r} has only {len(victims)} blocks that may be evicted, not {request.count}")
    else:
        victims = [block for block in dict.fromkeys(unpack_hashes(request.hashes)) if block in recency.order]
        if any(block in recency.protected for block in victims):
            raise NoRoom(f"some of these blocks on node {node.name!r} are used by running requests")
    if not victims:
        return None
    return propose("cache", node.name, types.BlocksPlaced(node.name, node.epoch, evicted=pack_hashes(victims)))


def end_session(state: FleetState, request: SessionRequest) -> Proposal | None:
    """End a session; none when there is none."""
    if state.sessions.get(request.model, request.session) is None:
        return None
    event = types.SessionEnded(request.session, request.model, request.reason)
    return propose("session", request.model, event)


def set_policy(request: PolicyRequest) -> Proposal:
    """Change the policy of all routers."""
    for name, value in request.parameters.items():
        if not isfinite(value):
            raise BadRequest(f"parameter {name[:80]!r} is {value}; it must be a finite number")
    return propose("control", "", types.PolicyChanged(request.policy, request.parameters))
