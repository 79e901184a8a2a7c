"""Columns of a result on their way: what Arrow can't carry is made text before, what Python's own types can't hold after.

DuckDB hands some types on as others, in silence: an unsigned HUGEINT as a signed one, TIMETZ without its offset, BIT as bytes.
Python has no dates beyond the year 9999, no infinite ones, no 24:00 and no nanoseconds.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute
from duckdb.sqltypes import DuckDBPyType

from kvplane.services.protocol.errors import BadSql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from duckdb import DuckDBPyRelation

LOST = {"uhugeint", "bignum", "bit", "time with time zone", "geometry", "variant", "type"}
"""Types that become others in Arrow, or none."""
_NESTED = {"list", "array", "map", "struct", "tuple", "union"}
_DAY = 86_400
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
_EPOCH = date(1970, 1, 1).toordinal()
_INFINITE = (1 << 63) - 1
_CYCLE = 146_097
"""Days of 400 years."""


def carried(relation: DuckDBPyRelation) -> DuckDBPyRelation:
    """The relation with what Arrow can't carry as text. Raises `BadSql` where that is too deep inside a column."""
    types = [_carried(name, kind, kind) for name, kind in zip(relation.columns, relation.types, strict=True)]
    if not any(types):
        return relation
    return relation.project(
        ", ".join(
            f"#{place}{'::' if kind else ''}{kind} AS {_quoted(name)}"
            for place, (name, kind) in enumerate(zip(relation.columns, types, strict=True), 1)
        )
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _carried(column: str, kind: DuckDBPyType, inside: DuckDBPyType) -> str:
    """The type to cast to, empty where none is needed."""
    name = inside.id
    if str(inside).lower() in LOST or name in LOST:
        return "VARCHAR"
    if name not in _NESTED:
        return ""
    # A union's first part is its tag, and has no name; an array's last one is a number.
    parts = [
        (key, part) for key, part in inside.children if isinstance(part, DuckDBPyType) and (key or name != "union")
    ]
    found = [_carried(column, kind, part) for _, part in parts]
    if not any(found):
        return ""
    whole = [new or str(part) for new, (_, part) in zip(found, parts, strict=True)]
    match name:
        case "list":
            return f"{whole[0]}[]"
        case "array":
            return f"{whole[0]}[{dict(inside.children)['size']}]"
        case "map":
            return f"MAP({', '.join(whole)})"
        case "struct":
            return f"STRUCT({', '.join(f'{_quoted(key)} {new}' for (key, _), new in zip(parts, whole, strict=True))})"
    raise BadSql(f"column {column!r} is a {kind}, which no result can carry: give {column}::VARCHAR instead")


def rows_of(batch: pa.RecordBatch | pa.Table) -> Iterable[tuple[Any, ...]]:
    """Rows as values of Python; two columns may have one name."""
    return zip(*(values(column) for column in batch.columns), strict=True) if batch.num_columns else ()


def values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A column as values of Python; of times, text where Python has no such value."""
    if not holds(column.type, pa.types.is_time64):
        try:
            found: list[Any] = column.to_pylist()
        except (OverflowError, ValueError):
            pass
        else:
            return found
    return [_value(scalar) for scalar in column]


def far(column: pa.ChunkedArray) -> bool:
    """Whether a column of times has some that are infinite, or not between the years 1 and 9999, or 24:00."""
    kind = column.type
    if not (pa.types.is_date32(kind) or pa.types.is_timestamp(kind) or pa.types.is_time(kind)):
        return False
    ints = column.cast(pa.int32() if pa.types.is_date32(kind) or pa.types.is_time32(kind) else pa.int64())
    ends = pa.compute.min_max(ints).as_py()
    if ends["min"] is None:
        return False
    if pa.types.is_time(kind):
        return bool(ends["max"] >= _DAY * _PER_SECOND[kind.unit])
    if _INFINITE in {ends["max"], -ends["min"]}:
        return True
    unit = 1 if pa.types.is_date32(kind) else _DAY * _PER_SECOND[kind.unit]
    return not ((1 - _EPOCH) * unit <= ends["min"] and ends["max"] <= (date.max.toordinal() - _EPOCH + 1) * unit - 1)


def holds(kind: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is one that `test` knows, or has one inside."""
    if test(kind):
        return True
    return any(holds(kind.field(place).type, test) for place in range(kind.num_fields))


def _value(scalar: Any) -> Any:  # noqa: ANN401 - any value of a result
    """A scalar of Arrow as a value of Python, text where there is none."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_map(kind):
        return [(_value(pair[0]), _value(pair[1])) for pair in scalar.values]
    if pa.types.is_struct(kind):
        return {kind.field(place).name: _value(scalar[place]) for place in range(kind.num_fields)}
    if pa.types.is_union(kind):
        return _value(scalar.value)
    if pa.types.is_nested(kind):
        return [_value(part) for part in scalar.values]
    if pa.types.is_date32(kind):
        return _moment(scalar.value * _DAY, "s", alone=True)
    if pa.types.is_timestamp(kind):
        return _moment(scalar.value, kind.unit, zone=kind.tz is not None)
    if pa.types.is_time(kind):
        return _clock(scalar.value, kind.unit)
    return scalar.as_py()


def _clock(value: int, unit: str) -> time | str:
    seconds, rest = divmod(value, _PER_SECOND[unit])
    if seconds < _DAY and (micros := _micros(rest, unit)) is not None:
        return time(seconds // 3600, seconds // 60 % 60, seconds % 60, micros)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{_fraction(rest, unit)}"


def _micros(rest: int, unit: str) -> int | None:
    """Parts of a second in microseconds; none when they have more digits."""
    if unit != "ns":
        return rest * 1_000_000 // _PER_SECOND[unit]
    return None if rest % 1_000 else rest // 1_000


def _fraction(rest: int, unit: str) -> str:
    return f".{rest:0{_DIGITS[unit]}}" if rest else ""


def _moment(value: int, unit: str, *, alone: bool = False, zone: bool = False) -> date | datetime | str:
    """A date or time, `alone` without the time of day; as DuckDB writes it where Python has none."""
    infinite = ((1 << 31) - 1) * _DAY if alone else _INFINITE
    if abs(value) == infinite:
        return "infinity" if value > 0 else "-infinity"
    seconds, rest = divmod(value, _PER_SECOND[unit])
    days, second = divmod(seconds, _DAY)
    micros = _micros(rest, unit)
    if micros is not None and 1 <= days + _EPOCH <= date.max.toordinal():
        day = date.fromordinal(days + _EPOCH)
        if alone:
            return day
        found = datetime(day.year, day.month, day.day, tzinfo=UTC if zone else None)
        return found + timedelta(seconds=second, microseconds=micros)
    # The calendar repeats itself.
    cycles, at = divmod(days + _EPOCH - 1, _CYCLE)
    day = date.fromordinal(at + 1)
    year = day.year + 400 * cycles
    text = f"{year if year > 0 else 1 - year:04}-{day.month:02}-{day.day:02}"
    if alone:
        return text if year > 0 else f"{text} (BC)"
    clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}{_fraction(rest, unit)}"
    if year > 0:
        return f"{text}T{clock}{'+00:00' if zone else ''}"
    return f"{text} (BC) {clock}{'+00' if zone else ''}"
