"""The classic features, each as a step that shows itself on the log and is checked.

A step takes the stage and gives the sentence that is printed. It raises `StepFailed` when something does not hold.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio

from kvplane.events import types
from kvplane.events.hashing import block_hashes, format_hash, pack_hashes, unpack_hashes
from kvplane.services.demo.stage import SETTLE_SECONDS, brief, check
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused
from kvplane.services.simulation.trace import Work

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvplane.services.demo.stage import Stage

_rng = random.Random(11)  # noqa: S311 - repeatable prompts, no secrets


def _prompt(stage: Stage, blocks: int, *, base: Work | None = None, session: str = "") -> Work:
    """A prompt of new tokens, behind the blocks of `base`, with a partial last block."""
    size = stage.block_size
    tokens = [_rng.randrange(32_000) for _ in range(blocks * size + 1)]
    if base is None:
        return Work(block_hashes(tokens, size), len(tokens), 16, session)
    parent = unpack_hashes(base.hashes)[-1]
    hashes = base.hashes + block_hashes(tokens, size, parent=parent)
    return Work(hashes, len(hashes) // 8 * size + 1, 16, session)


async def exact_hit(stage: Stage) -> str:
    """The same prompt again finds all its blocks."""
    work = _prompt(stage, 32)
    first, _ = await stage.traffic.send(work)
    await stage.settled(first.request)
    again, served = await stage.traffic.send(work)
    check(first.kind == "miss", f"a new prompt was {first.kind}")
    check(again.kind == "exact" and again.node == first.node, f"the same prompt again was {again.kind} on {again.node}")
    check(served.cached_tokens == again.matched_tokens, f"{served.cached_tokens} tokens were cached, not as predicted")
    return f"{again.matched_blocks} of {again.blocks} blocks on {again.node}, and the node found them"


async def longest_prefix(stage: Stage) -> str:
    """A prompt that shares a beginning goes where the longest part of it lies."""
    base = _prompt(stage, 24)
    first, _ = await stage.traffic.send(base)
    await stage.settled(first.request)
    longer = _prompt(stage, 8, base=base)
    answer, served = await stage.traffic.send(longer)
    check(
        answer.kind == "prefix" and answer.node == first.node, f"the longer prompt was {answer.kind} on {answer.node}"
    )
    check(answer.matched_blocks == len(base.hashes) // 8, f"{answer.matched_blocks} blocks matched")
    check(served.cached_tokens == answer.matched_tokens, f"{served.cached_tokens} tokens were cached, not as predicted")
    return f"{answer.matched_blocks} of {answer.blocks} blocks on {answer.node}"


async def reported_fill(stage: Stage) -> str:
    """After a miss on a reported node its blocks are predicted at once, and confirmed by the node."""
    work = _prompt(stage, 40)
    managed = [name for name, node in stage.state.nodes.items() if node.managed]
    first = await stage.traffic.route(work, exclude=managed)
    # The router that decided predicts at once, the other one when it reads the decision from the log.
    await stage.seen(types.RequestRouted, lambda e: e.request == first.request)
    await anyio.sleep(SETTLE_SECONDS)
    second = await stage.traffic.route(work, exclude=managed)
    check(first.kind == "miss", f"a new prompt was {first.kind}")
    check(second.kind == "exact" and second.node == first.node, "a second request did not follow the first to its node")
    held = stage.state.caches.index(stage.traffic.model)
    slot = stage.state.nodes[first.node].slots["gpu"]
    block = unpack_hashes(work.hashes)[0]
    check(not held.holds(slot, block), "the node reported before it ran the request")
    after = stage.state.sequence
    await stage.traffic.serve(first, work)
    await stage.traffic.serve(second, work)
    at, event = await stage.seen(types.BlocksStored, lambda e: e.node == first.node, after=after)
    return f"predicted {second.matched_blocks} blocks before, confirmed at {at}: {brief(event)}"


async def managed_fill(stage: Stage) -> str:
    """After a miss on a managed node the coordinator places the blocks, and the next request hits."""
    reported = [name for name, node in stage.state.nodes.items() if not node.managed]
    work = _prompt(stage, 16)
    after = stage.state.sequence
    first = await stage.traffic.route(work, exclude=reported)
    await stage.traffic.serve(first, work)
    at, event = await stage.seen(types.BlocksPlaced, lambda e: e.request == first.request, after=after)
    await anyio.sleep(SETTLE_SECONDS)
    second = await stage.traffic.route(work, exclude=reported)
    check(first.kind == "miss", f"a new prompt was {first.kind}")
    check(second.kind == "exact", f"the next request was {second.kind}")
    served = await stage.traffic.serve(second, work)
    check(served.cached_tokens == second.matched_tokens, f"{served.cached_tokens} tokens were cached, not as predicted")
    return f"placed at {at}: {brief(event)}; the next request was exact"


async def session_affinity(stage: Stage) -> str:
    """A session stays on its node, and moves when that is cordoned; the move is an event."""
    session = "demo conversation"
    first, _ = await stage.traffic.send(_prompt(stage, 4, session=session))
    await stage.settled(first.request)
    second, _ = await stage.traffic.send(_prompt(stage, 4, session=session))
    check(first.session == "new", f"the session was {first.session} at first")
    check(second.session == "kept" and second.node == first.node, f"the session was {second.session} on {second.node}")
    after = stage.state.sequence
    await stage.command("node.cordon", messages.NodeRequest(node=first.node, reason="demonstration"))
    third = first
    with anyio.move_on_after(5):
        while third.session != "moved":
            # Each router learns of the cordon from the log, a moment later.
            third, _ = await stage.traffic.send(_prompt(stage, 4, session=session))
    await stage.command("node.uncordon", messages.NodeRequest(node=first.node))
    check(third.session == "moved" and third.node != first.node, f"after the cordon the session was {third.session}")
    at, event = await stage.seen(types.SessionAssigned, lambda e: e.node == third.node, after=after)
    return f"kept on {first.node}, then moved at {at}: {brief(event)}"


async def capacity_tracking(stage: Stage) -> str:
    """What each managed node holds is known to the block, at every sequence."""
    await stage.register("place-1", "placement", capacity=8)
    await stage.register("place-2", "placement", capacity=8)
    admit = messages.AdmitRequest(model="placement", hashes=pack_hashes([1, 2, 3]), node="place-1")
    await stage.command("cache.admit", admit)
    listing = await stage.command("node.list", messages.ListRequest(model="placement"))
    held = {row["node"]: row["held_blocks"]["gpu"] for row in listing["nodes"]}
    check(held == {"place-1": 3, "place-2": 0}, f"the nodes hold {held}")
    return "place-1 holds 3 of 8 blocks, place-2 none"


async def least_loaded_placement(stage: Stage) -> str:
    """Without a node named, blocks go to the least-loaded node that has room."""
    answer = await stage.command("cache.admit", messages.AdmitRequest(model="placement", hashes=pack_hashes([11, 12])))
    check(answer["node"] == "place-2", f"the blocks went to {answer['node']}")
    return "2 blocks went to place-2, which held none"


async def best_fit_placement(stage: Stage) -> str:
    """The alternative: the node on which the least room is left over."""
    request = messages.AdmitRequest(model="placement", hashes=pack_hashes([21, 22, 23, 24]), strategy="best_fit")
    answer = await stage.command("cache.admit", request)
    check(answer["node"] == "place-1", f"the blocks went to {answer['node']}")
    return "4 blocks went to place-1, with 5 free, rather than to place-2, with 6"


async def lru_eviction(stage: Stage) -> str:
    """A full node evicts what was used least recently."""
    await stage.command("cache.touch", messages.BlocksRequest(node="place-1", hashes=pack_hashes([1, 2, 3])))
    request = messages.AdmitRequest(model="placement", hashes=pack_hashes([31, 32, 33]), node="place-1")
    answer = await stage.command("cache.admit", request)
    evicted = unpack_hashes(answer["evicted"])
    check(evicted == (24, 23), f"{', '.join(map(format_hash, evicted))} were evicted")
    return "of the chain that was used least recently the two deepest blocks left, in the same event as the fill"


async def protected_blocks(stage: Stage) -> str:
    """Blocks of running requests are not evicted; when nothing else is left, the rejection says so."""
    work = Work(pack_hashes([1, 2, 3]), 3 * stage.block_size + 1, 1)
    request = messages.RouteRequest(
        model="placement", hashes=work.hashes, tokens_count=work.tokens, exclude=["place-2"]
    )
    name = stage.fleet.name
    routed = await stage.ask(f"kv.{name}.route", request, messages.RouteAnswer)
    await stage.seen(types.RequestRouted, lambda e: e.request == routed.request)
    # The coordinator may need a moment to see the decision on the log.
    await anyio.sleep(SETTLE_SECONDS)
    big = messages.AdmitRequest(model="placement", hashes=pack_hashes(range(41, 47)), node="place-1")
    error = await stage.refused("cache.admit", big)
    check(error.code == "no_room", f"the refusal was {error.code}: {error}")
    await stage.ask(f"kv.{name}.complete", messages.CompleteRequest(request=routed.request, node="place-1"))
    await stage.settled(routed.request)
    await stage.command("cache.admit", big)
    return f"refused while the request ran ({error}), placed when it was done"


async def admission_control(stage: Stage) -> str:
    """A node takes no more requests than it may; then the answer is `overloaded`."""
    await stage.register("small-1", "small", mode="reported", most=1)
    name = stage.fleet.name
    await anyio.sleep(SETTLE_SECONDS)
    request = messages.RouteRequest(model="small", hashes=pack_hashes([1]))
    first = await stage.ask(f"kv.{name}.route", request, messages.RouteAnswer)
    await stage.seen(types.RequestRouted, lambda e: e.request == first.request)
    try:
        # The other router may need a moment to see the first decision on the log.
        await anyio.sleep(SETTLE_SECONDS)
        await stage.ask(f"kv.{name}.route", request, messages.RouteAnswer)
    except Refused as error:
        check(error.code == "overloaded", f"the refusal was {error.code}")
        await stage.ask(f"kv.{name}.complete", messages.CompleteRequest(request=first.request, node="small-1"))
        return f"the second of two requests was refused: {error}"
    check(holds=False, otherwise="a node with max_active 1 took a second request")
    return ""


FEATURES: list[tuple[str, Callable[[Stage], Awaitable[str]]]] = [
    ("exact hit", exact_hit),
    ("longest prefix", longest_prefix),
    ("fill after a miss, reported", reported_fill),
    ("fill after a miss, managed", managed_fill),
    ("session affinity", session_affinity),
    ("capacity tracking", capacity_tracking),
    ("least-loaded placement", least_loaded_placement),
    ("best-fit placement", best_fit_placement),
    ("LRU eviction", lru_eviction),
    ("protected blocks", protected_blocks),
    ("admission control", admission_control),
]
