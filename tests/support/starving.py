"""A kvplane whose memory ends now and then: `python -m tests.support.starving router ...` is the command line otherwise.

It ends once for the headers of a commit of the writer `STARVES`, and always when `BLOCK` is stored.
"""

from __future__ import annotations

from nats.aio.client import Client

from kvplane.events.hashing import pack_hashes
from kvplane.projections.prefix import PrefixIndex

STARVES = "starves"
BLOCK = 666

_store, _parse = PrefixIndex.store, Client._parse_header_lines
_parsed = [False]


def _stores(index: PrefixIndex, slot: int, packed: bytes, parent: int | None = None) -> int:
    if packed == pack_hashes([BLOCK]):
        raise MemoryError
    return _store(index, slot, packed, parent)


def _parses(raw: bytes) -> dict[str, str]:
    if STARVES.encode() in raw and not _parsed[0]:
        _parsed[0] = True
        raise MemoryError
    parsed: dict[str, str] = _parse(raw)
    return parsed


def main() -> None:
    """Be the command line, with less memory."""
    PrefixIndex.store = _stores  # type: ignore[method-assign, assignment]
    Client._parse_header_lines = staticmethod(_parses)  # type: ignore[method-assign]
    from kvplane.services.cli import main as command_line  # noqa: PLC0415

    command_line()


if __name__ == "__main__":
    main()
