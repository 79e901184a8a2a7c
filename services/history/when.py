"""Moments as people write them: the one reading of `--at`, `--since`, `--until`, `--from` and of both moments of `diff`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta

from kvplane.services.protocol.errors import BadRequest

FORMS = (
    "a sequence, a time such as 2026-01-31T12:00 (UTC) or 2026-01-31T12:00+02:00, a date, yesterday, today, now, or how long "
    "ago: 10m, 2h, 3d"
)
"""What may be written, for the sentence of an error."""
_UNITS = {"s": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PART = r"(\d{1,9}(?:\.\d{1,9})?)\s*(min|[smhdw])"
_AGO = re.compile(rf"-?\s*((?:{_PART}\s*)+)(?:\s+ago)?", re.ASCII)
_SEQUENCE = re.compile(r"\d{1,20}|\d{1,3}(?:,\d{3})+", re.ASCII)
_LOCAL = re.compile(r"\s*local$", re.IGNORECASE)
_ZONE = re.compile(r"(UTC|Z|[+-]\d\d(:?\d\d)?)$")
_DAYS = {"today": 0, "yesterday": 1}


def resolved(text: str, now: datetime) -> str:
    """A moment that ends in `local`, with this machine's zone; any other as it is. For who asks a historian elsewhere.

    `now` is a time without a zone, as the clock here shows it.
    """
    given = _LOCAL.sub("", text.strip())
    if given == text.strip():
        return text
    try:
        day = _DAYS.get(given.lower())
        found = (
            datetime.fromisoformat(given) if day is None else datetime.combine(now.date() - timedelta(days=day), time())
        )
        return found.astimezone(UTC).isoformat() if found.tzinfo is None else text
    except (ValueError, OverflowError):
        return text


def read_as(text: str, now: datetime) -> str:
    """How a time was read, for those who may have meant another zone; empty for a sequence. Raises `BadRequest`."""
    found = when(text, now)
    if isinstance(found, int):
        return ""
    given = text.strip()
    said = f"{found:%Y-%m-%d %H:%M:%S} UTC"
    if given.lower() == "now" or _AGO.fullmatch(given.lower()) or (len(given) > 10 and _ZONE.search(given)):
        return said
    return f"{said}, since no zone is given; write +02:00 or local behind it for another"


def when(text: str, now: datetime) -> int | datetime:
    """A moment: a sequence, or a time in UTC without a zone, as the history's times are. Raises `BadRequest`.

    A day means its beginning in UTC. `now` has a zone; what is relative counts from it.
    """
    given = text.strip()
    if _SEQUENCE.fullmatch(given) and int(given.replace(",", "")) < 1 << 64:
        return int(given.replace(",", ""))
    clock = now.astimezone(UTC).replace(tzinfo=None)
    word = given.lower()
    if word == "now":
        return clock
    if word in _DAYS:
        return datetime.combine(clock.date() - timedelta(days=_DAYS[word]), time())
    try:
        if given.isdigit():
            raise ValueError(given)  # noqa: TRY301 - of digits alone, `fromisoformat` makes a time
        if _AGO.fullmatch(word):
            parts = re.findall(_PART, word)
            return clock - sum((timedelta(**{_UNITS[unit]: float(count)}) for count, unit in parts), timedelta())
        found = datetime.fromisoformat(re.sub(r"\s*UTC$", "+00:00", given))
        return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise BadRequest(f"{text[:60]!r} is no moment; write {FORMS}") from None
