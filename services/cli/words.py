"""Values as people read them: no form of Python's own, one form of hashes (hex), of times (UTC) and of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from kvplane.events.hashing import format_hash


def words(value: object) -> str:
    """A value of an answer. Numbers have their thousands apart, what is empty is `none`."""
    match value:
        case None | "":
            return "none"
        case str():
            return value
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case Mapping():
            return ", ".join(f"{key} {words(part)}" for key, part in value.items()) or "none"
        case Sequence():
            return ", ".join(map(words, value)) or "none"
    return str(value)


def field(value: object) -> str:
    """A value in a line of `name=value`: without spaces, or quoted."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            plain = value and not any(each.isspace() or each == '"' for each in value)
            return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case Mapping():
            return "{" + ",".join(f"{field(key)}:{field(part)}" for key, part in value.items()) + "}"
        case Sequence():
            return "[" + ",".join(map(field, value)) + "]"
    return str(value)


def hashes(values: Sequence[str]) -> str:
    """Hashes in short: how many, and the first and the last one in full."""
    return values[0] if len(values) == 1 else f"{len(values)}:{values[0]}..{values[-1]}"


def hexadecimal(value: object) -> object:
    """Block hashes of a row, numbers there, as they are written everywhere."""
    match value:
        case int():
            return format_hash(value)
        case list():
            return [hexadecimal(part) for part in value]
    return value


def moment(nanoseconds: int) -> str:
    """A time of the log, to the millisecond."""
    return f"{datetime.fromtimestamp(nanoseconds / 1e9, UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def here() -> datetime:
    """The time that the clock of this machine shows, in its zone."""
    return datetime.now(UTC).astimezone().replace(tzinfo=None)


def seconds(value: float) -> str:
    """A duration. All of them are in seconds."""
    return f"{value:,.3f} s"
