"""The prefix index: blocks stored per second, time of a match, memory of a membership; beside Dynamo's tree.

Both sides begin at their own wire format (MessagePack commits here, JSON events there), run in processes of their own on
one core, and are asked in turn. As a module of its own it is the worker of this side.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.common import Limit, Row, Worker, microseconds, obey, pin, resident_bytes, row
from benchmarks.workload import CHAIN, NODES, chains, holdings, pieces
from kvplane.events import codec
from kvplane.events.hashing import unpack_hashes
from kvplane.events.types import BlocksStored, NodeRegistered
from kvplane.projections.fleet import FleetState
from kvplane.projections.prefix import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STORES = (
    (64, 1 << 20, Limit(least=4, least_ratio=1)),
    (64, 1 << 18, Limit(least=4, least_ratio=1)),
    (16, 1 << 20, Limit(least_ratio=1.5)),
    (1, 1 << 18, Limit(least_ratio=4)),
)
"""Blocks of an event and of all events, with targets in millions of blocks a second and in multiples of the peer.

A large index is slower to grow: every new block is a cache miss or two. 2^20 blocks are 64 nodes with 16,384 each.
"""
MATCHES = {"same": (Limit(most=10), Limit(most_ratio=0.5)), "differ": (Limit(most=80), Limit(most_ratio=2.5))}
"""Kinds of holdings, with the targets in microseconds as the index answers, and for a dictionary beside the peer's."""
MEMORY = {
    "unique, 64-block events": ("unique", 64, Limit(most=100)),
    "unique, 1-block events": ("unique", 1, Limit(most=100)),
    "on 4 nodes, lengths differ": ("shared", 64, None),
    "unique, alone, no parents": ("orphans", 1, None),
}
COMMITS = (256, 4096)
"""Blocks of a commit; the first is what `store` decodes."""
MATCH_CHAINS = 64


def commits(size: int, count: int, blocks: int) -> Iterator[tuple[int, bytes]]:
    """Chains as commits of events of `size` blocks: node and body, the nodes in turn."""
    held: list[list[BlocksStored]] = [[] for _ in range(NODES)]
    for position, chain in enumerate(chains(size, count)):
        events = held[position % NODES]
        node = position % NODES
        for piece, parent in pieces(chain, size):
            events.append(BlocksStored(f"n{node}", node + 1, len(events) + 1, piece, parent))
    step = blocks // size
    for at in range(0, max(map(len, held)), step):
        for node, events in enumerate(held):
            if events[at : at + step]:
                yield node, codec.encode(events[at : at + step])


def fleet(count: int = NODES) -> FleetState:
    """A fold in which this many nodes are registered."""
    state = FleetState("bench")
    for node in range(count):
        event = NodeRegistered(
            node=f"n{node}", address="", models=["m"], block_size=16, capacity_blocks={"gpu": 1 << 20}
        )
        state.apply(codec.Message(node + 1, f"kv.bench.node.n{node}", 1, None, codec.encode([event])))
    return state


class Ours:
    """Answers the commands of this benchmark with kvplane's index."""

    def __init__(self) -> None:
        self._commits: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        self._messages: dict[tuple[int, int], list[codec.Message]] = {}
        self._matching = PrefixIndex()

    def prepare(self, size: int, count: int) -> bool:
        """Make the commits that `store` and `fold` will be timed with."""
        for blocks in COMMITS:
            bodies = self._commits[size, blocks] = list(commits(size, count, blocks))
            counters = [0] * NODES
            messages = self._messages[size, blocks] = []
            for number, (node, body) in enumerate(bodies):
                counters[node] += 1
                headers = {
                    "Nats-Msg-Id": f"w{node}.{counters[node]}.{number:032x}", "Nats-Expected-Stream": "KV_bench",
                    codec.CONTENT_TYPE: codec.MSGPACK, codec.WRITER: f"w{node}",
                    codec.WRITER_SEQ: str(counters[node]), codec.CRC32: codec.checksum(body),
                }  # fmt: skip
                messages.append(codec.Message(NODES + 1 + number, f"kv.bench.cache.n{node}", 1, headers, body))
        return True

    def store(self, size: int) -> float:
        """Decode and store everything in an empty index; seconds."""
        bodies = self._commits[size, COMMITS[0]]
        index = PrefixIndex()
        index.add_slot(NODES - 1)
        gc.collect()
        store, decode = index.store, codec.decode_body
        begin = time.perf_counter()
        for node, body in bodies:
            for event in decode("cache", body):
                store(node, event.hashes, event.parent)  # type: ignore[attr-defined]
        seconds = time.perf_counter() - begin
        self._check(size, index.block_copies)
        return seconds

    def naive(self, size: int) -> float:
        """Decode the same and store it in a dictionary from block to a mask of its holders; seconds."""
        bodies = self._commits[size, COMMITS[0]]
        masks: dict[int, int] = {}
        gc.collect()
        holders, decode = masks.get, codec.decode_body
        begin = time.perf_counter()
        for node, body in bodies:
            bit = 1 << node
            for event in decode("cache", body):
                for block in unpack_hashes(event.hashes):  # type: ignore[attr-defined]
                    masks[block] = holders(block, 0) | bit
        seconds = time.perf_counter() - begin
        self._check(size, sum(map(int.bit_count, masks.values())))
        return seconds

    def _check(self, size: int, memberships: int) -> None:
        """Raise `RuntimeError` unless as many memberships were stored as the commits have."""
        bodies = self._commits[size, COMMITS[0]]
        expected = sum(len(codec.decode_body("cache", body)) for _, body in bodies) * size
        if memberships != expected:
            raise RuntimeError(f"{memberships} memberships of {expected}")

    def fold(self, size: int, blocks: int) -> float:
        """Apply everything to a fleet: checksums, validation and writers' counters included; seconds."""
        messages = self._messages[size, blocks]
        state = fleet()
        gc.collect()
        apply = state.apply
        begin = time.perf_counter()
        for message in messages:
            apply(message)
        seconds = time.perf_counter() - begin
        if state.skipped:
            raise RuntimeError(f"skipped commits: {state.skipped}")
        return seconds

    def hold(self, kinds: Iterable[str], count: int, size: int) -> dict[str, list[list[tuple[int, int]]]]:
        """Store the chains that `match` will ask for; the first answers, as pairs of node and length."""
        index = self._matching = PrefixIndex()
        answers = {}
        for seed, kind in enumerate(kinds):
            for node, piece, parent in holdings(kind, seed, count, size):
                index.store(node, piece, parent)
        for seed, kind in enumerate(kinds):
            answers[kind] = [list(as_dict(index.match(chain)).items()) for chain in chains(seed, 3)]
        return answers

    def match(self, seed: int, count: int, repeat: int) -> dict[str, float]:
        """Median microseconds of a match: as the index answers, and as a dictionary from holder to length."""
        requests = chains(seed, count)
        match = self._matching.match
        many = [requests[turn % count] for turn in range(repeat)]
        native = microseconds(match, many)
        return {"native": native, "dict": microseconds(lambda request: as_dict(match(request)), many)}

    def memory(self, kind: str, size: int, most: int) -> list[float]:
        """Bytes of RAM a membership while an index grows to `most` memberships, measured often: it jumps at resizes."""
        index = PrefixIndex()
        index.add_slot(NODES - 1)
        gc.collect()
        before = resident_bytes()
        found: list[float] = []
        step, goal, number = most // 64, most // 8, 0
        while before is not None and index.block_copies < most:
            chain = os.urandom(CHAIN * 8)
            number += 1
            for turn in range(4 if kind == "shared" else 1):
                length = CHAIN - turn * 52
                for piece, parent in pieces(chain[: length * 8], size):
                    index.store((number + turn) % NODES, piece, None if kind == "orphans" else parent)
            if index.block_copies >= goal:
                found.append(((resident_bytes() or 0) - before) / index.block_copies)
                goal += step
        return found


def as_dict(lengths: list[int]) -> dict[int, int]:
    """A match in the form in which the peer gives it."""
    return {slot: length for slot, length in enumerate(lengths) if length}


def run(*, peer: str | None, quick: bool) -> list[Row]:
    """Rows of this benchmark. `peer` is an interpreter that has the peer; this one is tried otherwise."""
    rounds = 2 if quick else 3
    rows: list[Row] = []
    with Worker("index") as ours, Worker("peer", python=peer or sys.executable) as theirs:
        there = theirs.hello["ready"]
        name = theirs.hello["name"] if there else "peer"
        note = "" if there else "peer not installed"
        for size, blocks, limit in STORES:
            count = (blocks >> 2 if quick else blocks) // CHAIN
            rows += _stores(ours, theirs if there else None, size, count, limit, rounds, note)
        kinds = list(MATCHES)
        answers = ours.ask("hold", kinds=kinds, count=MATCH_CHAINS, size=64)
        if there and theirs.ask("hold", kinds=kinds, count=MATCH_CHAINS, size=64) != answers:
            raise RuntimeError(f"{name} finds other matches")
        for seed, (kind, (native, beside)) in enumerate(MATCHES.items()):
            turns: dict[str, list[float]] = {"native": [], "dict": [], "peer": []}
            arguments = {"seed": seed, "count": MATCH_CHAINS, "repeat": 2000}
            for _ in range(rounds):
                for form, value in ours.ask("match", **arguments).items():
                    turns[form].append(value)
                if there:
                    turns["peer"].append(theirs.ask("match", **arguments)["dict"])
            lengths = "one length" if kind == "same" else "64 lengths"
            title = f"match 256 blocks, 64 nodes, {lengths}"
            other = statistics.median(turns["peer"]) if there else None
            rows += [
                row(title, statistics.median(turns["native"]), "us", limit=native, note="a list by slot"),
                row(
                    title, statistics.median(turns["dict"]), "us", limit=beside, beside="peer", other=other,
                    note=note or "a dictionary, as the peer",
                ),
            ]  # fmt: skip
    for title, (kind, size, most) in MEMORY.items():
        with Worker("index") as worker:
            found = worker.ask("memory", kind=kind, size=size, most=1 << 19 if quick else 1 << 21)
        if found:
            spread = f"worst of {len(found)} sizes; median {statistics.median(found):.0f}, last {found[-1]:.0f}"
            rows.append(row(f"memory, {title}", max(found), "B/block", limit=most, note=spread))
    return rows


def _stores(
    ours: Worker, theirs: Worker | None, size: int, count: int, limit: Limit, rounds: int, note: str
) -> list[Row]:
    """Rows of one event size, in millions of blocks a second."""
    times: dict[str, list[float]] = {
        "ours": [],
        "peer": [],
        "naive": [],
        **{f"fold {blocks}": [] for blocks in COMMITS},
    }
    ours.ask("prepare", size=size, count=count)
    if theirs is not None:
        theirs.ask("prepare", size=size, count=count)
    for _ in range(rounds):
        times["ours"].append(ours.ask("store", size=size))
        if theirs is not None:
            times["peer"].append(theirs.ask("store", size=size))
        times["naive"].append(ours.ask("naive", size=size))
        for blocks in COMMITS:
            times[f"fold {blocks}"].append(ours.ask("fold", size=size, blocks=blocks))
    speed = {what: count * CHAIN / statistics.median(seconds) / 1e6 for what, seconds in times.items() if seconds}
    title = f"{size}-block events, {count * CHAIN >> 10}k blocks"
    return [
        row(
            f"decode and store, {title}", speed["ours"], "M/s", limit=limit, beside="peer", other=speed.get("peer"),
            note=note,
        ),
        row(
            f"the naive way, {title}", speed["naive"], "M/s", beside="index", other=speed["ours"],
            note="a dictionary from block to a mask of holders: what this machine can do",
        ),
        *(
            row(f"whole fold, {title}", speed[f"fold {blocks}"], "M/s", note=f"commits of {blocks} blocks")
            for blocks in COMMITS
        ),
    ]  # fmt: skip


def main() -> None:
    pin()
    ours = Ours()
    commands: dict[str, Any] = {
        name: getattr(ours, name) for name in ("prepare", "store", "naive", "fold", "hold", "match", "memory")
    }
    obey(commands, {"ready": True})


if __name__ == "__main__":
    main()
