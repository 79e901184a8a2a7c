"""Values of a result as JSON and MessagePack can say them."""

from __future__ import annotations

import math
from datetime import date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from typing import Any
from uuid import UUID


def plain(value: Any) -> Any:  # noqa: ANN401 - any value of a result
    """A value as JSON and MessagePack can say it: times in ISO 8601, bytes in hex, what has no number as null."""
    match value:
        case None | bool() | str():
            return value
        case (int() as months, int() as days, int() as nanoseconds) if hasattr(value, "nanoseconds"):
            return _interval(months, days, nanoseconds)
        case int():
            return value if -(1 << 63) <= value < 1 << 64 else str(value)
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            if value == value.to_integral_value():
                return plain(int(value))
            return float(value) if Decimal(repr(float(value))) == value else str(value)
        case datetime() | date() | clock():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return value.hex()
        case UUID():
            return str(value)
        case list() | tuple():
            return [plain(part) for part in value]
        case dict():
            return {str(key): plain(part) for key, part in value.items()}
    return str(value)


def _interval(months: int, days: int, nanoseconds: int) -> str:
    """An interval in the words that SQL reads: `1 month 3 days 04:05:06.5`. Its parts have no common unit."""
    words = [
        f"{count} {unit}{'' if abs(count) == 1 else 's'}" for count, unit in ((months, "month"), (days, "day")) if count
    ]
    if nanoseconds or not words:
        seconds, rest = divmod(abs(nanoseconds), 10**9)
        point = f".{rest:09}".rstrip("0") if rest else ""
        sign = "-" if nanoseconds < 0 else ""
        words.append(f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}")
    return " ".join(words)


WIDEST = 1 << 53
"""Above it, the numbers of most readers of JSON are not exact."""


def exact(value: Any) -> Any:  # noqa: ANN401 - any value of a result
    """A value as every reader of JSON reads it without loss: integers beyond 2^53 are strings of their digits."""
    match plain(value):
        case bool() as found:
            return found
        case int() as found:
            return found if -WIDEST <= found <= WIDEST else str(found)
        case list() as found:
            return [exact(part) for part in found]
        case dict() as found:
            return {key: exact(part) for key, part in found.items()}
        case found:
            return found
