"""Attacks on the read-only questions: what they may cost, and what the writer feels of it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pytest

from kvplane.services.history.query import Queries, Result
from kvplane.services.history.watch import resident
from kvplane.services.protocol.errors import BadRequest, BadSql, DatabaseFailed, QueryLimit
from tests.support.closed_database import Ground

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = "SELECT sum(hash(a.range * b.range)) FROM range(3000000) a, range(2000000) b"
ENDLESS = "SELECT range AS i, 'abcdefgh' || range AS s FROM range(100000000000)"


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    made = Ground(tmp_path)
    yield made
    made.close()


def run_begins(ground: Ground) -> None:
    """Return when a query is being worked on."""
    while not ground.queries.watch._deadlines:
        time.sleep(0.001)


def exhaust(result: Result) -> int:
    with result:
        return sum(batch.num_rows for batch in result)


@pytest.mark.parametrize("sql", [LONG, ENDLESS, "SELECT count(*) FROM range(100000000000) WHERE hash(range) % 7 = 3"])
def test_time_is_limited(ground: Ground, sql: str) -> None:
    began = time.monotonic()
    with pytest.raises(QueryLimit, match="stopped after 0.5 s: raise the limit with --timeout") as caught:
        exhaust(ground.queries.run(sql, seconds=0.5, rows=10**12))
    assert caught.value.code == "time_limit"
    assert time.monotonic() - began < 5


def test_time_between_pages_does_not_count(ground: Ground) -> None:
    with ground.queries.run(ENDLESS, seconds=1, rows=10**12) as result:
        first = next(result)
        time.sleep(1.3)
        assert next(result)["i"][0].as_py() == first.num_rows


def test_memory_is_limited_and_the_writer_goes_on(tmp_path: Path) -> None:
    ground = Ground(tmp_path, memory="100MB", spill="20MB")
    for sql in (
        "SELECT list(range) FROM range(300000000)",
        "SELECT DISTINCT 'x' || range FROM range(300000000)",
        "SELECT * FROM range(300000000) ORDER BY hash(range)",
    ):
        with pytest.raises(QueryLimit) as caught:
            ground.ask(sql, seconds=60)
        assert caught.value.code == "memory_limit"
        assert "MiB" in str(caught.value)
        assert "SET" not in str(caught.value)
        ground.writer.execute("INSERT INTO t VALUES (1, 'x')")
    assert ground.ask("SELECT count(*) AS n FROM t") == [{"n": 1003}]
    ground.close()


def test_rows_are_limited_and_it_is_said(ground: Ground) -> None:
    with ground.queries.run("SELECT i FROM t ORDER BY i", seconds=5, rows=10) as result:
        assert [row["i"] for batch in result for row in batch.to_pylist()] == list(range(10))
    assert result.limit is not None
    assert result.limit.code == "row_limit"
    with ground.queries.run("FROM t", seconds=5, rows=1000) as result:
        assert sum(batch.num_rows for batch in result) == 1000
    assert result.limit is None
    with ground.queries.run("FROM range(4096)", seconds=5, rows=2048) as result:
        assert sum(batch.num_rows for batch in result) == 2048
    assert result.limit is not None


def test_a_long_answer_streams(ground: Ground) -> None:
    before = resident()
    rows = 0
    with ground.queries.run(
        "SELECT range AS i, range * 2 AS j, 'abcdefgh' AS s FROM range(100000000)", seconds=60, rows=10**9
    ) as it:
        for batch in it:
            rows += batch.num_rows
            if rows > 5_000_000:
                break
    assert resident() - before < 150 << 20


def test_batches_are_bounded_down_to_a_row(ground: Ground) -> None:
    sql = "SELECT i, array_to_string(list_transform([1, 2, 3, 4, 5, 6, 7], lambda x: s || i || md5('x')), ',') AS s FROM t"
    with ground.queries.run(sql, seconds=5, rows=10**6, page_bytes=20_000) as result:
        batches = list(result)
    assert [value for batch in batches for value in batch["i"].to_pylist()] == list(range(1000))
    assert len(batches) > 10
    assert max(pa.ipc.get_record_batch_size(batch) for batch in batches) <= 20_000
    with ground.queries.run("SELECT md5(i::VARCHAR) AS s FROM t", seconds=5, rows=10**6, page_bytes=1) as result:
        assert {batch.num_rows for batch in result} == {1}
    result = ground.queries.run("SELECT md5('x')", seconds=5, rows=10, page_bytes=1, row_bytes=50)
    with pytest.raises(QueryLimit, match="one row has"):
        next(result)
    assert ground.ask("SELECT 1 AS a") == [{"a": 1}]


def test_the_schema_is_known_before_rows(ground: Ground) -> None:
    with ground.queries.run("SELECT i, s FROM t WHERE false", seconds=5, rows=10) as result:
        assert result.schema == pa.schema([("i", pa.int64()), ("s", pa.string())])
        assert list(result) == []


def test_places_are_few_and_given_back(ground: Ground) -> None:
    queries = Queries(ground.writer, concurrent=2)
    held = [queries.run(ENDLESS, seconds=5, rows=10**9) for _ in range(2)]
    next(held[0])
    with pytest.raises(QueryLimit) as caught:
        queries.run("SELECT 1", seconds=5, rows=1)
    assert caught.value.code == "busy"
    held[0].close()
    held[0].close()
    for _ in range(20):
        with pytest.raises(BadSql):
            queries.run("FROM nosuch", seconds=5, rows=1)
        assert len(list(queries.run("SELECT 1", seconds=5, rows=1))) == 1
    with pytest.raises(BadRequest, match="closed"):
        next(held[0])
    queries.close()
    with pytest.raises(BadRequest, match="closed"):
        next(held[1])


def test_closing_from_another_thread_stops_the_work(ground: Ground) -> None:
    opened: list[Result] = []
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            opened.append(ground.queries.run("SELECT 1 UNION ALL " + LONG, seconds=60, rows=10))
            for _ in opened[0]:
                pass
        except BaseException as error:  # noqa: BLE001
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    run_begins(ground)
    began = time.monotonic()
    ground.queries.close()
    reader.join(10)
    assert not reader.is_alive()
    assert time.monotonic() - began < 5
    assert isinstance(outcome[0], BadRequest)


def test_closing_does_not_wait_for_what_duckdb_computes_meanwhile(ground: Ground) -> None:
    """Now and then the first batch is there at once, and the next one is computed while nobody asks for it."""
    begun = 0
    for _ in range(100):
        opened: list[Result] = []

        def run(opened: list[Result] = opened) -> None:
            with suppress(QueryLimit):
                opened.append(ground.queries.run("SELECT 1 UNION ALL " + LONG, seconds=60, rows=10))

        runner = threading.Thread(target=run)
        runner.start()
        runner.join(0.03)
        while not opened and runner.is_alive():
            ground.queries.watch.stop("time")
            runner.join(0.01)
        if opened:
            begun += 1
            closer = threading.Thread(target=opened[0].close, daemon=True)
            closer.start()
            closer.join(20)
            assert not closer.is_alive()
        if begun == 10:
            break


def test_the_writer_commits_while_a_query_runs_and_a_reader_sees_one_moment(ground: Ground) -> None:
    commits = 0
    stop = threading.Event()

    def write() -> None:
        nonlocal commits
        cursor = ground.writer.cursor()
        while not stop.is_set():
            cursor.execute("BEGIN")
            cursor.execute("INSERT INTO t SELECT 1000000 + range, 'w' FROM range(100)")
            cursor.execute("COMMIT")
            commits += 1

    held = ground.queries.run("FROM t CROSS JOIN range(400) ORDER BY ALL", seconds=60, rows=10**9)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(QueryLimit):
            ground.ask(LONG, seconds=2)
        seen = sum(batch.num_rows for batch in held)
        pairs = ground.ask("SELECT count(*) AS a, (SELECT count(*) FROM t WHERE s = 'w') AS b FROM t")
    finally:
        stop.set()
        writer.join()
    assert commits > 20
    assert seen == 400_000
    assert pairs[0]["a"] - pairs[0]["b"] == 1000
    assert pairs[0]["b"] % 100 == 0
    assert ground.ask("SELECT count(*) AS n FROM t") == [{"n": 1000 + 100 * commits}]


def test_failures_of_duckdb_are_told_apart(ground: Ground) -> None:
    fault = ground.queries.fault
    assert isinstance(fault(duckdb.FatalException("FATAL Error: gone")), DatabaseFailed)
    assert isinstance(fault(OSError("FATAL Error: gone")), DatabaseFailed)
    survived = fault(duckdb.InternalException("INTERNAL Error: assertion"))
    assert not isinstance(survived, DatabaseFailed)
    assert "fault of its own" in str(survived)
    assert fault(OSError("Out of Memory Error: x")).code == "memory_limit"
    assert fault(OSError("Conversion Error: bad\n\nPossible solutions: SET")).code == "bad_sql"
    assert "SET" not in str(fault(OSError("Conversion Error: bad\n\nPossible solutions: SET")))
    ground.queries.close()
    assert isinstance(fault(duckdb.InternalException("INTERNAL Error: assertion")), DatabaseFailed)
