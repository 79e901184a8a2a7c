"""An index in a snapshot: its segments, as they are written and put together again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

from msgspec import Meta, Struct

from kvplane.projections.segment import ALL, HASH_BYTES, SEGMENT_BYTES, Segment, key_of_last

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.projections.prefix import PrefixIndex

MOST_SLOTS = 1 << 16
"""Most slots of all models. Their masks take 268 MB; without a limit a few bytes could claim any amount of memory."""


class Part(Struct, array_like=True, forbid_unknown_fields=True):
    """Base of all parts of a snapshot's body."""


class SegmentPart(Part, gc=False):
    """A run of hashes and a bit mask of the slots that hold all of it; of others that hold some, masks of positions."""

    run: Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=SEGMENT_BYTES)]
    full: bytes
    some: list[tuple[int, bytes]] | None


def broken(what: str) -> NoReturn:
    """Say that a snapshot does not fit together."""
    raise ValueError(what)


def _mask(bits: int) -> bytes:
    return bits.to_bytes((bits.bit_length() + 7) >> 3, "little")


def segments_of(index: PrefixIndex) -> list[SegmentPart]:
    """The segments of an index."""
    return [
        SegmentPart(
            segment.packed,
            _mask(segment.full),
            None
            if segment.some is None
            else [(slot, _mask(positions)) for slot, positions in segment.partial().items()],
        )
        for segment in index.segments()
    ]


def segments(parts: Sequence[SegmentPart], owners: Sequence[str | None]) -> list[Segment]:
    """Segments of these parts, for slots with these owners. Raises `ValueError` where they can't be."""
    taken = int("".join("0" if owner is None else "1" for owner in reversed(owners)), 2)
    masks: dict[bytes, int] = {}
    made = []
    for each in parts:
        whole = ALL[len(each.run) >> 3]
        if len(each.run) % HASH_BYTES:
            broken("a run ends within a block")
        full = masks.get(each.full)
        if full is None:
            full = masks[each.full] = int.from_bytes(each.full, "little")
            if full & ~taken:
                broken("a slot that no node has holds blocks")
        segment = Segment(each.run, full, key_of_last(each.run))
        if each.some is not None:
            _hold(segment, each.some, owners, whole)
        if segment.covered() != whole:
            broken("nobody holds a block")
        made.append(segment)
    return made


def _hold(segment: Segment, some: Sequence[tuple[int, bytes]], owners: Sequence[str | None], whole: int) -> None:
    for slot, packed in some:
        positions = int.from_bytes(packed, "little")
        if slot < 0 or owners[slot] is None or segment.get(slot) or not 0 < positions < whole:
            broken("a slot can't hold these blocks of a segment")
        segment.put(slot, positions)
