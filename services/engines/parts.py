"""Names of the fleet's blocks of which one larger block of an engine's slower tier consists. Pure.

The last one has the engine's own name, since what follows refers to its end; the others have names that are made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplane.events.types import EngineHash

_MARK = b"/part"


def part(name: EngineHash, at: int) -> bytes:
    """Name of one of the first blocks, counted from 0."""
    return b"%b%b%d" % (name if isinstance(name, bytes) else b"%d" % name, _MARK, at)


def parts(name: EngineHash, count: int) -> list[EngineHash]:
    """Names of all `count` blocks, in order."""
    return [*(part(name, at) for at in range(count - 1)), name]


def parts_named(names: Iterable[EngineHash]) -> int:
    """Of how many blocks the largest consists that has such names; 0 where none has."""
    numbers = [name.rpartition(_MARK)[2] for name in names if isinstance(name, bytes) and _MARK in name]
    return max((int(number) + 2 for number in numbers if number.isdigit() and len(number) < 6), default=0)
