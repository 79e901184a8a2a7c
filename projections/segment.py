"""A run of consecutive block hashes and who holds it: the building stone of the prefix index."""

from __future__ import annotations

import struct

HASH_BYTES = 8
# Longer runs are cut: positions are bits of one int, and appending to a run copies it.
SEGMENT_BLOCKS = 512
SEGMENT_BYTES = SEGMENT_BLOCKS * HASH_BYTES

UNPACK = [struct.Struct(f"<{n}Q").unpack for n in range(SEGMENT_BLOCKS + 1)]
# Keys are 60 bits of a hash: a Python int of up to 60 bits takes 32 bytes, a larger one 48.
KEY = (1 << 60) - 1
_KEYS = [int.from_bytes(KEY.to_bytes(8, "little") * n, "little") for n in range(SEGMENT_BLOCKS + 1)]
CLOSED = -1
ALL = [(1 << n) - 1 for n in range(SEGMENT_BLOCKS + 1)]
_BITS = [tuple(offset for offset in range(8) if byte >> offset & 1) for byte in range(256)]


def keys_of(packed: bytes) -> tuple[int, ...]:
    """Keys of a run of at most `SEGMENT_BLOCKS` hashes."""
    count = len(packed) >> 3
    if count == 1:
        return (int.from_bytes(packed, "little") & KEY,)
    return UNPACK[count]((int.from_bytes(packed, "little") & _KEYS[count]).to_bytes(len(packed), "little"))


def key_of_last(packed: bytes) -> int:
    """Key of a run's last block; 0 of an empty one."""
    return int.from_bytes(packed[-8:], "little") & KEY


class Segment:
    """A run of consecutive block hashes and who holds it. Each position has at least one holder."""

    __slots__ = ("end", "full", "heads", "packed", "parts")

    def __init__(self, packed: bytes, full: int, end: int | None = None) -> None:
        self.packed = packed
        self.full = full
        self.heads: dict[int, int] | None = None
        self.parts: dict[int, int] | None = None
        self.end = key_of_last(packed) if end is None else end
        """Key of the last block, after which a run may go on; `CLOSED` while a holder has only a part."""

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
        if self.heads is not None and slot in self.heads:
            return ALL[self.heads[slot]]
        return self.parts.get(slot, 0) if self.parts is not None else 0

    def put(self, slot: int, mask: int) -> None:
        """Set the positions that a slot holds, in the form that fits them."""
        bit = 1 << slot
        self.full &= ~bit
        if self.heads is not None and self.heads.pop(slot, None) is not None and not self.heads:
            self.heads = None
        if self.parts is not None and self.parts.pop(slot, None) is not None and not self.parts:
            self.parts = None
        if mask == ALL[len(self.packed) >> 3]:
            self.full |= bit
        elif mask & (mask + 1):
            if self.parts is None:
                self.parts = {}
            self.parts[slot] = mask
        elif mask:
            if self.heads is None:
                self.heads = {}
            self.heads[slot] = mask.bit_length()
        if self.heads is not None or self.parts is not None:
            self.end = CLOSED
        elif self.end == CLOSED:
            self.end = key_of_last(self.packed)

    def covered(self) -> int:
        """Positions that have a holder, as a bit mask."""
        if self.full:
            return ALL[len(self.packed) >> 3]
        mask = ALL[max(self.heads.values())] if self.heads is not None else 0
        for part in self.parts.values() if self.parts is not None else ():
            mask |= part
        return mask

    def partial(self) -> dict[int, int]:
        """Masks of the slots that hold some of it."""
        found = {slot: ALL[count] for slot, count in self.heads.items()} if self.heads is not None else {}
        return found | self.parts if self.parts is not None else found


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
    differ = int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little")
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
