"""Every type of DuckDB in every form of `kvplane sql`: right, or refused with the cast that helps."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet
import pytest

from kvplane.services.cli.sql import choose
from kvplane.services.history.plain import exact, plain
from kvplane.services.history.query import Queries
from kvplane.services.history.values import rows_of
from kvplane.services.protocol.errors import BadRequest, BadSql

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from duckdb import DuckDBPyConnection


class Case(NamedTuple):
    """An expression, what JSON says of it, and what CSV does where that is something else than the same in a string."""

    sql: str
    json: Any
    csv: str | None = None
    parquet: bool = True
    """Whether Parquet has a form for it."""
    read: str = ""
    """What is read back, if that is another type."""


HUGE = "170141183460469231731687303715884105727"
CASES = [
    Case("NULL", None, ""),
    Case("true", json=True),
    Case("(-128)::TINYINT", -128),
    Case("255::UTINYINT", 255),
    Case("-1::SMALLINT", -1),
    Case("65535::USMALLINT", 65535),
    Case("-1::INTEGER", -1),
    Case("4294967295::UINTEGER", 4294967295),
    Case("9223372036854775807::BIGINT", "9223372036854775807"),
    Case("18446744073709551615::UBIGINT", "18446744073709551615"),
    Case(f"{HUGE}::HUGEINT", HUGE),
    Case("sum(9223372036854775807)", "9223372036854775807", read="9223372036854775807"),
    Case("md5_number('x')", "221188521546444818284084528980898927773"),
    Case("123456789012345678901234567890::BIGNUM", "123456789012345678901234567890"),
    Case("1.5::FLOAT", 1.5),
    Case("'nan'::DOUBLE", None, "nan"),
    Case("'-infinity'::DOUBLE", None, "-inf"),
    Case("1.10::DECIMAL(4,2)", 1.1, "1.10"),
    Case("12345678901234567890.123456789::DECIMAL(38,9)", "12345678901234567890.123456789"),
    Case("''", ""),
    Case("""'a,b"c'""", 'a,b"c'),
    Case("""'{"a":1}'::JSON""", '{"a":1}'),
    Case("'a'::ENUM('a','b')", "a"),
    Case("'eeccb8c5-9943-b2bb-bb5e-222f4e14b687'::UUID", "eeccb8c5-9943-b2bb-bb5e-222f4e14b687"),
    Case(r"'\x00\xff'::BLOB", "00ff"),
    Case("'0101'::BIT", "0101"),
    Case("'POINT(1 2)'::GEOMETRY", "POINT (1 2)"),
    Case("'1'::VARIANT", "1"),
    Case("get_type(1)", "INTEGER"),
    Case("DATE '2026-01-02'", "2026-01-02"),
    Case("DATE '10000-01-01'", "10000-01-01"),
    Case("'0044-03-15 (BC)'::DATE", "0044-03-15 (BC)"),
    Case("'0001-01-01'::DATE", "0001-01-01"),
    Case("'infinity'::DATE", "infinity"),
    Case("TIME '04:05:06.789012'", "04:05:06.789012"),
    Case("TIME '24:00:00'", "24:00:00"),
    Case("'01:02:03.123456789'::TIME_NS", "01:02:03.123456789"),
    Case("'04:05:06-15:59:59'::TIMETZ", "04:05:06-15:59:59"),
    Case("TIMESTAMP '2026-01-02 03:04:05.678901'", "2026-01-02T03:04:05.678901", "2026-01-02 03:04:05.678901"),
    Case("'infinity'::TIMESTAMP", "infinity"),
    Case("'-infinity'::TIMESTAMP", "-infinity"),
    Case("'10000-01-01'::TIMESTAMP", "10000-01-01T00:00:00"),
    Case("'290309-12-22 (BC) 00:00:00'::TIMESTAMP", "290309-12-22 (BC) 00:00:00"),
    Case("'2026-01-02 03:04:05'::TIMESTAMP_S", "2026-01-02T03:04:05", "2026-01-02 03:04:05"),
    Case("'infinity'::TIMESTAMP_S", "infinity", parquet=False),
    Case("'2026-01-02 03:04:05.123'::TIMESTAMP_MS", "2026-01-02T03:04:05.123000", "2026-01-02 03:04:05.123"),
    Case("'infinity'::TIMESTAMP_MS", "infinity"),
    Case(
        "'2026-01-02 03:04:05.123456789'::TIMESTAMP_NS", "2026-01-02T03:04:05.123456789", "2026-01-02 03:04:05.123456789"
    ),
    Case("'infinity'::TIMESTAMP_NS", "infinity"),
    Case("'2026-01-02 03:04:05+02'::TIMESTAMPTZ", "2026-01-02T01:04:05+00:00", "2026-01-02 01:04:05.000000+0000"),
    Case("'infinity'::TIMESTAMPTZ", "infinity"),
    Case(
        "'2026-01-02 03:04:05.123456789+02'::TIMESTAMPTZ_NS", "2026-01-02T01:04:05.123456789+00:00",
        "2026-01-02 01:04:05.123456789+0000",
    ),
    Case("TIMESTAMP '2026-01-02 12:00' - TIMESTAMP '2026-01-01'", "1 day 12:00:00"),
    Case("INTERVAL '1 month 2 days 1.5 s'", "1 month 2 days 00:00:01.5"),
    Case("[1,2,NULL]", [1, 2, None]),
    Case("[]", []),
    Case("[[1],[2]]", [[1], [2]]),
    Case("[1,2]::INTEGER[2]", [1, 2]),
    Case("[INTERVAL '1 day']", ["1 day"], parquet=False),
    Case("['infinity'::TIMESTAMP, NULL]", ["infinity", None]),
    Case("['04:05:06+02:00'::TIMETZ]", ["04:05:06+02"]),
    Case("['0101'::BIT]::BIT[1]", ["0101"]),
    Case("[TIME '24:00:00']", ["24:00:00"]),
    Case("{'a':1,'b':'x'}", {"a": 1, "b": "x"}),
    Case("{'a':INTERVAL '1 day'}", {"a": "1 day"}, parquet=False),
    Case("""{'a "b': [md5_number('x')]}""", {'a "b': ["221188521546444818284084528980898927773"]}),
    Case("{'a':'x'::BLOB}", {"a": "78"}),
    Case("row(1,2)", {"element1": 1, "element2": 2}, read="{'element1':1,'element2':2}"),
    Case("MAP {'k':1}", [["k", 1]]),
    Case("MAP {'k':'infinity'::DATE}", [["k", "infinity"]]),
    Case("MAP {'k':'01'::BIT}", [["k", "01"]]),
    Case("union_value(num := 2)", 2, "2", parquet=False),
    Case("union_value(d := 'infinity'::DATE)", "infinity", '"infinity"', parquet=False),
]  # fmt: skip
"""Types, and in the last places values that Python's own types do not have."""


@pytest.fixture(scope="module")
def connection() -> Iterator[DuckDBPyConnection]:
    with duckdb.connect(config={"threads": 1}) as made:
        yield made


@pytest.fixture(scope="module")
def queries(connection: DuckDBPyConnection) -> Queries:
    return Queries(connection)


def result(queries: Queries, select: str) -> pa.Table:
    answer = queries.run(f"SELECT {select}", seconds=60, rows=9)
    schema = answer.schema
    return pa.Table.from_batches(list(answer), schema)


def written(table: pa.Table, capsys: pytest.CaptureFixture[str], **form: Any) -> str:
    """What a form makes of a table."""
    capsys.readouterr()
    with choose(**{"json": False, "csv": False, "parquet": None, "arrow": None, **form})(table.schema) as take:
        take(table)
    return capsys.readouterr().out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.sql)
def test_a_type_in_every_form(
    connection: DuckDBPyConnection, queries: Queries, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = result(queries, f"{case.sql} AS it")
    assert json.loads(written(table, capsys, json=True)) == {"it": case.json}
    ((value,),) = rows_of(table.to_batches()[0])
    assert exact(plain(value)) == case.json
    nested = isinstance(case.json, list | dict)
    text = case.json if isinstance(case.json, str) else json.dumps(case.json, separators=(",", ":"))
    assert csv_of(written(table, capsys, csv=True)) == ["it", text if case.csv is None else case.csv]
    # As a terminal or a pipe has it; what is nested is written otherwise there.
    lines = written(table, capsys).splitlines()
    assert lines[1:] == ([case.csv] if case.json is None else [text]) or nested
    # Read back by DuckDB it is the same value.
    for form, parquet in (("arrow", False), ("parquet", True)):
        path = tmp_path / form
        if parquet and not case.parquet:
            with pytest.raises(BadRequest, match=r"Parquet.*give it::VARCHAR instead"):
                written(table, capsys, parquet=path)
            assert not list(tmp_path.glob("parquet*"))
            continue
        written(table, capsys, **{form: path})
        read = pa.parquet.ParquetFile(path).read() if parquet else pa.ipc.open_file(path).read_all()
        connection.register("read", read)
        same = f"SELECT it::VARCHAR IS NOT DISTINCT FROM ({case.read or case.sql})::VARCHAR FROM read"
        assert connection.sql(same).fetchall() == [(True,)]


def csv_of(text: str) -> list[str]:
    """The only column of some CSV, with its name; a line that is empty is a null."""
    return ["".join(line) for line in csv.reader(io.StringIO(text))]


def test_what_is_too_deep_for_any_form_is_refused_with_the_cast(queries: Queries) -> None:
    for inside in ("union_value(u := '04:05:06+02'::TIMETZ)", "row(1, md5_number('x'))"):
        with pytest.raises(BadSql, match="column 'it' is a .*: give it::VARCHAR instead"):
            result(queries, f"{inside} AS it")


def test_of_two_columns_of_one_name_none_is_lost_in_silence(
    queries: Queries, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = result(queries, "1 AS a, md5_number('x') AS a")
    for form in ({"json": True}, {"parquet": tmp_path / "it"}):
        with pytest.raises(BadRequest, match=r"two columns are called 'a'.*name them with AS"):
            written(table, capsys, **form)
    both = ["1", "221188521546444818284084528980898927773"]
    assert list(csv.reader(io.StringIO(written(table, capsys, csv=True)))) == [["a", "a"], both]
    assert written(table, capsys).splitlines()[1].split("\t") == both
    written(table, capsys, arrow=tmp_path / "it")
    assert pa.ipc.open_file(tmp_path / "it").read_all().column_names == ["a", "a"]
