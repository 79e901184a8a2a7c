"""One routing decision in process, with the default policy: 64 nodes and 1,000, requests of 256 blocks.

The nodes hold what a fleet holds after a while: each chain (think of a system prompt or a conversation) lies on some of
the nodes, as far as it had come when they saw it; requests are those chains, some cut short, some going on in new blocks.
Each node has eight conversations that go on.
"""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING

from benchmarks.common import Limit, Row, Worker, microseconds, obey, pin, row
from benchmarks.index import fleet
from benchmarks.workload import CHAIN, chains
from kvplane.events import codec
from kvplane.events.types import BlocksStored, FormatRaised, RequestRouted
from kvplane.events.versions import FORMAT
from kvplane.services.routing.decide import Chooser
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.query import Query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvplane.projections.fleet import FleetState

SIZES = (64, 1000)
BLOCK_SIZE = 16
CHAINS = 128
IN_FLIGHT = 64
"""Decisions that a busy router has not yet seen on the log."""
DECISION = Limit(most=60)
GROWTH = Limit(most_ratio=5)
_SECOND = 1_000_000_000


def requests(seed: int, count: int) -> list[bytes]:
    """Packed hashes of requests of 256 blocks over the chains of `filled`."""
    draw = random.Random(seed)
    known = chains(7, CHAINS)
    made = []
    for _ in range(count):
        chain = draw.choice(known)
        kept = CHAIN if draw.random() < 0.5 else draw.randrange(CHAIN)
        made.append(chain[: kept * 8] + draw.randbytes((CHAIN - kept) * 8))
    return made


def holdings(nodes: int) -> Iterator[tuple[int, bytes]]:
    """What each node holds: node and a run of blocks, in the order in which they were stored.

    Half of the nodes have met a chain; half of those all of it, the others some first part.
    """
    draw = random.Random(11)
    for chain in chains(7, CHAINS):
        for node in draw.sample(range(nodes), nodes // 2):
            length = CHAIN if draw.random() < 0.5 else 16 * draw.randrange(1, CHAIN // 16)
            yield node, chain[: length * 8]


def filled(nodes: int) -> FleetState:
    """A fold with nodes that hold blocks and run requests."""
    state = fleet(nodes)
    raised = codec.encode([FormatRaised(FORMAT)])
    state.apply(codec.Message(nodes + 1, "kv.bench.control", _SECOND, None, raised))
    for sequence, (node, packed) in enumerate(holdings(nodes), nodes + 2):
        event = BlocksStored(f"n{node}", node + 1, sequence, packed)
        state.apply(codec.Message(sequence, f"kv.bench.cache.n{node}", _SECOND, None, codec.encode([event])))
    draw = random.Random(13)
    for number in range(8 * nodes):
        routed = RequestRouted(
            request=f"old{number}", model="m", node=f"n{draw.randrange(nodes)}", match=draw.randrange(CHAIN),
            blocks=CHAIN, tokens=CHAIN * BLOCK_SIZE + 1, session=f"session {number}",
        )  # fmt: skip
        state.apply(codec.Message(state.sequence + 1, "kv.bench.access.w", _SECOND, None, codec.encode([routed])))
    if state.skipped or state.ignored:
        raise RuntimeError(f"skipped {state.skipped}, ignored {state.ignored}")
    return state


class Decisions:
    """Makes decisions on two fleets, each without and with decisions in flight."""

    def __init__(self) -> None:
        self._fleets = {}
        for nodes in SIZES:
            state = filled(nodes)
            busy = Overlay()
            for number, packed in enumerate(requests(17, IN_FLIGHT)):
                node = f"n{number * 37 % nodes}"
                event = RequestRouted(
                    request=f"new{number}", model="m", node=node, match=0, blocks=CHAIN,
                    tokens=CHAIN * BLOCK_SIZE + 1, hashes=packed,
                )  # fmt: skip
                busy.decided(event, state.load.ordinal[node], BLOCK_SIZE, 2 * _SECOND, predict="m")
            for in_flight, overlay in ((False, Overlay()), (True, busy)):
                self._fleets[nodes, in_flight] = Chooser(state, overlay)

    def decide(self, nodes: int, seed: int, count: int, *, in_flight: bool) -> float:
        """Median microseconds of a decision."""
        chooser = self._fleets[nodes, in_flight]
        queries = [
            Query(f"r{seed}.{number}", "m", packed, CHAIN * BLOCK_SIZE + 1, CHAIN, BLOCK_SIZE)
            for number, packed in enumerate(requests(seed, count))
        ]
        for query in queries[:20]:
            chooser.decide(query, 2 * _SECOND)
        taken = microseconds(lambda query: chooser.decide(query, 2 * _SECOND), queries)
        if chooser.policy_failures:
            raise RuntimeError("the policy failed")
        return taken


def run(*, quick: bool) -> list[Row]:
    """Rows of this benchmark; the fleets are asked in turn."""
    times: dict[tuple[int, bool], list[float]] = {}
    with Worker("decision") as worker:
        for turn in range(2 if quick else 7):
            for in_flight in (False, True):
                for nodes in SIZES:
                    taken = worker.ask("decide", nodes=nodes, seed=100 + turn, count=500, in_flight=in_flight)
                    times.setdefault((nodes, in_flight), []).append(taken)
    rows = []
    few, many = SIZES
    for in_flight in (False, True):
        note = f"with {IN_FLIGHT} decisions in flight" if in_flight else ""
        base, grown = (statistics.median(times[nodes, in_flight]) for nodes in SIZES)
        rows += [
            row(f"decision, {few} nodes", base, "us", limit=DECISION, note=note),
            row(
                f"decision, {many:,} nodes", grown, "us", limit=GROWTH, beside=f"{few} nodes", other=base, note=note
            ),
        ]  # fmt: skip
    return rows


def main() -> None:
    pin()
    obey({"decide": Decisions().decide}, {"ready": True})


if __name__ == "__main__":
    main()
