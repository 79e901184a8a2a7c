"""Values of a result in words: an interval is read back by SQL as the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import pytest

from kvplane.services.history.plain import plain

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        yield made


@pytest.mark.parametrize(
    "interval",
    [
        "14 months 3 days 04:05:06.789",
        "-1 day -02:00:00",
        "0 days",
        "-15 months",
        "100 hours",
        "1 month",
        "0.000001 s",
        "-1.5 s",
    ],
)
@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_an_interval_is_read_back_by_sql_as_the_same(
    connection: duckdb.DuckDBPyConnection, interval: str, form: str
) -> None:
    given = f"INTERVAL '{interval}'"
    relation = connection.sql(f"SELECT {form.format(given)} AS it")
    assert relation is not None
    found = plain(relation.to_arrow_table().to_pylist()[0]["it"])
    text = found if form == "{}" else found[0]
    assert connection.execute(f"SELECT INTERVAL '{text}' = {given}").fetchall() == [(True,)]
