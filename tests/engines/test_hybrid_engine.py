"""Engines with hybrid models of every layout: what is foretold is what they would find, whatever they stored and evicted.

The engine here is a model of vLLM's: it tells each group's blocks as that does, of sparse groups only some names for the tokens
of all, and finds hits as `tests.support.naive_hybrid` does.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from kvplane.events import codec
from kvplane.events.hashing import block_hashes, pack_hashes
from kvplane.events.subjects import Place
from kvplane.events.types import GroupRemoved, GroupStored
from kvplane.services.engines.dialect import decode
from kvplane.services.engines.sequence import Track
from kvplane.services.engines.translate import Translator
from kvplane.services.protocol.remembered import Remembered
from kvplane.services.roles.memory import Memory
from tests.support.naive_hybrid import NaiveGroup, longest_hit
from tests.support.one_node_fold import Folded

SIZE = 4
FULL = ("full_attention", None, SIZE)
LAYOUTS: dict[str, list[tuple[str, int | None, int]]] = {
    "Gemma 3": [*[("sliding_window", 9, SIZE)] * 2, FULL],
    "gpt-oss": [FULL, ("sliding_window", 8, SIZE)],
    "two windows": [("sliding_window", 5, SIZE), FULL, ("sliding_window", 14, SIZE)],
    "Mamba": [("mamba", None, SIZE), FULL, ("mamba", None, SIZE)],
    "larger states": [("mamba", None, 2 * SIZE), FULL],
    "DeepSeek V4": [("mla_attention", None, SIZE), ("sliding_window_mla", 9, 2 * SIZE), ("sliding_window", 6, SIZE)],
    "two of full attention": [FULL, ("mla_attention", None, 2 * SIZE), ("sliding_window", 9, SIZE)],
    "chunks that are told": [FULL, ("chunked_local_attention", 8, SIZE)],
}
KINDS = {
    "sliding_window": "sliding",
    "sliding_window_mla": "sliding",
    "mamba": "state",
    "chunked_local_attention": "chunked",
}


class HybridEngine:
    """An engine whose names are numbers of its own."""

    def __init__(self, layout: list[tuple[str, int | None, int]], seed: int) -> None:
        self.random = random.Random(seed)
        self.layout = layout
        self.names: dict[tuple[int, ...], int] = {}
        self.held: list[dict[int, None]] = [{} for _ in layout]
        self.events: list[dict[str, Any]] = []

    def name(self, tokens: list[int]) -> int:
        return self.names.setdefault(tuple(tokens), 10**9 + len(self.names))

    def ends(self, tokens: list[int], size: int = SIZE) -> list[int]:
        return [self.name(tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def hit(self, tokens: list[int]) -> int:
        groups = [
            NaiveGroup(KINDS.get(kind, "full"), window or 0, size, set(held))
            for (kind, window, size), held in zip(self.layout, self.held, strict=True)
        ]
        return longest_hit(groups, self.ends(tokens), SIZE, len(tokens) - 1)

    def request(self, tokens: list[int]) -> None:
        """Compute a prompt and keep what of it each group keeps; of sparse groups that is anything."""
        for number, ((kind, window, size), held) in enumerate(zip(self.layout, self.held, strict=True)):
            ends = self.ends(tokens, size)
            begin = 0
            while begin < len(ends):
                many = self.random.randint(1, len(ends) - begin)
                sparse = kind not in {"full_attention", "mla_attention"} and self.random.random() < 0.6
                kept = [name for name in ends[begin : begin + many] if not sparse or self.random.random() < 0.5]
                fresh = [name for name in kept if name not in held]
                held.update(dict.fromkeys(fresh))
                if len(fresh) == len(kept):
                    self.stored(number, kind, window, size, fresh, tokens, begin, many)
                else:
                    for name in fresh:
                        at = ends.index(name)
                        self.stored(number, kind, window, size, [name], tokens, at, 1)
                begin += many

    def stored(
        self, number: int, kind: str, window: int | None, size: int, names: list[int], tokens: list[int], begin: int, many: int
    ) -> None:  # fmt: skip
        event = {
            "type": "BlockStored", "block_hashes": names, "block_size": size, "medium": "GPU", "group_idx": number,
            "parent_block_hash": self.name(tokens[: begin * size]) if begin else None,
            "token_ids": tokens[begin * size : (begin + many) * size], "lora_id": None, "lora_name": None,
            "kv_cache_spec_kind": kind, "kv_cache_spec_sliding_window": window,
        }  # fmt: skip
        self.events.append(event)

    def evict(self, count: int) -> None:
        for _ in range(count):
            number = self.random.randrange(len(self.layout))
            if self.held[number]:
                name = self.random.choice(list(self.held[number]))
                del self.held[number][name]
                self.events.append(
                    {"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU", "group_idx": number}
                )

    def clear(self) -> None:
        for held in self.held:
            held.clear()
        self.events.append({"type": "AllBlocksCleared"})

    def batch(self) -> bytes:
        events, self.events = self.events, []
        return msgspec.msgpack.encode([0.0, events, 0])


class Attached:
    """An engine, its adapter's pure half, the log and its fold."""

    def __init__(self, engine: HybridEngine, *, in_force: int = 5) -> None:
        self.engine = engine
        self.folded = Folded(block_size=SIZE, in_force=in_force)
        self.in_force = in_force
        self.log: list[codec.Commit] = []
        self.number = 0
        self.start()

    def start(self, before: Remembered | None = None) -> None:
        self.track = Track(Translator("a", SIZE, {"gpu": 1000}))
        self.translator = self.track.translator
        self.translator.groups.tells = self.in_force >= 5
        if before is not None and before.position is not None:
            self.track.restore(before, before.position)
        self.folded.register()
        self.log.clear()
        self.translator.epoch = self.folded.state.nodes["a"].epoch
        self.put(self.translator.report(self.number))

    def put(self, events: Any) -> None:
        self.folded.put(events)
        if events:
            self.log.append(codec.Commit(Place("cache", "a"), events, "", 0, None))

    def hear(self) -> None:
        self.number += 1
        self.put(self.translator.apply(decode(self.engine.batch()), self.number))

    def remembered(self) -> Remembered:
        memory = Memory(self.translator.epoch)
        for commit in self.log:
            memory.apply(commit)
        tiers = {tier: (pack_hashes(names.values()), list(names)) for tier, names in memory.engine_hashes().items()}
        position = memory.position
        return Remembered(
            epoch=memory.epoch, block_size=SIZE, labels={}, position=position, tiers=tiers, groups=memory.groups()
        )

    def hit(self, tokens: list[int]) -> int:
        return self.folded.hit(block_hashes(tokens, SIZE), (len(tokens) - 1) // SIZE) * SIZE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_foretold_is_what_the_engine_finds(layout: str, seed: int) -> None:
    engine = HybridEngine(LAYOUTS[layout], seed)
    on, draw = Attached(engine), engine.random
    trunk = [draw.randrange(3) for _ in range(40)]
    hits, less, kept = 0, 0, trunk
    for step in range(60):
        prompt = [*trunk[: draw.randrange(0, 41)], *(draw.randrange(3) for _ in range(draw.randrange(1, 30)))]
        again = draw.random() < 0.3 and step > 0
        prompt = kept = kept if again else prompt
        found = engine.hit(prompt)
        assert on.hit(prompt) == found
        hits += found > 0
        less += found < on.folded.match(block_hashes(prompt, SIZE), (len(prompt) - 1) // SIZE) * SIZE
        engine.request(prompt)
        engine.evict(draw.choice([0, 0, 1, 5, 20]))
        if draw.random() < 0.03:
            engine.clear()
        on.hear()
        if draw.random() < 0.1:
            # A new adapter knows from the log what the one before knew.
            on.start(on.remembered())
    assert hits > 5
    assert less > 5
    assert not on.translator.counts["unnamed"]


def attached(layout: list[tuple[str, int | None, int]], *, in_force: int = 5) -> Attached:
    return Attached(HybridEngine(layout, 0), in_force=in_force)


PROMPT = [*range(24)]


def test_a_group_that_holds_nothing_serves_nothing() -> None:
    on = attached([FULL, ("sliding_window", 9, SIZE)])
    on.engine.stored(1, "sliding_window", 9, SIZE, [], PROMPT, 0, 6)
    on.engine.stored(0, "full_attention", None, SIZE, on.engine.ends(PROMPT), PROMPT, 0, 6)
    payload = on.engine.batch()
    events = on.translator.apply(decode(payload), 1)
    # Which groups there are comes first, so that nobody is promised more meanwhile.
    assert isinstance(events[0], GroupStored)
    assert not events[0].hashes
    on.put(events)
    assert (on.hit([*PROMPT, 1]), on.folded.match(block_hashes(PROMPT, SIZE), 6)) == (0, 6)


def test_a_name_that_says_nothing_is_left_out() -> None:
    on = attached([("sliding_window", 9, SIZE), FULL])
    ends = on.engine.ends(PROMPT)
    # Which of six blocks this is can't be known, nor what follows a block that was never told.
    on.engine.stored(0, "sliding_window", 9, SIZE, ends[-1:], PROMPT, 0, 6)
    on.engine.stored(0, "sliding_window", 9, SIZE, ends[3:5], PROMPT, 3, 2)
    on.hear()
    assert on.translator.counts["unnamed"] == 3
    assert on.folded.state.caches.groups.held(on.folded.state.nodes["a"], 0) == 0
    # With all of its tokens a block needs no name that is known.
    on.engine.stored(0, "sliding_window", 9, SIZE, ends[:2], PROMPT, 0, 2)
    on.engine.stored(0, "sliding_window", 9, SIZE, ends[2:3], PROMPT, 2, 1)
    on.hear()
    assert on.translator.counts["unnamed"] == 4
    assert on.folded.state.caches.groups.held(on.folded.state.nodes["a"], 0) == 2


def test_chunks_whose_size_is_not_told_are_needed_from_the_beginning() -> None:
    on = attached([FULL, ("chunked_local_attention", None, SIZE)])
    on.engine.request(PROMPT)
    on.engine.held[1] = dict.fromkeys(on.engine.ends(PROMPT))
    on.engine.stored(1, "chunked_local_attention", None, SIZE, on.engine.ends(PROMPT), PROMPT, 0, 6)
    on.hear()
    assert on.hit([*PROMPT, 1]) == 24
    first, *_ = on.engine.ends(PROMPT)
    on.engine.events.append({"type": "BlockRemoved", "block_hashes": [first], "medium": "GPU", "group_idx": 1})
    on.engine.events.append({"type": "BlockRemoved", "block_hashes": [first], "medium": "GPU", "group_idx": 1})
    on.hear()
    assert on.hit([*PROMPT, 1]) == 0


def test_blocks_that_are_no_whole_number_of_the_fleets_are_said() -> None:
    on = attached([FULL, ("sliding_window", 9, 6)])
    assert not on.translator.groups.trouble()
    on.engine.request(PROMPT)
    on.hear()
    assert on.hit([*PROMPT, 1]) == 0
    assert on.translator.counts["indivisible"] > 0
    assert "KV cache group 1 have 6 tokens" in on.translator.groups.trouble()


def test_in_an_older_log_nothing_is_told_of_groups_and_that_is_said() -> None:
    on = attached([FULL, ("sliding_window", 9, SIZE)], in_force=4)
    on.engine.request(PROMPT)
    on.hear()
    on.engine.evict(6)
    on.hear()
    assert not any(isinstance(event, GroupStored | GroupRemoved) for commit in on.log for event in commit.events)
    assert "kvplane format raise" in on.translator.groups.trouble()
    # As soon as it is taken, all of it is.
    on.in_force = on.translator.groups.tells = 5  # type: ignore[assignment]
    on.folded = Folded(block_size=SIZE, in_force=5)
    on.translator.epoch = on.folded.state.nodes["a"].epoch
    on.put(on.translator.report(on.number))
    assert on.hit([*PROMPT, 1]) == on.engine.hit([*PROMPT, 1])


def test_odd_groups_never_cost_what_else_is_told() -> None:
    on = attached([FULL, ("sliding_window", 9, SIZE)])
    for number, window, size in ((64, 9, SIZE), (-1, 9, SIZE), (2, 1 << 40, SIZE), (3, 9, SIZE << 40), (4, 9, 0)):
        on.engine.stored(number, "sliding_window", window, size, [], PROMPT, 0, 0)
    on.engine.stored(0, "full_attention", None, SIZE, on.engine.ends(PROMPT), PROMPT, 0, 6)
    on.hear()
    layouts = on.folded.state.nodes["a"].groups.layouts  # type: ignore[union-attr]
    assert layouts == {2: ("full", 0, 1), 3: ("full", 0, 1), 4: ("full", 0, 1)}
    assert on.folded.match(block_hashes(PROMPT, SIZE), 6) == 6


def test_copies_of_a_groups_blocks_are_counted() -> None:
    on = attached([FULL, ("mamba", None, SIZE)])
    ends = on.engine.ends(PROMPT)
    for _ in range(2):
        on.engine.stored(0, "full_attention", None, SIZE, ends, PROMPT, 0, 6)
        on.engine.stored(1, "mamba", None, SIZE, ends[-1:], PROMPT, 0, 6)
        on.hear()
    gone = {"type": "BlockRemoved", "block_hashes": ends[-1:], "medium": "GPU", "group_idx": 1}
    for expected in (24, 0):
        on.engine.events.append(gone)
        on.hear()
        assert on.hit([*PROMPT, 1]) == expected


def test_more_in_a_group_than_fits_is_a_gap() -> None:
    track = Track(Translator("a", SIZE, {"gpu": 5}))
    track.translator.groups.tells = True
    track.adrift = True
    engine = HybridEngine([FULL, ("mamba", None, SIZE)], 0)
    for number in range(1, 7):
        tokens = [number] * SIZE
        engine.stored(1, "mamba", None, SIZE, engine.ends(tokens), tokens, 0, 1)
        events = track.live(number, engine.batch())
    assert "6 blocks" in track.overfull
    assert track.translator.groups.most_copies() == 1
    assert events is not None
    assert [type(event).__name__ for event in events] == ["CacheCleared", "GroupStored", "GroupStored"]
