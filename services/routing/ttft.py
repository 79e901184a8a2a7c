"""kvplane's own policy: least expected time to first token, of this request and of those that come after it.

    cost = queue + weight * own + load_seconds * load + active_seconds * active + decode_seconds * decoding
           + (turns - 1) * crowd - session_seconds (where the session is)

`own` is the time that the node needs for the uncached part of the prompt, `queue` the time until it gets there; both go by
what the log says of nodes: what they have computed, and how fast (`projections.load`). The other terms are about others:

- A second of prefill here makes everybody wait who comes before the queues are empty again: about as many requests as
  arrive at a node while its queue drains. So `weight = uncached_weight + crowd_weight * queue * arrivals`, both averaged
  over nodes. An idle fleet spreads, a crowded one keeps to what is cached.
- `load` is the share of its time that a node was given prefill for of late. It tells apart nodes that are idle at the
  moment, it keeps requests from running together to where it just became empty, and since new blocks push out old ones,
  it is also how fast a full cache forgets.
- What is computed here pushes other contexts out, and so much of it as conversations will come back for is computed again:
  `weight` has, beside those, the share of a cache that would be live contexts (`projections.contexts`), times `crowd` and the
  chance that a conversation goes on; what comes back does the same in turn. And while this prompt is computed, those that
  live here come back and wait half of that time: `crowd_weight * arrivals * crowd * own / 2`. That is what keeps a long
  context where it is.
- `crowd` is how many live contexts the node has, as a multiple of the mean. A conversation meets its neighbours at each of
  its `turns`, so this is paid once for each that is to come. It places new ones where they have room to grow, moves one
  only if that is worth the context, and outweighs a beginning that many share.
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


TURN_SECONDS = 1.0
"""What a node with the mean of live contexts costs at each further turn of a conversation; see decision 31."""

GOES_ON = 0.9
"""The chance that a chain of evictions goes on where all that is pushed out comes back: some end."""

_FROM_THE_FIRST = np.zeros(1, np.intp)


def _mean(column: Column) -> float:
    """Mean of a column, the same on every machine, and by the shortest way through numpy for the few entries it has."""
    total: float = np.add.reduceat(column, _FROM_THE_FIRST).item()
    return total / len(column)


def _weight(view: View, queue: Column, parameters: dict[str, float]) -> float:
    """How much a second of own prefill counts: more, the more requests will wait behind it."""
    return parameters["uncached_weight"] + parameters["crowd_weight"] * (_mean(queue) * view.arrivals)


def _returning(view: View, request: Request, mean: float) -> float:
    """Seconds that are computed again for each that is computed now, on a node with the mean of live contexts.

    It is the chance that what is pushed out comes back, and what comes back pushes out others in turn.
    """
    chance = min(1.0, (mean + request.tokens) / view.mean_room) * (1 - 1 / view.turns)
    return chance / (1 - chance * GOES_ON)


def _neighbours(view: View, mean: float) -> float:
    """Seconds that a conversation will lose to the neighbours that it has on a node with the mean of live contexts.

    Where caches are too small for the contexts, most of those are gone before their conversations come back.
    """
    return TURN_SECONDS * (view.turns - 1) * min(1.0, view.mean_room / mean)


def ttft(view: View, request: Request, parameters: dict[str, float]) -> Column:
    """The least expected time to first token, of this request and of those that come after it."""
    queue, speed = view.queue, view.speed
    weight = _weight(view, queue, parameters)
    own: Column = view.match * -request.block_size
    own += request.tokens
    if view.slow is not None:
        own += view.slow * (request.block_size * parameters["slow_share"])
    own /= speed
    contexts = view.contexts
    mean = _mean(contexts)
    if mean > 0:
        # For each second of own and each token of a neighbour: those who wait, half of it, and those who are pushed out.
        costs: Column = own * (parameters["crowd_weight"] * view.arrivals / (2 * mean))
        costs += _returning(view, request, mean) / mean
        costs *= contexts
        costs += weight
        costs *= own
        costs += contexts * (_neighbours(view, mean) / mean)
    else:
        costs = own * weight
    load = view.recent_uncached
    load *= parameters["load_seconds"]
    load /= speed
    costs += load
    costs += queue
    costs += view.active * parameters["active_seconds"]
    costs += view.decoding * parameters["decode_seconds"]
    if view.session >= 0:
        costs[view.session] -= parameters["session_seconds"]
    return costs


def ttft_terms(view: View, request: Request, parameters: dict[str, float]) -> dict[str, Column]:
    """The parts of `ttft`'s costs, in seconds."""
    queue, speed, contexts = view.queue, view.speed, view.contexts
    weight = _weight(view, queue, parameters)
    slow = 0 if view.slow is None else view.slow * request.block_size * parameters["slow_share"]
    own: Column = (request.tokens - view.match * request.block_size + slow) / speed
    session, crowd = np.zeros(len(queue)), np.zeros(len(queue))
    if view.session >= 0:
        session[view.session] = -parameters["session_seconds"]
    mean = _mean(contexts)
    if mean > 0:
        crowd = contexts / mean
    return {
        "queue": queue,
        "own": own,
        "others": (weight - 1 + parameters["crowd_weight"] * view.arrivals * crowd * own / 2) * own,
        "evicted": _returning(view, request, mean) * crowd * own if mean > 0 else np.zeros(len(queue)),
        "load": view.recent_uncached * parameters["load_seconds"] / speed,
        "contexts": _neighbours(view, mean) * crowd if mean > 0 else crowd,
        "running": view.active * parameters["active_seconds"] + view.decoding * parameters["decode_seconds"],
        "session": session,
    }
