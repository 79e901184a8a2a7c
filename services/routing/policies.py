"""Policies: what it would cost to send a request to each node. The node with the least cost is chosen.

A policy is a function `score(view, request, parameters) -> costs`: one number a candidate, in any unit, as long as less
is better. A `View` is columns, one entry a candidate, so that a policy is a list comprehension and stays fast at 1,000
nodes. Built-in policies are in `POLICIES`; `module:attr` names any other function of this form.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from events.hashing import derive_hash
from services.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from projections.load import NodeLoad


class Request(NamedTuple):
    """What a policy may know of a request. `blocks` is the most that a match could be."""

    id: str
    tokens: int
    blocks: int
    block_size: int


class View(NamedTuple):
    """Candidates as columns: entry i of each list is candidate i."""

    names: list[str]
    loads: list[NodeLoad]
    """The fold's load: requests that run (`active`), `speed` in tokens per second, `prefill_done` in unix ns."""
    match: list[int]
    """Leading blocks of the request that the node holds or will hold, in any tier."""
    slow: Mapping[int, int]
    """Of the match, blocks that lie in a slower tier than `gpu`, for those candidates that have any."""
    extra: Mapping[int, tuple[int, int]]
    """Requests and uncached tokens that this router sent and the fold does not count yet, where there are any."""
    session: int
    """Candidate where the request's session belongs, -1 when there is none."""
    now: int
    """Unix nanoseconds."""


Parameters = dict[str, float]
Score = "Callable[[View, Request, Parameters], list[float]]"

SESSION_SECONDS = 0.5
DECODE_SECONDS = 0.002
SLOW_SHARE = 0.15


def active(view: View) -> list[int]:
    """Requests that run on each candidate, those on their way included."""
    counts = [load.active for load in view.loads]
    for position, (requests, _) in view.extra.items():
        counts[position] += requests
    return counts


def round_robin(view: View, request: Request, parameters: Parameters) -> list[float]:  # noqa: ARG001
    """Each node in turn, whatever it holds: a hash of the request's id, so that replicas need no shared counter."""
    count = len(view.names)
    turn = derive_hash(request.id.encode()) % count
    return [float((position - turn) % count) for position in range(count)]


def least_loaded(view: View, request: Request, parameters: Parameters) -> list[float]:  # noqa: ARG001
    """The node on which the fewest requests run."""
    return [float(count) for count in active(view)]


def cascade(view: View, request: Request, parameters: Parameters) -> list[float]:  # noqa: ARG001
    """The classic order: the session's node, else the longest match, else the least loaded."""
    most = max(active(view), default=0) + 1
    costs = [count / most - match for count, match in zip(active(view), view.match, strict=True)]
    if view.session >= 0:
        costs[view.session] -= request.blocks + 1
    return costs


def ttft(view: View, request: Request, parameters: Parameters) -> list[float]:
    """Least expected time to first token, in seconds.

    Queued prefill, plus the request's own uncached prefill, plus the slow-down by what decodes there. Parameters:
    `session_seconds` (0.5): how much sooner another node must be before a session moves; `decode_seconds` (0.002): how
    much each running request slows a prefill down; `slow_share` (0.15): time to load a token from a slower tier, as a
    share of the time to compute it.
    """
    decode = parameters.get("decode_seconds", DECODE_SECONDS)
    now, tokens, size = view.now, request.tokens, request.block_size
    costs = [
        (tokens - match * size) / load.speed
        + load.active * decode
        + (wait * 1e-9 if (wait := load.prefill_done - now) > 0 else 0.0)
        for load, match in zip(view.loads, view.match, strict=True)
    ]
    if view.slow:
        share = parameters.get("slow_share", SLOW_SHARE)
        for position, blocks in view.slow.items():
            costs[position] += blocks * size * share / view.loads[position].speed
    for position, (requests, uncached) in view.extra.items():
        costs[position] += uncached / view.loads[position].speed + requests * decode
    if view.session >= 0:
        costs[view.session] -= parameters.get("session_seconds", SESSION_SECONDS)
    return costs


POLICIES: dict[str, Callable[[View, Request, Parameters], list[float]]] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "cascade": cascade,
    "ttft": ttft,
}


def policy(name: str) -> Callable[[View, Request, Parameters], list[float]]:
    """A policy by its name, or by `module:attr`. Raises `BadRequest`."""
    known = POLICIES.get(name)
    if known is not None:
        return known
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BadRequest(f"policy {name!r} is not one of {', '.join(POLICIES)}, nor of the form module:attr")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadRequest(f"policy {name!r} can't be imported: {error}") from None
    if not callable(found):
        raise BadRequest(f"policy {name!r} is not a function")
    result: Callable[[View, Request, Parameters], list[float]] = found
    return result
