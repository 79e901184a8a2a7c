"""A run of consecutive block hashes and who holds it: the building stone of the prefix index."""

from __future__ import annotations

import struct

from msgspec import Struct

HASH_BYTES = 8
# Longer runs are cut: positions are bits of one int, and appending to a run copies it.
SEGMENT_BLOCKS = 512
SEGMENT_BYTES = SEGMENT_BLOCKS * HASH_BYTES

UNPACK = [struct.Struct(f"<{n}Q").unpack for n in range(SEGMENT_BLOCKS + 1)]
# Looked up each time, the method of the class takes longer than its call.
from_bytes = int.from_bytes
# Keys are 60 bits of a hash: a Python int of up to 60 bits takes 32 bytes, a larger one 48.
KEY = (1 << 60) - 1
_KEYS = [int.from_bytes(KEY.to_bytes(8, "little") * n, "little") for n in range(SEGMENT_BLOCKS + 1)]
CLOSED = -1
ALL = [(1 << n) - 1 for n in range(SEGMENT_BLOCKS + 1)]
_BITS = [tuple(offset for offset in range(8) if byte >> offset & 1) for byte in range(256)]


def keys_of(packed: bytes) -> tuple[int, ...]:
    """Keys of a run of at most `SEGMENT_BLOCKS` hashes."""
    count = len(packed) >> 3
    return UNPACK[count]((from_bytes(packed, "little") & _KEYS[count]).to_bytes(len(packed), "little"))


def key_of_last(packed: bytes) -> int:
    """Key of a run's last block; 0 of an empty one."""
    return from_bytes(packed[-8:], "little") & KEY


class Segment(Struct, eq=False, gc=False):
    """A run of consecutive block hashes and who holds it. Each position has at least one holder.

    It is in no cycle, so the collector need not know it, nor the dictionary of millions that leads to it.
    """

    packed: bytes
    full: int
    """Slots that hold all of it, as a bit mask."""
    end: int
    """Key of the last block, after which a run may go on; `CLOSED` while a holder has only a part."""
    some: dict[int, int] | None = None
    """Of the others, how many of its first blocks they hold, or, below zero, the complement of a bit mask of positions."""

    def cut(self, packed: bytes) -> None:
        """Become another run."""
        self.packed = packed
        self.end = key_of_last(packed)

    def position(self, here: bytes) -> int:
        """Position of a hash (as 8 bytes) in this run, -1 when it isn't there."""
        at = self.packed.find(here)
        while at & 7 and at > 0:
            at = self.packed.find(here, at + 1)
        return at >> 3

    def get(self, slot: int) -> int:
        """Positions that a slot holds, as a bit mask."""
        if self.full >> slot & 1:
            return ALL[len(self.packed) >> 3]
        return mask_of(self.some.get(slot, 0)) if self.some is not None else 0

    def put(self, slot: int, mask: int) -> None:
        """Set the positions that a slot holds, in the form that fits them."""
        bit = 1 << slot
        self.full &= ~bit
        some = self.some or {}
        some.pop(slot, None)
        if mask == ALL[len(self.packed) >> 3]:
            self.full |= bit
        elif mask:
            some[slot] = ~mask if mask & (mask + 1) else mask.bit_length()
        self.some = some or None
        if some:
            self.end = CLOSED
        elif self.end == CLOSED:
            self.end = key_of_last(self.packed)

    def covered(self) -> int:
        """Positions that have a holder, as a bit mask."""
        if self.full:
            return ALL[len(self.packed) >> 3]
        mask = 0
        for some in self.some.values() if self.some is not None else ():
            mask |= mask_of(some)
        return mask

    def holders(self, position: int) -> int:
        """Slots that hold a position, as a bit mask."""
        slots = self.full
        for slot, some in self.some.items() if self.some is not None else ():
            slots |= (mask_of(some) >> position & 1) << slot
        return slots

    def partial(self) -> dict[int, int]:
        """Masks of the slots that hold some of it."""
        return {slot: mask_of(some) for slot, some in self.some.items()} if self.some is not None else {}


def mask_of(some: int) -> int:
    """Positions that a slot of a segment's `some` holds, as a bit mask."""
    return ALL[some] if some >= 0 else ~some


def common(left: bytes, at_left: int, right: bytes, at_right: int, most: int) -> int:
    """How many blocks agree from these positions on, `most` at the most."""
    low, high = 0, most
    while high - low > 8:
        middle = (low + high) >> 1
        if (
            left[(at_left + low) << 3 : (at_left + middle) << 3]
            == right[(at_right + low) << 3 : (at_right + middle) << 3]
        ):
            low = middle
        else:
            high = middle
    ours = left[(at_left + low) << 3 : (at_left + high) << 3]
    theirs = right[(at_right + low) << 3 : (at_right + high) << 3]
    if ours == theirs:
        return high
    # The lowest bit in which they differ is in the first block that does.
    differ = from_bytes(ours, "little") ^ from_bytes(theirs, "little")
    return low + (((differ & -differ).bit_length() - 1) >> 6)


def lift(lengths: list[int], mask: int, length: int) -> None:
    """Raise the entries of a mask's slots to this length."""
    base = 0
    for byte in mask.to_bytes((mask.bit_length() + 7) >> 3, "little"):
        for offset in _BITS[byte]:
            if lengths[base + offset] < length:  # noqa: PLR1730 - a call of `max` takes three times as long
                lengths[base + offset] = length
        base += 8


def fill(lengths: list[int], mask: int, length: int) -> None:
    """Set the entries of a mask's slots. Masks are as many as there are sets of holders, so none is remembered."""
    if mask.bit_count() == len(lengths):
        lengths[:] = [length] * len(lengths)
        return
    base = 0
    for byte in mask.to_bytes((mask.bit_length() + 7) >> 3, "little"):
        for offset in _BITS[byte]:
            lengths[base + offset] = length
        base += 8
