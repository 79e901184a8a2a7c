"""Which node holds which blocks of one model, and how far a request matches on each.

Theory. Block hashes are chained, so blocks that were stored together are asked for, shared and evicted together.
The index keeps them as *segments*: a run of consecutive block hashes, packed as little-endian u64, in which every
position is held by at least one holder. A segment knows its holders in two forms: `full`, a bit mask of those that
have every block of it; and `some`, for those that have its first blocks, how many, and for the few that have others,
a bit mask of positions each. One dictionary leads from a block to its segment, and no block is ever in two
segments. Its key is 60 bits of the hash, to save memory; the segment holds all 64, and what shares a key with another
block (one pair is expected among a billion) has an entry of its own in `_twins`.

A second node that stores a known run costs one comparison of bytes and one bit, whatever the length of the run; a
request is compared with a segment by one `memcmp`, and all full holders go on with one `&`. A block whose parent has
left is simply not reached by the walk, so eviction in any order can't be mistaken for a match. The index never
assumes that chains are honest: hashes are compared, not trusted, and the answer is that of a naive
dictionary of sets for any input.

A holder is a small integer (a *slot*): one tier of one node. Slots are dense, so that masks stay short.
"""

from __future__ import annotations

from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np

from kvplane.events.hashing import unpack_hashes
from kvplane.projections.segment import (
    ALL,
    CLOSED,
    HASH_BYTES,
    KEY,
    SEGMENT_BYTES,
    Segment,
    common,
    fill,
    from_bytes,
    keys_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class PrefixIndex:
    """Block copies of one model: `store`, `remove` and `clear` for a slot, `match` for a request."""

    def __init__(self) -> None:
        self._where: dict[int, Segment] = {}
        self._twins: dict[int, Segment] = {}
        """Blocks, by their whole hash, whose key was taken when they came."""
        self._bits: list[int] = []
        self._held: list[dict[Segment, None]] = []
        """Segments of which each slot has something, as the keys of a dictionary: a set takes twice the memory."""
        self._counts: list[int] = []

    def __len__(self) -> int:
        """Distinct blocks that at least one slot holds."""
        return len(self._where) + len(self._twins)

    @property
    def block_copies(self) -> int:
        """Blocks summed over slots."""
        return sum(self._counts)

    def add_slot(self, slot: int) -> None:
        """Add what is missing of the slots up to and including `slot`."""
        while len(self._bits) <= slot:
            self._bits.append(1 << len(self._bits))
            self._held.append({})
            self._counts.append(0)

    def segments(self) -> list[Segment]:
        """Every segment once, in the order in which their first blocks came."""
        return list(dict.fromkeys(self._where.values()) | dict.fromkeys(self._twins.values()))

    def adopt(self, segments: Sequence[Segment]) -> None:
        """Fill an empty index that has the slots with segments. Raises `ValueError` when a block is in two places."""
        counts = [len(segment.packed) >> 3 for segment in segments]
        packed = np.frombuffer(b"".join([segment.packed for segment in segments]), "<u8")
        keys = (packed & np.uint64(KEY)).tolist()
        self._where = dict(zip(keys, chain.from_iterable(map(repeat, segments, counts)), strict=True))
        if len(self._where) != sum(counts):
            self._where = {}
            self._adopt_twins(segments)
        alike: dict[int, dict[Segment, None]] = {}
        for segment in segments:
            alike.setdefault(segment.full, {})[segment] = None
            for slot, mask in segment.partial().items():
                self._held[slot][segment] = None
                self._counts[slot] += mask.bit_count()
        for full, group in alike.items():
            blocks = sum(len(segment.packed) for segment in group) >> 3
            left = full
            while left:
                slot = left.bit_length() - 1
                left ^= self._bits[slot]
                self._held[slot].update(group)
                self._counts[slot] += blocks

    def _adopt_twins(self, segments: Sequence[Segment]) -> None:
        blocks = [(block, segment) for segment in segments for block in unpack_hashes(segment.packed)]
        if len(dict(blocks)) != len(blocks):
            raise ValueError("a block is in two places")
        for block, segment in blocks:
            self._bind(block, segment)

    def _find(self, here: bytes) -> tuple[Segment, int] | None:
        """Segment of a hash (as 8 bytes), and its position there."""
        block = from_bytes(here, "little")
        segment = self._where.get(block & KEY)
        if segment is not None:
            position = 0 if segment.packed.startswith(here) else segment.position(here)
            if position >= 0:
                return segment, position
        twin = self._twins.get(block) if self._twins else None
        return None if twin is None else (twin, twin.position(here))

    def _bind(self, block: int, segment: Segment) -> None:
        """Lead from a block that is in no segment to this one."""
        if block & KEY in self._where:
            self._twins[block] = segment
        else:
            self._where[block & KEY] = segment

    def _unbind(self, run: bytes) -> None:
        """Forget the blocks of a run."""
        for block in unpack_hashes(run):
            if self._twins.pop(block, None) is None:
                del self._where[block & KEY]

    def count(self, slot: int) -> int:
        """Blocks that the slot holds."""
        return self._counts[slot] if slot < len(self._counts) else 0

    def counts(self) -> list[int]:
        """Blocks that each slot holds, by slot."""
        return self._counts

    def store(self, slot: int, packed: bytes, parent: int | None = None) -> int:
        """Add a run of blocks to a slot and return how many it did not hold before.

        `packed` is the run's hashes as little-endian u64; `parent` is the hash before the first. The parent only
        helps to keep runs long; it need not be known.
        """
        try:
            bit = self._bits[slot]
        except IndexError:
            self.add_slot(slot)
            bit = self._bits[slot]
        size = len(packed)
        where = self._where
        keys: tuple[int, ...] = ()
        if size == HASH_BYTES:
            # Decoding stores block by block.
            end = from_bytes(packed, "little") & KEY
            if end in where or self._twins:
                return self._store_known(slot, packed)
        elif size > SEGMENT_BYTES:
            return self._store_long(slot, packed, parent)
        else:
            keys = keys_of(packed)
            end = keys[-1]
            if self._twins or not where.keys().isdisjoint(keys):
                return self._store_known(slot, packed)
        before = CLOSED if parent is None else parent & KEY
        segment = where.get(before)
        if (
            segment is not None
            and segment.end == before
            and segment.full == bit
            and len(segment.packed) + size <= SEGMENT_BYTES
        ):
            # A run that goes on where a segment of this slot alone ends makes that one longer.
            if keys and not self._lead(keys, segment):
                return self._store_known(slot, packed)
            segment.packed += packed
            segment.end = end
        else:
            segment = Segment(packed, bit, end)
            if keys and not self._lead(keys, segment):
                return self._store_known(slot, packed)
            self._held[slot][segment] = None
        if not keys:
            where[end] = segment
        size >>= 3
        self._counts[slot] += size
        return size

    def _lead(self, keys: Sequence[int], segment: Segment) -> bool:
        """Lead from keys that are not there to a segment; when one is named twice, none is there afterwards."""
        where = self._where
        before = len(where)
        for key in keys:
            where[key] = segment
        if len(where) - before == len(keys):
            return True
        for key in set(keys):
            del where[key]
        return False

    def _store_long(self, slot: int, packed: bytes, parent: int | None) -> int:
        added = 0
        for at in range(0, len(packed), SEGMENT_BYTES):
            piece = packed[at : at + SEGMENT_BYTES]
            added += self.store(slot, piece, parent)
            parent = from_bytes(piece[-8:], "little")
        return added

    def _store_known(self, slot: int, packed: bytes) -> int:
        """Add a run of which some blocks are in segments already."""
        count = len(packed) >> 3
        known = self._where.get(from_bytes(packed[:8], "little") & KEY)
        if known is not None and known.packed == packed and known.end != CLOSED:
            bit = self._bits[slot]
            if known.full & bit:
                return 0
            known.full |= bit
            self._held[slot][known] = None
            self._counts[slot] += count
            return count
        added = 0
        at = 0
        untried = not self._twins
        while at < count:
            found = self._find(packed[at << 3 : (at << 3) + 8])
            if found is None:
                # Mostly all that follows is new: a conversation that went on. Tried once, so that work stays linear.
                length = (untried and self._store_tail(slot, packed[at << 3 :])) or self._store_new(slot, packed, at)
                untried = False
                added += length
            else:
                segment, position = found
                run = segment.packed
                length = common(run, position, packed, at, min((len(run) >> 3) - position, count - at))
                added += self._hold(segment, slot, position, length)
            at += length
        self._counts[slot] += added
        return added

    def _store_tail(self, slot: int, packed: bytes) -> int:
        """Add a run as a new segment if none of its keys is taken, all or nothing; only while there are no twins."""
        keys = keys_of(packed)
        segment = Segment(packed, self._bits[slot], keys[-1])
        if not self._where.keys().isdisjoint(keys) or not self._lead(keys, segment):
            return 0
        self._held[slot][segment] = None
        return len(keys)

    def _store_new(self, slot: int, packed: bytes, start: int) -> int:
        """Add the blocks from `start` on that are in no segment, as a new one; how many there are, at least one."""
        segment = Segment(b"", self._bits[slot], CLOSED)
        new: set[int] = set()
        for at in range(start, len(packed) >> 3):
            here = packed[at << 3 : (at << 3) + 8]
            block = from_bytes(here, "little")
            if block in new or self._find(here) is not None:
                break
            new.add(block)
        segment.cut(packed[start << 3 : (start + len(new)) << 3])
        for block in new:
            self._bind(block, segment)
        self._held[slot][segment] = None
        return len(new)

    def _hold(self, segment: Segment, slot: int, position: int, length: int) -> int:
        before = segment.get(slot)
        now = before | ALL[length] << position
        if now == before:
            return 0
        segment.put(slot, now)
        if not before:
            self._held[slot][segment] = None
        return now.bit_count() - before.bit_count()

    def remove(self, slot: int, packed: bytes) -> int:
        """Take blocks from a slot, in any order; return how many it held."""
        if slot >= len(self._bits):
            return 0
        bit = self._bits[slot]
        removed = 0
        for at in range(0, len(packed), 8):
            here = packed[at : at + 8]
            found = self._find(here)
            if found is None:
                continue
            segment, position = found
            run = segment.packed
            last = (len(run) >> 3) - 1
            if segment.full == bit and position == last and last and segment.some is None:
                segment.cut(run[:-8])
                self._unbind(here)
                removed += 1
                continue
            held = segment.get(slot)
            if not held >> position & 1:
                continue
            removed += 1
            held &= ~(1 << position)
            segment.put(slot, held)
            if not held:
                self._held[slot].pop(segment, None)
            if not segment.covered() >> position & 1:
                self._drop(segment, position)
        self._counts[slot] -= removed
        return removed

    def _drop(self, segment: Segment, position: int) -> None:
        """Take a position that nobody holds out of its segment, so that every position keeps a holder."""
        run = segment.packed
        self._unbind(run[position << 3 : (position << 3) + 8])
        left, right = run[: position << 3], run[(position + 1) << 3 :]
        if not left and not right:
            segment.packed = b""
            return
        masks = segment.partial()
        if left and right:
            tail = Segment(b"", 0, CLOSED)
            for block in unpack_hashes(right):
                if block in self._twins:
                    self._twins[block] = tail
                else:
                    self._where[block & KEY] = tail
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
                self._held[slot][segment] = None
            else:
                self._held[slot].pop(segment, None)

    def clear(self, slot: int) -> int:
        """Take every block from a slot; return how many it held."""
        if slot >= len(self._bits):
            return 0
        held, self._held[slot] = self._held[slot], {}
        # Of most of what is there: to look at all of it once is cheaper than to look for each block.
        many = 2 * self._counts[slot] > len(self) and not self._twins
        for segment in held:
            segment.put(slot, 0)
            alive = segment.covered()
            if not alive:
                if not many:
                    self._unbind(segment.packed)
                segment.packed = b""
                continue
            for position in range((len(segment.packed) >> 3) - 1, -1, -1):
                if not alive >> position & 1:
                    self._drop(segment, position)
        if many:
            self._where = {key: segment for key, segment in self._where.items() if segment.packed}
        removed, self._counts[slot] = self._counts[slot], 0
        return removed

    def match(self, packed: bytes, limit: int | None = None) -> list[int]:
        """Leading blocks of a request, given by its hashes, that each slot holds, by slot; `limit` at the most."""
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
            segment = where.get(from_bytes(here, "little") & KEY)
            if segment is None and not self._twins:
                break
            if segment is not None and packed.startswith(segment.packed, offset):
                position = 0
                length = min(len(segment.packed) >> 3, total - at)
            else:
                found = self._find(here)
                if found is None:
                    break
                segment, position = found
                run = segment.packed
                length = common(run, position, packed, at, min((len(run) >> 3) - position, total - at))
            on = alive & segment.full
            some = segment.some
            if some is None:
                if at and on != alive:
                    fill(lengths, alive & ~on, at)
            else:
                if at:
                    # Those that go on get their true length later.
                    fill(lengths, alive, at)
                for slot, what in some.items():
                    if not at or alive >> slot & 1:
                        if what >= 0:
                            reach = what - position
                        else:
                            held = ~what >> position
                            reach = (~held & held + 1).bit_length() - 1
                        if reach >= length:
                            on |= bits[slot]
                        elif reach > 0:
                            lengths[slot] = at + reach
            at += length
            alive = on
            if not on:
                return lengths
        if at:
            fill(lengths, alive, at)
        return lengths

    def extent(self, slot: int, packed: bytes, start: int, limit: int) -> int:
        """How many blocks of a request the slot holds without a gap from position `start` on."""
        at = start
        while at < limit and self.holds(slot, from_bytes(packed[at << 3 : (at << 3) + 8], "little")):
            at += 1
        return at - start

    def holds(self, slot: int, block: int) -> bool:
        """Whether the slot holds this block."""
        found = self._find(block.to_bytes(8, "little"))
        return found is not None and bool(found[0].get(slot) >> found[1] & 1)

    def holders(self, here: bytes) -> int:
        """Slots that hold this block (as 8 bytes), as a bit mask."""
        found = self._find(here)
        return 0 if found is None else found[0].holders(found[1])

    def held(self, slot: int) -> tuple[int, ...]:
        """Block hashes that the slot holds, in no particular order."""
        return unpack_hashes(self.packed(slot))

    def packed(self, slot: int) -> bytes:
        """Block hashes that the slot holds, packed, in no particular order."""
        if slot >= len(self._bits):
            return b""
        runs = []
        for segment in self._held[slot]:
            mask, packed = segment.get(slot), segment.packed
            if mask & (mask + 1):
                runs += [packed[at << 3 : (at + 1) << 3] for at in range(mask.bit_length()) if mask >> at & 1]
            else:
                runs.append(packed[: mask.bit_length() << 3])
        return b"".join(runs)
