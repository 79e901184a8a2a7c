"""Requests of the demonstration: conversations of several turns that share a few system prompts."""

from __future__ import annotations

import random

from kvplane.events.hashing import block_hashes, longest_match, unpack_hashes
from kvplane.services.simulation.blockcache import BlockCache
from kvplane.services.simulation.trace import Work


def conversations(
    *, sessions: int = 96, turns: int = 6, prompts: int = 6, block_size: int = 16, seed: int = 7
) -> list[Work]:
    """Turns of all sessions, shuffled so that each session's turns stay in order.

    Each session opens with one of `prompts` system prompts of 1,024 tokens; each turn adds a question of 40 to 200
    tokens, and the answer to the one before.
    """
    rng = random.Random(seed)  # noqa: S311 - a repeatable workload, no secret

    def text(length: int) -> list[int]:
        return [rng.randrange(32_000) for _ in range(length)]

    systems = [text(1024) for _ in range(prompts)]
    histories = {f"session-{number}": list(rng.choice(systems)) for number in range(sessions)}
    order = [session for session in histories for _ in range(turns)]
    rng.shuffle(order)
    work = []
    for session in order:
        history = histories[session]
        history += text(rng.randrange(40, 200))
        output = rng.randrange(16, 96)
        work.append(Work(block_hashes(history, block_size), len(history), output, session))
        history += text(output)
    return work


def round_robin_hit_rate(work: list[Work], *, nodes: int, capacity_blocks: int, block_size: int) -> float:
    """Share of the prompt tokens that would be found cached if the nodes took the same requests in turn.

    Each request finds its node idle, which favours round-robin: no two requests compute one prefix side by side.
    """
    caches = [BlockCache(capacity_blocks) for _ in range(nodes)]
    hit = total = 0
    for number, request in enumerate(work):
        hashes = unpack_hashes(request.hashes)
        cache = caches[number % nodes]
        usable = longest_match(request.tokens, block_size)
        cached = cache.leading(hashes)
        if len(hashes) <= capacity_blocks and cache.start(hashes) is not None:
            cache.finish(hashes)
        hit += min(cached, usable) * block_size
        total += request.tokens
    return hit / total if total else 0.0
