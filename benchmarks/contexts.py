"""What it costs the fold to keep the contexts of conversations: the same commits in logs with them, and of the format before.

A turn is what a log has of one: the decision, the new blocks, the end. Conversations go on turn by turn on their node. Every
second one has no name, so that it is found by its blocks. Both folds are made in turn on one core.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.common import Row, Worker, obey, pin, row
from benchmarks.index import fleet
from benchmarks.workload import NODES
from kvplane.events import codec
from kvplane.events.types import BlocksStored, FormatRaised, RequestCompleted, RequestRouted
from kvplane.projections.contexts import CONTEXTS_FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvplane.events.types import Event

CONVERSATIONS = 512
GROWTH = 16
"""Blocks that a turn adds."""
BLOCK_SIZE = 16
_SECOND = 1_000_000_000


def turns(seed: int, count: int) -> Iterator[list[tuple[str, Event]]]:
    """So many turns of each conversation: topics and events."""
    draw = random.Random(seed)
    chains = [b""] * CONVERSATIONS
    batches = [0] * NODES
    for number in range(count * CONVERSATIONS):
        at = number % CONVERSATIONS
        before, added = chains[at], draw.randbytes(GROWTH * 8)
        chains[at] = chain = before + added
        place = at % NODES
        batches[place] += 1
        known, blocks, node, request = len(before) // 8, len(chain) // 8, f"n{place}", f"r{number}"
        parent = int.from_bytes(before[-8:], "little") if before else None
        yield [
            (
                "access.w",
                RequestRouted(
                    request=request, model="m", node=node, match=known, best=known, blocks=blocks, hashes=chain,
                    tokens=blocks * BLOCK_SIZE + 1, session=f"c{at}" if at % 2 else "",
                ),
            ),
            (f"cache.{node}", BlocksStored(node, place + 1, batches[place], added, parent)),
            (f"access.{node}", RequestCompleted(request=request, node=node, output_tokens=100)),
        ]  # fmt: skip


def fold(form: int, seed: int, count: int) -> float:
    """Commits a second of a fold of a log of this format."""
    state = fleet()
    state.apply(codec.Message(NODES + 1, "kv.bench.control", _SECOND, None, codec.encode([FormatRaised(form)])))
    messages: list[codec.Message] = []
    for turn in turns(seed, count):
        for topic, event in turn:
            sequence = NODES + 2 + len(messages)
            body = codec.encode([event])
            messages.append(codec.Message(sequence, f"kv.bench.{topic}", _SECOND + sequence * 1_000_000, None, body))
    begin = time.perf_counter()
    for message in messages:
        state.apply(message)
    seconds = time.perf_counter() - begin
    if state.skipped or state.ignored:
        raise RuntimeError(f"skipped {state.skipped}, ignored {state.ignored}")
    if len(state.load.contexts) != (CONVERSATIONS if form >= CONTEXTS_FORMAT else 0):
        raise RuntimeError(f"{len(state.load.contexts)} contexts of {CONVERSATIONS}")
    return len(messages) / seconds


def run(*, quick: bool) -> list[Row]:
    """The row of this benchmark."""
    rates: dict[int, list[float]] = {CONTEXTS_FORMAT - 1: [], CONTEXTS_FORMAT: []}
    with Worker("contexts") as worker:
        for turn in range(2 if quick else 7):
            for form, found in rates.items():
                found.append(worker.ask("fold", form=form, seed=turn, count=4 if quick else 16))
    without, kept = (statistics.median(found) / 1e3 for found in rates.values())
    note = f"decisions, blocks and ends of {CONVERSATIONS} conversations on {NODES} nodes"
    return [row("fold, contexts kept", kept, "k commits/s", beside="without", other=without, note=note)]


def main() -> None:
    pin()
    obey({"fold": fold}, {"ready": True})


if __name__ == "__main__":
    main()
