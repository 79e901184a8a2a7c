"""Commands to the coordinator: pure functions from a fold and a command to one event, or an error.

Those that place and evict blocks are in `admission`.

What they return is only a proposal. It is committed with the subject's last sequence as expectation and `based_on` the
fold's sequence, and the fold of every replica judges it again.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from kvplane.events import types
from kvplane.events.codec import decode_body, encode, validate
from kvplane.events.errors import BadCommit, BadName
from kvplane.events.subjects import Place, Topic, check_name, subject
from kvplane.projections.fleet import NODES_LIMIT, TIER_LIMIT
from kvplane.projections.held import HOLD_FORMAT, HOLD_PARAMETER
from kvplane.services.protocol.errors import BadRequest, Conflict, NodeExists, UnknownNode

if TYPE_CHECKING:
    from kvplane.projections.fleet import FleetState
    from kvplane.projections.nodes import Node
    from kvplane.services.protocol.messages import (
        LeaveRequest,
        NodeRequest,
        PolicyRequest,
        RegisterRequest,
        SessionRequest,
    )


MODELS_LIMIT = 1_000
"""Most models of a fleet whose caches nodes have; other names of them don't count."""


class Proposal(NamedTuple):
    """An event to be committed, and where."""

    topic: Topic
    name: str
    event: types.Event

    def subject(self, fleet: str) -> str:
        """Subject of the commit."""
        return subject(fleet, self.topic, self.name)


def propose(topic: Topic, name: str, event: types.Event) -> Proposal:
    """A proposal that every reader will take as valid. Raises `BadRequest` for one that none would."""
    try:
        encoded = encode([event])
    except (OverflowError, UnicodeEncodeError) as error:
        raise BadRequest(f"a value can't be written to the log: {error}") from None
    try:
        validate(Place(topic, name), decode_body(topic, encoded))
    except BadCommit as error:
        raise BadRequest(str(error)) from None
    return Proposal(topic, name, event)


def known(state: FleetState, name: str) -> Node:
    """The node of this name. Raises `UnknownNode`."""
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
    caches = state.caches.by_model
    if request.models[0] not in caches and len(caches) >= MODELS_LIMIT:
        raise Conflict(
            f"the fleet has {MODELS_LIMIT:,} models with caches of their own, more it can't have; remove nodes, or begin "
            "another fleet"
        )
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
    node = known(state, request.node)
    return None if node.cordoned else propose("node", node.name, types.NodeCordoned(node.name, request.reason))


def uncordon(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Let a node take requests again; none when it does already."""
    node = known(state, request.node)
    return propose("node", node.name, types.NodeUncordoned(node.name)) if node.cordoned else None


def remove(state: FleetState, request: NodeRequest) -> Proposal:
    """Take a node out of the fleet."""
    node = known(state, request.node)
    return propose("node", node.name, types.NodeRemoved(node.name, request.reason))


def leave(state: FleetState, request: LeaveRequest) -> Proposal | None:
    """What a node's leaving means: it is removed. None when it is not in that life any more.

    One that was cordoned counts as lost instead: it is known on, so that it stays cordoned when it comes back.
    """
    node = state.nodes.get(request.node)
    if node is None or node.epoch != request.epoch:
        return None
    if not node.cordoned:
        return propose("node", node.name, types.NodeRemoved(node.name, request.reason))
    return None if node.lost is not None else propose("node", node.name, types.NodeLost(node.name, request.reason))


def lost(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Conclude that a node is lost; none when that is known."""
    node = known(state, request.node)
    return None if node.lost is not None else propose("node", node.name, types.NodeLost(node.name, request.reason))


def recovered(state: FleetState, request: NodeRequest) -> Proposal | None:
    """Conclude that a lost node is back; none when it is not lost."""
    node = known(state, request.node)
    return None if node.lost is None else propose("node", node.name, types.NodeRecovered(node.name))


def end_session(state: FleetState, request: SessionRequest) -> Proposal | None:
    """End a session; none when there is none."""
    if state.sessions.get(request.model, request.session) is None:
        return None
    event = types.SessionEnded(request.session, request.model, request.reason)
    return propose("session", request.model, event)


def set_policy(state: FleetState, request: PolicyRequest) -> Proposal:
    """Change the policy of all routers."""
    if request.parameters.get(HOLD_PARAMETER) and state.format < HOLD_FORMAT:
        raise BadRequest(
            f"requests can be held from format {HOLD_FORMAT} of the log on, and this one is in format {state.format}; "
            "`kvplane format raise` raises it"
        )
    for name, value in request.parameters.items():
        if not isfinite(value):
            raise BadRequest(f"parameter {name[:80]!r} is {value}; it must be a finite number")
    return propose("control", "", types.PolicyChanged(request.policy, request.parameters))
