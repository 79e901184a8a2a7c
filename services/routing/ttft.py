"""kvplane's own policy: least expected time to first token, of this request and of those that come after it.

    cost = queue + weight * own + load_seconds * load + active_seconds * active + decode_seconds * decoding
           - session_seconds (where the session is)

`own` is the time that the node needs for the uncached part of the prompt, `queue` the time until it gets there; both go by
what the log says of nodes: what they have computed, and how fast (`projections.load`). The other terms are about others:

- A second of prefill here makes everybody wait who comes before the queues are empty again: about as many requests as
  arrive at a node while its queue drains. So `weight = uncached_weight + crowd_weight * queue * arrivals`, both averaged
  over nodes. An idle fleet spreads, a crowded one keeps to what is cached.
- `load` is the share of its time that a node was given prefill for of late. It tells apart nodes that are idle at the
  moment, it keeps requests from running together to where it just became empty, and since new blocks push out old ones,
  it is also how fast a full cache forgets.
- Requests that decode slow a prefill down and hold blocks. Most of them belong to conversations that go on here, so this is
  also what spreads new ones. Those whose prompts wait are in the queue already, but will decode soon.

All terms are seconds, so each parameter can be set without knowing the others. Defaults were chosen on generated
workloads and a conversation trace, at light load, at the knee and beyond it; see docs/policies.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvplane.services.routing.parameters import Parameter

if TYPE_CHECKING:
    from kvplane.services.routing.roster import Column
    from kvplane.services.routing.view import Request, View

TTFT = {
    "uncached_weight": Parameter(1.25, "s/s", "how much a second of own prefill counts when nobody waits"),
    "crowd_weight": Parameter(2.0, "s/s", "how much more it counts for each request that arrives while queues drain"),
    "load_seconds": Parameter(3.0, "s", "how much a node counts that was given prefill for all of its time of late"),
    "active_seconds": Parameter(0.005, "s", "how much each running request counts"),
    "decode_seconds": Parameter(0.02, "s", "how much more it counts when it decodes"),
    "session_seconds": Parameter(0.1, "s", "how much sooner another node must be before a session moves"),
    "slow_share": Parameter(
        0.15, "share", "time to load a token from a slower tier, of the time to compute it", most=1
    ),
}


_FROM_THE_FIRST = np.zeros(1, np.intp)


def _mean(column: Column) -> float:
    """Mean of a column, the same on every machine, and by the shortest way through numpy for the few entries it has."""
    total: float = np.add.reduceat(column, _FROM_THE_FIRST).item()
    return total / len(column)


def _weight(view: View, queue: Column, parameters: dict[str, float]) -> float:
    """How much a second of own prefill counts: more, the more requests will wait behind it."""
    return parameters["uncached_weight"] + parameters["crowd_weight"] * (_mean(queue) * view.arrivals)


def ttft(view: View, request: Request, parameters: dict[str, float]) -> Column:
    """The least expected time to first token, of this request and of those that come after it."""
    queue, speed = view.queue, view.speed
    weight = _weight(view, queue, parameters)
    costs: Column = view.match * (-request.block_size * weight)
    costs += request.tokens * weight
    if view.slow is not None:
        costs += view.slow * (request.block_size * parameters["slow_share"] * weight)
    load = view.recent_uncached
    load *= parameters["load_seconds"]
    costs += load
    costs /= speed
    costs += queue
    costs += view.active * parameters["active_seconds"]
    costs += view.decoding * parameters["decode_seconds"]
    if view.session >= 0:
        costs[view.session] -= parameters["session_seconds"]
    return costs


def ttft_terms(view: View, request: Request, parameters: dict[str, float]) -> dict[str, Column]:
    """The parts of `ttft`'s costs, in seconds."""
    queue, speed = view.queue, view.speed
    weight = _weight(view, queue, parameters)
    slow = 0 if view.slow is None else view.slow * request.block_size * parameters["slow_share"]
    session = np.zeros(len(queue))
    if view.session >= 0:
        session[view.session] = -parameters["session_seconds"]
    return {
        "queue": queue,
        "own": (request.tokens - view.match * request.block_size + slow) / speed,
        "others": (weight - 1) * (request.tokens - view.match * request.block_size + slow) / speed,
        "load": view.recent_uncached * parameters["load_seconds"] / speed,
        "running": view.active * parameters["active_seconds"] + view.decoding * parameters["decode_seconds"],
        "session": session,
    }
