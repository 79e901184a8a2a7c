"""Which node holds which blocks of one model, and how far a request matches on each.

Theory. Block hashes are chained, so blocks that were stored together are asked for, shared and evicted together.
The index keeps them as *segments*: a run of consecutive block hashes, packed as little-endian u64, in which every
position is held by at least one holder. A segment knows its holders in three forms: `full`, a bit mask of those that
have every block of it; `heads`, for those that have its first blocks, how many; and `parts`, for the few that have
others, a bit mask of positions each. One dictionary leads from a block hash to its segment, and no hash is ever in two
segments.

A second node that stores a known run costs one comparison of bytes and one bit, whatever the length of the run; a
request is compared with a segment by one `memcmp`, and all full holders go on with one `&`. A block whose parent has
left is simply not reached by the walk, so eviction in any order can't be mistaken for a match. The index never
assumes that chains are honest: hashes are compared, not trusted, and the answer is that of a naive
dictionary of sets for any input.

A holder is a small integer (a *slot*): one tier of one node. Slots are dense, so that masks stay short.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

from events.hashing import unpack_hashes
from projections.segment import ALL, SEGMENT_BYTES, UNPACK, Segment, common

if TYPE_CHECKING:
    from collections.abc import Iterator

_BITS = [tuple(offset for offset in range(8) if byte >> offset & 1) for byte in range(256)]


def _fill(lengths: list[int], mask: int, length: int) -> None:
    """Set the entries of a mask's slots. Masks are as many as there are sets of holders, so none is remembered."""
    if mask.bit_count() == len(lengths):
        lengths[:] = [length] * len(lengths)
        return
    base = 0
    for byte in mask.to_bytes((mask.bit_length() + 7) >> 3, "little"):
        for offset in _BITS[byte]:
            lengths[base + offset] = length
        base += 8


class PrefixIndex:
    """Block memberships of one model: `store`, `remove` and `clear` for a slot, `match` for a request."""

    def __init__(self) -> None:
        self._where: dict[int, Segment] = {}
        self._bits: list[int] = []
        self._held: list[set[Segment]] = []
        self._counts: list[int] = []

    def __len__(self) -> int:
        """Distinct blocks that at least one slot holds."""
        return len(self._where)

    @property
    def memberships(self) -> int:
        """Blocks summed over slots."""
        return sum(self._counts)

    def add_slot(self, slot: int) -> None:
        """Make room for slots up to and including `slot`."""
        while len(self._bits) <= slot:
            self._bits.append(1 << len(self._bits))
            self._held.append(set())
            self._counts.append(0)

    def count(self, slot: int) -> int:
        """Blocks that the slot holds."""
        return self._counts[slot] if slot < len(self._counts) else 0

    def store(self, slot: int, packed: bytes, parent: int | None = None) -> int:
        """Add a run of blocks to a slot and return how many it did not hold before.

        `packed` is the run's hashes as little-endian u64; `parent` is the hash before the first. The parent only
        helps to keep runs long; it need not be known.
        """
        if slot >= len(self._bits):
            self.add_slot(slot)
        size = len(packed)
        if size > SEGMENT_BYTES:
            return self._store_long(slot, packed, parent)
        where = self._where
        bit = self._bits[slot]
        count = size >> 3
        hashes = UNPACK[count](packed)
        known = where.get(hashes[0])
        if known is not None:
            if known.packed == packed and known.heads is None and known.parts is None:
                if known.full & bit:
                    return 0
                known.full |= bit
                self._held[slot].add(known)
                self._counts[slot] += count
                return count
            return self._store_known(slot, packed)
        # A run that goes on where a segment of this slot alone ends makes that one longer: decoding stores block by block.
        segment = where.get(parent) if parent is not None else None
        if (
            segment is None
            or segment.full != bit
            or segment.last != parent
            or segment.heads is not None
            or segment.parts is not None
            or len(segment.packed) + size > SEGMENT_BYTES
        ):
            segment = Segment(b"", 0, bit)
        if count == 1:
            where[hashes[0]] = segment
        else:
            before = len(where)
            for _ in map(where.setdefault, hashes, repeat(segment)):
                pass
            fresh = len(where) - before
            if fresh != count:
                # Some of the run was known, or named twice: the last `fresh` keys are those just added.
                for _ in range(fresh):
                    where.popitem()
                return self._store_known(slot, packed)
        if segment.packed:
            segment.packed += packed
        else:
            segment.packed = packed
            self._held[slot].add(segment)
        segment.last = hashes[-1]
        self._counts[slot] += count
        return count

    def _store_long(self, slot: int, packed: bytes, parent: int | None) -> int:
        added = 0
        for at in range(0, len(packed), SEGMENT_BYTES):
            piece = packed[at : at + SEGMENT_BYTES]
            added += self.store(slot, piece, parent)
            parent = int.from_bytes(piece[-8:], "little")
        return added

    def _store_known(self, slot: int, packed: bytes) -> int:
        """Add a run of which some blocks are in segments already."""
        where = self._where
        hashes = UNPACK[len(packed) >> 3](packed)
        count = len(hashes)
        added = 0
        at = 0
        while at < count:
            segment = where.get(hashes[at])
            if segment is None:
                start = at
                segment = Segment(b"", 0, self._bits[slot])
                while at < count and hashes[at] not in where:
                    where[hashes[at]] = segment
                    at += 1
                segment.cut(packed[start << 3 : at << 3])
                self._held[slot].add(segment)
                added += at - start
                continue
            run = segment.packed
            here = packed[at << 3 : (at << 3) + 8]
            position = 0 if run.startswith(here) else segment.position(here)
            length = common(run, position, packed, at, min((len(run) >> 3) - position, count - at))
            added += self._hold(segment, slot, position, length)
            at += length
        self._counts[slot] += added
        return added

    def _hold(self, segment: Segment, slot: int, position: int, length: int) -> int:
        before = segment.get(slot)
        now = before | ALL[length] << position
        if now == before:
            return 0
        segment.put(slot, now)
        if not before:
            self._held[slot].add(segment)
        return now.bit_count() - before.bit_count()

    def remove(self, slot: int, packed: bytes) -> int:
        """Take blocks from a slot, in any order; return how many it held."""
        if slot >= len(self._bits):
            return 0
        where = self._where
        bit = self._bits[slot]
        removed = 0
        for at in range(0, len(packed), 8):
            key = packed[at : at + 8]
            block = int.from_bytes(key, "little")
            segment = where.get(block)
            if segment is None:
                continue
            run = segment.packed
            last = (len(run) >> 3) - 1
            position = last if run.endswith(key) else segment.position(key)
            if segment.full == bit and position == last and last and segment.heads is None and segment.parts is None:
                segment.cut(run[:-8])
                del where[block]
                removed += 1
                continue
            held = segment.get(slot)
            if not held >> position & 1:
                continue
            removed += 1
            held &= ~(1 << position)
            segment.put(slot, held)
            if not held:
                self._held[slot].discard(segment)
            if not segment.covered() >> position & 1:
                self._drop(segment, position)
        self._counts[slot] -= removed
        return removed

    def _drop(self, segment: Segment, position: int) -> None:
        """Take a position that nobody holds out of its segment, so that every position keeps a holder."""
        run = segment.packed
        del self._where[int.from_bytes(run[position << 3 : (position << 3) + 8], "little")]
        left, right = run[: position << 3], run[(position + 1) << 3 :]
        if not left and not right:
            segment.packed = b""
            return
        masks = segment.partial()
        if left and right:
            tail = Segment(b"", 0, 0)
            for block in unpack_hashes(right):
                self._where[block] = tail
            self._reform(tail, right, {slot: mask >> (position + 1) for slot, mask in masks.items()})
        if left:
            self._reform(segment, left, {slot: mask & ALL[position] for slot, mask in masks.items()})
        else:
            self._reform(segment, right, {slot: mask >> 1 for slot, mask in masks.items()})

    def _reform(self, segment: Segment, run: bytes, holders: dict[int, int]) -> None:
        """Set a segment's run and its holders from masks of positions; only for segments without full holders."""
        segment.cut(run)
        for slot, mask in holders.items():
            segment.put(slot, mask)
            if mask:
                self._held[slot].add(segment)
            else:
                self._held[slot].discard(segment)

    def clear(self, slot: int) -> int:
        """Take every block from a slot; return how many it held."""
        if slot >= len(self._bits):
            return 0
        where = self._where
        held, self._held[slot] = self._held[slot], set()
        for segment in held:
            segment.put(slot, 0)
            alive = segment.covered()
            if not alive:
                for block in unpack_hashes(segment.packed):
                    del where[block]
                segment.packed = b""
                continue
            for position in range((len(segment.packed) >> 3) - 1, -1, -1):
                if not alive >> position & 1:
                    self._drop(segment, position)
        removed, self._counts[slot] = self._counts[slot], 0
        return removed

    def match(self, packed: bytes, limit: int | None = None) -> list[int]:
        """Leading blocks of a request that each slot holds, by slot.

        `packed` is the request's hashes; only the first `limit` blocks count.
        """
        where = self._where
        bits = self._bits
        lengths = [0] * len(bits)
        total = len(packed) >> 3
        if limit is not None and limit < total:
            total = limit
        alive = -1
        at = 0
        while at < total:
            offset = at << 3
            here = packed[offset : offset + 8]
            segment = where.get(int.from_bytes(here, "little"))
            if segment is None:
                break
            run = segment.packed
            position = 0
            if packed.startswith(run, offset):
                length = min(len(run) >> 3, total - at)
            else:
                position = 0 if run.startswith(here) else segment.position(here)
                length = common(run, position, packed, at, min((len(run) >> 3) - position, total - at))
            on = alive & segment.full
            heads, parts = segment.heads, segment.parts
            if heads is None and parts is None:
                if at and on != alive:
                    _fill(lengths, alive & ~on, at)
            else:
                ended = []
                for slot, count in heads.items() if heads is not None else ():
                    if not at or alive >> slot & 1:
                        if count - position >= length:
                            on |= bits[slot]
                        elif count > position:
                            ended.append((slot, at + count - position))
                for slot, mask in parts.items() if parts is not None else ():
                    if not at or alive >> slot & 1:
                        held = mask >> position
                        reach = (~held & held + 1).bit_length() - 1
                        if reach >= length:
                            on |= bits[slot]
                        elif reach:
                            ended.append((slot, at + reach))
                if at:
                    _fill(lengths, alive & ~on, at)
                for slot, end in ended:
                    lengths[slot] = end
            at += length
            alive = on
            if not on:
                return lengths
        if at:
            _fill(lengths, alive, at)
        return lengths

    def extent(self, slot: int, packed: bytes, start: int, limit: int) -> int:
        """How many blocks of a request the slot holds without a gap from position `start` on."""
        at = start
        while at < limit and self.holds(slot, int.from_bytes(packed[at << 3 : (at << 3) + 8], "little")):
            at += 1
        return at - start

    def knows(self, packed: bytes) -> bool:
        """Whether any slot holds the first block of a request."""
        return int.from_bytes(packed[:8], "little") in self._where

    def holds(self, slot: int, block: int) -> bool:
        """Whether the slot holds this block."""
        segment = self._where.get(block)
        if segment is None or slot >= len(self._bits):
            return False
        if segment.full & self._bits[slot]:
            return True
        return bool(segment.get(slot) >> segment.position(block.to_bytes(8, "little")) & 1)

    def held(self, slot: int) -> Iterator[int]:
        """Block hashes that the slot holds, in no particular order."""
        if slot >= len(self._bits):
            return
        bit = self._bits[slot]
        for segment in self._held[slot]:
            blocks = unpack_hashes(segment.packed)
            if segment.full & bit:
                yield from blocks
            else:
                mask = segment.get(slot)
                yield from (block for position, block in enumerate(blocks) if mask >> position & 1)
