"""The other side of the index benchmark: NVIDIA Dynamo's `RadixTree`, in an interpreter that has `ai-dynamo-runtime`.

A worker (see `common`): it imports nothing of kvplane, and is fed with JSON bytes, its own wire format.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from benchmarks.workload import NODES, chains, holdings, numbers, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PACKAGE = "ai-dynamo-runtime"


class Peer:
    """Answers the commands of `benchmarks.index` with Dynamo's tree."""

    def __init__(self, tree: Callable[[], Any]) -> None:
        self._tree = tree
        self._ids = 0
        self._streams: dict[int, list[tuple[int, bytes]]] = {}
        self._chains = 0
        self._matching: Any = None

    def _event(self, piece: bytes, parent: int | None) -> bytes:
        self._ids += 1
        blocks = [{"block_hash": one, "tokens_hash": one, "mm_extra_info": None} for one in numbers(piece)]
        stored = {"parent_hash": parent, "blocks": blocks}
        return json.dumps({"event_id": self._ids, "data": {"stored": stored}, "dp_rank": 0}).encode()

    def prepare(self, size: int, count: int) -> bool:
        """Make the events that `store` will be timed with."""
        self._chains = count
        self._streams[size] = [
            (position % NODES, self._event(piece, parent))
            for position, chain in enumerate(chains(size, count))
            for piece, parent in pieces(chain, size)
        ]
        return True

    def store(self, size: int) -> float:
        """Store everything in an empty tree; seconds."""
        events = self._streams[size]
        probe = numbers(chains(size, self._chains)[-1])
        tree = self._tree()
        gc.collect()
        begin = time.perf_counter()
        for node, body in events:
            tree.apply_event(node, body)
        found = tree.find_matches(probe).scores
        seconds = time.perf_counter() - begin
        if found != {((self._chains - 1) % NODES, 0): len(probe)}:
            raise RuntimeError(f"stored chain matches {found}")
        return seconds

    def hold(self, kinds: Iterable[str], count: int, size: int) -> dict[str, list[list[list[int]]]]:
        """Store the chains that `match` will ask for; the first answers, as pairs of node and length."""
        self._matching = self._tree()
        for seed, kind in enumerate(kinds):
            for node, piece, parent in holdings(kind, seed, count, size):
                self._matching.apply_event(node, self._event(piece, parent))
        answers = {}
        for seed, kind in enumerate(kinds):
            found = [self._matching.find_matches(numbers(chain)).scores for chain in chains(seed, 3)]
            answers[kind] = [sorted([node, length] for (node, _), length in scores.items()) for scores in found]
        return answers

    def match(self, seed: int, count: int, repeat: int) -> dict[str, float]:
        """Median microseconds of a match, its answer as a dictionary from holder to length included."""
        requests = [numbers(chain) for chain in chains(seed, count)]
        find, clock, times = self._matching.find_matches, time.perf_counter_ns, []
        for turn in range(repeat):
            request = requests[turn % count]
            begin = clock()
            find(request).scores  # noqa: B018 - the property makes the dictionary
            times.append(clock() - begin)
        return {"dict": statistics.median(times) / 1e3}


def main() -> None:
    try:
        from dynamo.llm import RadixTree  # noqa: PLC0415 - whether it can be imported is the question
    except ImportError as error:
        print(json.dumps({"ready": False, "why": type(error).__name__}), flush=True)
        return
    if sys.platform == "linux":
        # Its tree runs in a thread of its own: unpinned the hop makes it 4 times slower.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    peer = Peer(RadixTree)
    try:
        known = version(PACKAGE)
    except PackageNotFoundError:
        known = "unknown version"
    print(json.dumps({"ready": True, "name": f"{PACKAGE} {known}"}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(peer, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
