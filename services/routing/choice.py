"""How a policy and its parameters are written, everywhere: `policy:name=value,name=value`.

The policy may be `module:attr`, so what follows the last colon are parameters only if an equals sign is in it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msgspec import Struct

from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable


class Choice(Struct, frozen=True):
    """A policy with parameters, as it was written."""

    text: str
    policy: str
    parameters: dict[str, float]


def parse(text: str, *more: str) -> Choice:
    """Read `policy`, `policy:name=value,name=value` or the same with `module:attr`. Raises `BadRequest`.

    `more` are further parameters that were written apart. Whether there is such a policy and whether it has these parameters
    is not looked at.
    """
    policy, colon, last = text.rpartition(":")
    given = last.split(",") if colon and "=" in last else []
    whole = " ".join((text, *more))
    for words in more:
        given += words.split(",")
    return Choice(whole, policy if colon and "=" in last else text, _pairs(given, whole))


def _pairs(given: Iterable[str], whole: str) -> dict[str, float]:
    """Read each `name=value`; `whole` is the text that they stand in. Raises `BadRequest`."""
    found: dict[str, float] = {}
    for pair in given:
        name, equals, number = pair.partition("=")
        try:
            value = float(number) if equals and name else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BadRequest(f"{pair!r} in {whole!r} is no parameter; write name=number, as in ttft:crowd_weight=4")
        if name in found:
            raise BadRequest(f"{whole!r} gives {name} twice")
        found[name] = value
    return found
