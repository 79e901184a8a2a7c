"""The policies that others use, to be chosen and to be compared with. `ttft` has kvplane's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvplane.events.hashing import derive_hash
from kvplane.services.routing.parameters import Parameter

if TYPE_CHECKING:
    from kvplane.services.routing.roster import Column
    from kvplane.services.routing.view import Request, View

Parameters = dict[str, float]

CROWDED = 1.25
"""A node with so many times the mean of live contexts gets no new conversation, as in consistent hashing with bounded loads."""
EQUAL = 1e-6
"""Costs that differ by this share of their range are equal: the node with less live context gets a new conversation."""


def _bounded(view: View, costs: Column) -> Column:
    """Costs, by which no crowded node gets a new conversation: a beginning that many share must not decide where all live."""
    if not view.begins:
        return costs
    contexts = view.contexts
    total = contexts.sum()
    if total <= 0:
        return costs
    span = costs.max() - costs.min() + 1
    crowded = contexts * len(contexts) > CROWDED * total
    bounded: Column = costs + crowded * (2 * span) + contexts * (EQUAL * span / total)
    return bounded


def round_robin(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """Each node in turn, whatever it holds: by a hash of the request's id, so that replicas need no shared counter."""
    count = len(view.names)
    first = derive_hash(request.id.encode()) % count
    costs: Column = np.roll(np.arange(count), first)
    return costs


def least_loaded(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """The node on which the fewest requests run."""
    return view.active


def session(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """The node of the request's session; the least loaded when it has none yet."""
    costs = view.active.copy()
    if view.session >= 0:
        costs[view.session] = -1
    return _bounded(view, costs)


def cascade(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """The classic order: the session's node, else the longest match, else the least loaded."""
    costs: Column = view.active / (view.active.max() + 1) - view.match
    if view.session >= 0:
        costs[view.session] -= request.blocks + 1
    return _bounded(view, costs)


THRESHOLD = {
    "imbalance": Parameter(32, "requests", "balance when the busiest node runs so many more than the idlest, and ..."),
    "ratio": Parameter(1.1, "times", "... so many times as many"),
    "least_match": Parameter(
        0.5, "share", "follow the best match when it is more than this share of the prompt", most=1
    ),
}


def threshold(view: View, request: Request, parameters: Parameters) -> Column:
    """The longest match while load is even and the match is long, else the least loaded.

    As the cache-aware mode of the SGLang gateway, with its defaults.
    """
    active = view.active
    least, most = active.min(), active.max()
    if most - least > parameters["imbalance"] and most > parameters["ratio"] * least:
        return _bounded(view, active)
    matched = view.match.max() * request.block_size
    if matched > parameters["least_match"] * request.tokens:
        costs: Column = active / (most + 1) - view.match
        return _bounded(view, costs)
    return _bounded(view, active)


BLOCKS = {"overlap_weight": Parameter(1, "times", "how much a block to prefill counts more than a block in use")}


def blocks(view: View, request: Request, parameters: Parameters) -> Column:
    """Blocks left to prefill, plus blocks in use by what runs: the default cost of Dynamo's KV-aware router."""
    return _bounded(view, _blocks(view, request, parameters))


def _blocks(view: View, request: Request, parameters: Parameters) -> Column:
    prefill = (view.pending + request.tokens) / request.block_size - view.match
    costs: Column = parameters["overlap_weight"] * prefill + view.blocks
    return costs


def blocks_terms(view: View, request: Request, parameters: Parameters) -> dict[str, Column]:
    """The parts of `blocks`'s costs, in blocks."""
    weight = parameters["overlap_weight"] / request.block_size
    costs = _blocks(view, request, parameters)
    return {
        "queue": weight * view.pending,
        "own": weight * (request.tokens - view.match * request.block_size),
        "in_use": view.blocks,
        "crowded": _bounded(view, costs) - costs,
    }


E2 = {
    "decode_seconds": Parameter(0.2, "s", "seconds of a node that the answer of one recent request counts for"),
    "window": Parameter(120, "s", "how long recent load counts for"),
}


def e2(view: View, request: Request, parameters: Parameters) -> Column:
    """Exploit or explore, as Preble does (Srivatsa et al., 2024, "Preble: Efficient Distributed Prompt Scheduling").

    When more of the prompt is cached somewhere than is not, the least loaded of the nodes with that match; else the node
    with the least sum of its recent work, of what an eviction for this prompt would cost, and of this prompt's own work.
    """
    match, size = view.match, request.block_size
    speed = view.speed
    work = parameters["window"] * (view.recent_uncached / speed + view.recent_requests * parameters["decode_seconds"])
    longest = match.max()
    if longest * size > request.tokens - longest * size:
        costs: Column = work / (work.max() + 1) + (longest - match) * 2.0
        return _bounded(view, costs)
    missing = request.blocks - match
    evicted = np.maximum(view.held + missing - view.capacity, 0)
    reused = 1 - view.recent_uncached / np.maximum(view.recent_tokens, 1e-9)
    lost = np.minimum(evicted, missing) * size * np.clip(reused, 0, 1)
    explored: Column = work + (lost + request.tokens - match * size) / speed
    return _bounded(view, explored)
