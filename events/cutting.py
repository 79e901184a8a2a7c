"""Events that are larger than a message may be, as several, or with less in them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from kvplane.events import codec
from kvplane.events.hashing import unpack_hashes
from kvplane.events.types import BlocksRemoved, BlocksStored, GroupRemoved, GroupStored, RequestRouted

if TYPE_CHECKING:
    from kvplane.events.types import Event

HASH_BYTES = 8


def cut(event: Event, space: int) -> list[tuple[Event, bytes]]:
    """An event and its encoding in so many bytes at the most, as several if need be; as it is where nothing helps.

    A decision goes without its hashes, so that it can't be made again, rather than not at all.
    """
    encoded = codec.encode_one(event)
    if len(encoded) <= space:
        return [(event, encoded)]
    match event:
        case BlocksStored() | BlocksRemoved() | GroupStored() | GroupRemoved() if len(event.hashes) > HASH_BYTES:
            middle = len(event.hashes) // HASH_BYTES // 2
            at = middle * HASH_BYTES
            first, second = replace(event, hashes=event.hashes[:at]), replace(event, hashes=event.hashes[at:])
            if isinstance(first, BlocksStored) and isinstance(second, BlocksStored):
                names = first.engine_hashes
                second = replace(
                    second, parent=unpack_hashes(event.hashes[at - HASH_BYTES : at])[0],
                    engine_hashes=names and names[middle:],
                )  # fmt: skip
                first = replace(first, engine_hashes=names and names[:middle])
            elif isinstance(first, GroupStored) and isinstance(second, GroupStored):
                names = first.engine_hashes
                first = replace(first, engine_hashes=names and names[:middle])
                second = replace(second, engine_hashes=names and names[middle:])
            return [*cut(first, space), *cut(second, space)]
        case RequestRouted(hashes=hashes) if hashes:
            return cut(replace(event, hashes=b""), space)
        case RequestRouted() if event.candidates or event.exclude:
            return cut(replace(event, candidates=[], exclude=[]), space)
    return [(event, encoded)]
