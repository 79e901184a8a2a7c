"""Random changes of a prefix index, beside a dictionary of sets that says what must come of them."""

from __future__ import annotations

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvplane.events.hashing import pack_hashes, unpack_hashes
from kvplane.projections.prefix import PrefixIndex
from kvplane.projections.segment import CLOSED, KEY, SEGMENT_BLOCKS, mask_of

SLOTS = 4


CHAINS = [
    [*range(100, 112)],
    [*range(100, 105), *range(200, 206)],
    [*range(300, 312)],
    # Hashes that occur twice, and a chain that runs backwards through another: no honest engine says so.
    [1, 2, 1, 3, 2],
    [111, 110, 109, 305, 304],
    # Hashes that have their key in common with those of the first chain, and with one another.
    [100 + (1 << 60), 101, 102 + (1 << 61), 103 + (1 << 63), 100 + (1 << 62), 105],
]


LONG = [*range(1000, 1000 + 3 * SEGMENT_BLOCKS // 2)]


# It leaves the first one in the middle of a segment, and comes back to it.
FORKED = [*LONG[: SEGMENT_BLOCKS - 100], *range(5000, 5300), *LONG[-50:]]


ALL = [*CHAINS, LONG, FORKED]


pieces = st.builds(
    lambda chain, start, length: (chain, start % len(chain), length),
    st.sampled_from(CHAINS),
    st.integers(0, 11),
    st.integers(1, 12),
)


slots = st.integers(0, SLOTS - 1)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.index.add_slot(SLOTS - 1)
        self.held: list[set[int]] = [set() for _ in range(SLOTS)]

    @rule(slot=slots, piece=pieces, parent=st.sampled_from(["true", "none", "wrong"]))
    def store(self, slot: int, piece: tuple[list[int], int, int], parent: str) -> None:
        chain, start, length = piece
        run = chain[start : start + length]
        before = {"true": chain[start - 1] if start else None, "none": None, "wrong": 302}[parent]
        assert self.index.store(slot, pack_hashes(run), before) == len(set(run) - self.held[slot])
        self.held[slot] |= set(run)

    @rule(slot=slots, piece=pieces, seed=st.none() | st.integers(0, 5))
    def remove(self, slot: int, piece: tuple[list[int], int, int], seed: int | None) -> None:
        chain, start, length = piece
        run = chain[start : start + length][::-1]
        if seed is not None:
            random.Random(seed).shuffle(run)
        assert self.index.remove(slot, pack_hashes(run)) == len(set(run) & self.held[slot])
        self.held[slot] -= set(run)

    @rule(slot=slots, chain=st.sampled_from([LONG, FORKED]), start=st.integers(0, 767), length=st.integers(1, 768))
    def store_long(self, slot: int, chain: list[int], start: int, length: int) -> None:
        run = chain[start : start + length]
        if run:
            before = chain[start - 1] if start else None
            assert self.index.store(slot, pack_hashes(run), before) == len(set(run) - self.held[slot])
            self.held[slot] |= set(run)

    @rule(
        slot=slots, chain=st.sampled_from([LONG, FORKED]), start=st.integers(0, 767), step=st.sampled_from([1, 3, 90])
    )
    def remove_long(self, slot: int, chain: list[int], start: int, step: int) -> None:
        run = chain[start::step][:200]
        assert self.index.remove(slot, pack_hashes(run)) == len(set(run) & self.held[slot])
        self.held[slot] -= set(run)

    @rule(left=st.sampled_from(ALL), right=st.sampled_from(ALL), cut=st.integers(0, 12), start=st.integers(0, 12),
          limit=st.none() | st.integers(0, 30))  # fmt: skip
    def match_a_mixture(self, left: list[int], right: list[int], cut: int, start: int, limit: int | None) -> None:
        """A request that goes from the middle of one run into the middle of another."""
        chain = left[cut:][:cut] + right[start:]
        packed, bounded = pack_hashes(chain), chain[:limit]
        assert self.index.match(packed, limit) == [
            next((at for at, block in enumerate(bounded) if block not in held), len(bounded)) for held in self.held
        ]

    @rule(slot=slots)
    def clear(self, slot: int) -> None:
        assert self.index.clear(slot) == len(self.held[slot])
        self.held[slot] = set()

    @invariant()
    def holds_the_same(self) -> None:
        for slot, held in enumerate(self.held):
            assert set(self.index.held(slot)) == held
            assert self.index.count(slot) == len(held)
            for block in (1, 3, 100, 104, 202, 111, 305, 1000, 1411, 1412, 1511, 1512, 5000, 9999):
                assert self.index.holds(slot, block) == (block in held)
        assert len(self.index) == len(set().union(*self.held))
        assert self.index.block_copies == sum(map(len, self.held))

    @invariant()
    def matches_the_same(self) -> None:
        for chain in ALL:
            packed = pack_hashes(chain)
            for limit in (None, 3):
                bounded = chain[:limit]
                expected = [
                    next((at for at, block in enumerate(bounded) if block not in held), len(bounded))
                    for held in self.held
                ]
                assert self.index.match(packed, limit) == expected
            if chain is LONG:
                continue
            assert [self.index.extent(slot, packed, 1, len(chain[:40])) for slot in range(SLOTS)] == [
                next((at for at, block in enumerate(chain[1:40]) if block not in held), len(chain[:40]) - 1)
                for held in self.held
            ]

    @invariant()
    def every_position_has_a_holder(self) -> None:
        found = [*self.index._where.items(), *self.index._twins.items()]
        places: dict[int, set[int]] = {}
        for key, segment in found:
            places.setdefault(id(segment), set()).add(key)
        for segment in {id(s): s for _, s in found}.values():
            blocks = unpack_hashes(segment.packed)
            assert len(set(blocks)) == len(blocks)
            assert places[id(segment)] <= {*blocks, *(block & KEY for block in blocks)}
            assert segment.end == (blocks[-1] & KEY if segment.some is None else CLOSED)
            full = (1 << len(blocks)) - 1
            assert segment.some != {}
            for what in (segment.some or {}).values():
                mask = mask_of(what)
                assert 0 < mask < full
                assert (what < 0) == bool(mask & (mask + 1))
            covered = full if segment.full else 0
            for slot in range(SLOTS):
                covered |= segment.get(slot)
            assert covered == full
        assert sum(len(s.packed) // 8 for s in {id(s): s for _, s in found}.values()) == len(self.index)
