"""Admission: which blocks go on which managed node, and what leaves for them. Pure, as `commands` are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvplane.events import types
from kvplane.events.hashing import derive_hash, pack_hashes, unpack_hashes
from kvplane.services.control.commands import Proposal, known, propose
from kvplane.services.protocol.errors import BadRequest, Conflict, NoRoom, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplane.projections.fleet import FleetState
    from kvplane.projections.nodes import Node
    from kvplane.services.protocol.messages import AdmitRequest, BlocksRequest


class _Fit(NamedTuple):
    """How blocks would fit on one node: how many are new there, how many more it can hold, and how many it holds."""

    node: Node
    new: int
    free: int
    active: int
    used: int


def _managed(state: FleetState, name: str) -> Node:
    node = known(state, name)
    if not node.managed:
        raise Conflict(f"node {name!r} reports its own cache; only managed nodes take placements")
    if node.lost is not None:
        raise Conflict(f"node {name!r} is lost ({node.lost}); register it again first")
    return node


def _fit(state: FleetState, node: Node, wanted: set[int]) -> _Fit:
    order = state.recency[node.name].order
    used = len(order)
    new = sum(block not in order for block in wanted)
    free = node.registered.capacity_blocks["gpu"] - used
    return _Fit(node, new, free, int(state.load.active[state.load.ordinal[node.name]]), used)


def _least_loaded(fit: _Fit) -> tuple[float, ...]:
    """Fewest requests, then the smallest share of the cache in use."""
    return (fit.active, fit.used / max(1, fit.node.registered.capacity_blocks["gpu"]))


def _best_fit(fit: _Fit) -> tuple[float, ...]:
    """The least space that is left over."""
    return (fit.free - fit.new, fit.active)


STRATEGIES: dict[str, Callable[[_Fit], tuple[float, ...]]] = {"least_loaded": _least_loaded, "best_fit": _best_fit}


def admit(state: FleetState, request: AdmitRequest) -> Proposal:
    """Place blocks on a managed node, evicting the least recently used for them; those that are there are used anew.

    A node with space goes before one that must evict. Raises `NoRoom` when eviction can't make enough space anywhere.
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
        fits = [_fit(state, node, wanted)]
    else:
        fits = [
            _fit(state, node, wanted)
            for node in state.nodes.values()
            if node.available and node.managed and request.model in node.registered.models
        ]
        if not fits:
            raise UnknownModel(f"no managed node is available for model {request.model[:80]!r}")
    key = STRATEGIES[request.strategy]
    tie = request.request.encode() or request.hashes[:8]
    fits.sort(key=lambda fit: (*key(fit), derive_hash(tie, fit.node.name.encode())))
    for fit in fits:
        if fit.new <= fit.free:
            return _place(fit.node, request, b"")
    for fit in fits:
        need = fit.new - fit.free
        victims = state.recency[fit.node.name].victims(need, wanted)
        if len(victims) == need:
            return _place(fit.node, request, pack_hashes(victims))
    raise NoRoom(_why_no_space(state, fits))


def _place(node: Node, request: AdmitRequest, evicted: bytes) -> Proposal:
    event = types.BlocksPlaced(
        node=node.name, epoch=node.epoch, stored=request.hashes, evicted=evicted, request=request.request[:128]
    )
    return propose("cache", node.name, event)


def _why_no_space(state: FleetState, fits: list[_Fit]) -> str:
    best = min(fits, key=lambda fit: fit.new - fit.free)
    capacity = best.node.registered.capacity_blocks["gpu"]
    recency = state.recency[best.node.name]
    protected = sum(block in recency.order for block in recency.protected)
    return (
        f"{best.new} new blocks don't fit on any of {len(fits)} nodes; on {best.node.name!r} {best.free} of {capacity} "
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
