"""Policies: what it would cost to send a request to each node. The node with the least cost is chosen.

A policy is a function `score(view, request, parameters) -> costs`: one number a candidate, in any unit, as long as less
is better. A `View` is columns (NumPy arrays), one entry a candidate, so that a policy is an expression and stays fast at
1,000 nodes. Built-in policies are in `POLICIES`; `module:attr` names any other function of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from events.hashing import derive_hash
from services.errors import BadRequest

Column = NDArray[Any]
Parameters = dict[str, float]

UNCACHED_WEIGHT = 1.5
SESSION_SECONDS = 0.5
DECODE_SECONDS = 0.002
SLOW_SHARE = 0.15


class Request(NamedTuple):
    """What a policy may know of a request. `blocks` is the most that a match could be."""

    id: str
    tokens: int
    blocks: int
    block_size: int


class View(NamedTuple):
    """Candidates as columns: entry i of each is candidate i. A policy must not change them."""

    names: list[str]
    match: Column
    """Leading blocks of the request that the node holds or will hold, in any tier."""
    slow: Column | None
    """Of the match, blocks that lie in a slower tier than `gpu`; none when no candidate has any."""
    active: Column
    """Requests that run, those on their way included."""
    queue: Column
    """Seconds of prefill that are queued, of requests on their way included."""
    speed: Column
    """Prefill speed in tokens per second."""
    session: int
    """Candidate where the request's session belongs, -1 when there is none."""


def round_robin(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """Each node in turn, whatever it holds: by a hash of the request's id, so that replicas need no shared counter."""
    count = len(view.names)
    turn = derive_hash(request.id.encode()) % count
    costs: Column = np.roll(np.arange(count), turn)
    return costs


def least_loaded(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """The node on which the fewest requests run."""
    return view.active


def cascade(view: View, request: Request, parameters: Parameters) -> Column:  # noqa: ARG001
    """The classic order: the session's node, else the longest match, else the least loaded."""
    costs: Column = view.active / (view.active.max() + 1) - view.match
    if view.session >= 0:
        costs[view.session] -= request.blocks + 1
    return costs


def ttft(view: View, request: Request, parameters: Parameters) -> Column:
    """Least expected time to first token, in seconds.

    Queued prefill, plus the request's own uncached prefill, plus the slow-down by what decodes there. Parameters:
    `uncached_weight` (1.5): how much more a second of own prefill counts than a second of waiting, since computing
    somewhere what another node has, or is about to have, takes that time from other requests; `session_seconds` (0.5):
    how much sooner another node must be before a session moves; `decode_seconds` (0.002): how much each running request
    slows a prefill down; `slow_share` (0.15): time to load a token from a slower tier, as a share of the time to
    compute it.
    """
    uncached = request.tokens - view.match * request.block_size
    if view.slow is not None:
        uncached = uncached + view.slow * (request.block_size * parameters.get("slow_share", SLOW_SHARE))
    weight = parameters.get("uncached_weight", UNCACHED_WEIGHT)
    costs: Column = (
        uncached * weight / view.speed + view.queue + view.active * parameters.get("decode_seconds", DECODE_SECONDS)
    )
    if view.session >= 0:
        costs[view.session] -= parameters.get("session_seconds", SESSION_SECONDS)
    return costs


Score = Callable[[View, Request, Parameters], "Column | Sequence[float]"]
"""A policy: one cost a candidate; less is better."""

POLICIES: dict[str, Score] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "cascade": cascade,
    "ttft": ttft,
}


_allowed: set[str] = set()


def allow(modules: Iterable[str]) -> None:
    """Let policies be taken from these modules. What the log names is imported from nowhere else."""
    _allowed.update(modules)


def policy(name: str) -> Score:
    """A policy by its name, or by `module:attr` of a module that was allowed. Raises `BadRequest`."""
    known = POLICIES.get(name)
    if known is not None:
        return known
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BadRequest(f"policy {name!r} is not one of {', '.join(POLICIES)}, nor of the form module:attr")
    if module not in _allowed:
        raise BadRequest(
            f"module {module[:80]!r} may not be used; start routers and coordinators with --policy-module {module[:80]}"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - importing runs anybody's code
        raise BadRequest(f"policy {name!r} can't be imported: {error}") from None
    if not callable(found):
        raise BadRequest(f"policy {name!r} is not a function")
    result: Score = found
    return result
