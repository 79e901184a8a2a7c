"""Attacks on the read-only questions: what may be asked, what it may cost, and what the writer feels of it."""

from __future__ import annotations

import hashlib
import threading
import time
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pytest

from services.errors import BadRequest, BadSql, DatabaseFailed, QueryLimit, ServiceFault
from services.history.query import Queries, Result, harden
from services.history.watch import resident

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = "SELECT sum(hash(a.range * b.range)) FROM range(3000000) a, range(2000000) b"
ENDLESS = "SELECT range AS i, 'abcdefgh' || range AS s FROM range(100000000000)"


class Ground:
    """A database with an archive, closed down, and things beside it that nobody may reach."""

    def __init__(self, root: Path, *, memory: str = "200MB", spill: str = "100MB") -> None:
        self.root = root
        self.archive = root / "archive"
        self.temporary = root / "tmp"
        for path in (self.archive, root / "archive2", root / "out"):
            path.mkdir()
        for path in (root, self.archive, root / "archive2"):
            (path / "secret.csv").write_text("a\nsecret\n")
        (self.archive / "link.csv").symlink_to(root / "secret.csv")
        (self.archive / "away").symlink_to(root / "out")
        self.writer = duckdb.connect(str(root / "history.duckdb"))
        harden(self.writer, self.archive, temporary=self.temporary, memory=memory, threads=2, spill=spill)
        self.writer.execute("CREATE TABLE t AS SELECT range AS i, 'n' || range % 3 AS s FROM range(1000)")
        self.writer.execute("CREATE SEQUENCE numbers")
        self.writer.execute(f"COPY t TO '{self.archive}/day.parquet'")
        self.writer.execute(f"CREATE VIEW v AS SELECT * FROM read_parquet(['{self.archive}/day.parquet'])")
        self.writer.execute("CREATE MACRO twice(x) AS 2 * x")
        self.queries = Queries(self.writer, hidden=[root])

    def ask(self, sql: str, *, seconds: float = 20, rows: int = 100_000, parameters: Any = ()) -> list[dict[str, Any]]:
        with self.queries.run(sql, seconds=seconds, rows=rows, parameters=parameters) as result:
            return [row for batch in result for row in batch.to_pylist()]

    def content(self) -> tuple[object, ...]:
        """All that a statement could have changed."""
        objects = self.writer.execute(
            "SELECT schema_name, table_name FROM duckdb_tables() UNION ALL SELECT schema_name, view_name FROM duckdb_views() "
            "WHERE NOT internal UNION ALL SELECT 'db', database_name FROM duckdb_databases() UNION ALL "
            "SELECT 'secret', name FROM duckdb_secrets() UNION ALL "
            "SELECT 'sequence', last_value::VARCHAR FROM duckdb_sequences() UNION ALL "
            "SELECT 'setting', name || '=' || coalesce(value, '') FROM duckdb_settings() "
            "UNION ALL SELECT 'variable', name FROM duckdb_variables() ORDER BY ALL",
        ).fetchall()
        rows = self.writer.execute("SELECT count(*), sum(i), max(s) FROM t").fetchall()
        logs = self.writer.execute("SELECT count(*) FROM duckdb_logs() WHERE message LIKE '%hostile%'").fetchall()
        files = sorted(
            (str(path.relative_to(self.root)), hashlib.sha256(path.read_bytes()).hexdigest())
            for path in self.root.rglob("*")
            if path.is_file() and path.parent != self.temporary and not path.name.startswith("history.duckdb")
        )
        return objects, rows, logs, files, sorted(p.name for p in self.root.iterdir() if not p.name.endswith(".wal"))

    def close(self) -> None:
        self.queries.close()
        self.writer.close()


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    made = Ground(tmp_path)
    yield made
    made.close()


HOSTILE = """
INSERT INTO t VALUES (1, 'x')
UPDATE t SET i = 0
DELETE FROM t
MERGE INTO t USING (SELECT 1 AS i) u ON t.i = u.i WHEN MATCHED THEN DELETE
WITH x AS (INSERT INTO t VALUES (1, 'x') RETURNING *) FROM x
WITH x AS (DELETE FROM t RETURNING *) FROM x
WITH x AS (UPDATE t SET i = 1 RETURNING *) FROM x
WITH a AS (WITH x AS (DELETE FROM t RETURNING *) FROM x) FROM a
EXPLAIN ANALYZE DELETE FROM t
EXPLAIN DELETE FROM t
EXPLAIN/**/ANALYZE SELECT 1
EXPLAIN /**/ ANALYZE DELETE FROM t
EXPLAIN SELECT 1; DELETE FROM t
TRUNCATE t
DROP TABLE t
ALTER TABLE t ADD COLUMN z INT
CREATE TABLE z (a INT)
CREATE TEMP TABLE z (a INT)
CREATE OR REPLACE TEMP MACRO count_star() AS 1
CREATE SCHEMA z
CREATE SECRET z (TYPE http)
COMMENT ON TABLE t IS 'x'
SELECT 1; SELECT 2
SELECT 1; DELETE FROM t
COMMIT; DELETE FROM t
COMMIT
ROLLBACK
BEGIN
PREPARE p AS DELETE FROM t
EXECUTE p
CALL checkpoint()
CHECKPOINT
FORCE CHECKPOINT
VACUUM
ANALYZE
PRAGMA database_size
PRAGMA enable_profiling
SET threads = 1
SET VARIABLE x = 1
SET SESSION search_path = 'main'
RESET threads
USE memory
LOAD parquet
INSTALL httpfs
ATTACH ':memory:' AS z
ATTACH 'ARCHIVE/z.duckdb' AS z
ATTACH 'ROOT/z.duckdb' AS z
DETACH history
COPY t TO 'ARCHIVE/z.parquet'
COPY t TO 'ROOT/z.parquet'
COPY t TO 'ARCHIVE/away/z.parquet'
COPY t FROM 'ARCHIVE/secret.csv'
COPY FROM DATABASE history TO memory
EXPORT DATABASE 'ARCHIVE/z'
IMPORT DATABASE 'ARCHIVE'
SELECT nextval('numbers')
SELECT setval('numbers', 7)
SELECT currval('numbers')
SELECT write_log('hostile')
SELECT setseed(0.5)
SELECT sleep_ms(1)
SELECT pg_sleep(0.001)
SELECT getenv('HOME')
SELECT current_setting('temp_directory')
SELECT CURRENT_SETTING('temp_directory')
SELECT "system".main."Current_Setting"('temp_directory')
SELECT 'temp_directory'.current_setting()
SELECT list_transform(['temp_directory'], lambda x: current_setting(x))
SELECT i FROM t ORDER BY current_setting('temp_directory')
SELECT i FROM t LIMIT (SELECT count(*) FROM read_text('ARCHIVE/secret.csv'))
SELECT json_serialize_plan('FROM read_text(''ARCHIVE/secret.csv'')')
SELECT pg_get_viewdef(1)
SELECT repeat('x', 2000000000)
SELECT rpad('x', 2000000000, 'y')
SELECT range(1000000000)
SELECT [x FOR x IN range(1000000000)]
SELECT printf('%1000000000d', 1)
FROM read_text('ARCHIVE/secret.csv')
FROM read_text('ROOT/secret.csv')
FROM read_text('ARCHIVE/../secret.csv')
FROM read_text('ARCHIVE/link.csv')
FROM read_text('/proc/self/environ')
FROM read_blob('ARCHIVE/secret.csv')
FROM read_csv('ARCHIVE/secret.csv')
FROM read_csv_auto('ARCHIVE/secret.csv')
FROM read_json('ARCHIVE/secret.csv')
FROM read_ndjson_objects('ARCHIVE/secret.csv')
FROM read_parquet('ARCHIVE/day.parquet')
FROM "READ_PARQUET"('ARCHIVE/day.parquet')
FROM "system".main.parquet_scan('ARCHIVE/day.parquet')
FROM parquet_metadata('ARCHIVE/day.parquet')
FROM parquet_schema('ARCHIVE/day.parquet')
FROM parquet_kv_metadata('ARCHIVE/day.parquet')
FROM read_duckdb('ROOT/history.duckdb', table_name = 't')
FROM read_single_csv_file('ARCHIVE/secret.csv')
FROM glob('ARCHIVE/*')
FROM sniff_csv('ARCHIVE/secret.csv')
FROM 'ARCHIVE/secret.csv'
FROM 'ARCHIVE/day.parquet'
FROM "ARCHIVE/secret".csv
FROM "ARCHIVE"."secret.csv"
FROM "ARCHIVE/day.parquet" d, t
WITH "ARCHIVE/secret.csv" AS (SELECT 1) SELECT * FROM t JOIN (FROM "ARCHIVE/secret.csv") ON true
SELECT (SELECT max(a) FROM 'ARCHIVE/secret.csv')
DESCRIBE 'ARCHIVE/secret.csv'
SUMMARIZE 'ARCHIVE/secret.csv'
SHOW 'ARCHIVE/secret.csv'
PIVOT 'ARCHIVE/secret.csv' ON a IN ('x') USING count(*)
PIVOT t ON s USING count(*)
FROM read_text('http://127.0.0.1:1/x')
FROM 'https://127.0.0.1:1/x.parquet'
FROM 's3://x/y.parquet'
FROM query('SELECT 1')
FROM query('FROM read_text(''ARCHIVE/secret.csv'')')
FROM query_table('t')
FROM query_table(['ARCHIVE/day.parquet'])
FROM histogram_values('ARCHIVE/day.parquet', i)
FROM histogram('ARCHIVE/day.parquet', i)
FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))
FROM checkpoint()
FROM force_checkpoint()
FROM enable_logging()
FROM truncate_duckdb_logs()
FROM duckdb_logs()
FROM duckdb_secrets()
FROM which_secret('a', 'b')
FROM duckdb_settings()
FROM duckdb_databases()
FROM duckdb_databases
FROM duckdb_views
FROM duckdb_views()
FROM sqlite_master
FROM pg_catalog.pg_views
FROM information_schema.views
FROM "system".information_schema.views
WITH duckdb_views AS (SELECT 1) SELECT 1 FROM (FROM duckdb_views)
FROM duckdb_temporary_files()
FROM duckdb_variables()
FROM duckdb_external_file_cache()
FROM pragma_database_size()
FROM pragma_storage_info('v')
FROM add_grammar_extension('x')
FROM create_external_resource('x')
FROM register_external_resource_type('x')
FROM enable_profiling()
FROM arrow_scan(1, 2, 3)
FROM pandas_scan(1)
FROM python_map_function()
FROM test_vector_types(1)
SHOW DATABASES
SHOW temp_directory
SHOW VARIABLES
FROM a_python_table
FROM GROUND_MODULE
""".strip().splitlines()

a_python_table = pa.table({"a": [1]})
GROUND_MODULE = a_python_table


def test_hostile_statements_are_refused_and_change_nothing(ground: Ground) -> None:
    before = ground.content()
    answered = []
    for line in HOSTILE:
        sql = line.replace("ARCHIVE", str(ground.archive)).replace("ROOT", str(ground.root))
        try:
            answered.append((line, ground.ask(sql)))
        except BadSql as refused:
            path = [word for word in (str(ground.root), "POSSIBLE", "Possible solutions") if word in str(refused)]
            if path and str(ground.root) not in sql:
                answered.append((line, [{"names": path}]))
    assert answered == []
    assert ground.content() == before
    assert ground.ask("SELECT count(*) AS n FROM t") == [{"n": 1000}]


def test_below_the_check_the_instance_itself_is_closed(ground: Ground) -> None:
    refused = []
    for sql in (
        f"FROM read_text('{ground.root}/secret.csv')",
        f"FROM read_text('{ground.archive}/../secret.csv')",
        f"FROM read_text('{ground.archive}/link.csv')",
        f"FROM read_text('{ground.root}/archive2/secret.csv')",
        f"COPY t TO '{ground.root}/out/x.parquet'",
        f"COPY t TO '{ground.archive}/../out/x.parquet'",
        f"COPY t TO '{ground.archive}/away/x.parquet'",
        f"ATTACH '{ground.root}/out/x.duckdb'",
        "FROM read_text('/proc/self/environ')",
        "FROM read_text('http://127.0.0.1:1/x')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET allowed_directories = ['/']",
        "SET enable_external_access = true",
        "SET GLOBAL python_enable_replacements = true",
        "SET log_query_path = '/tmp/x'",
        "CREATE PERSISTENT SECRET x (TYPE http)",
        "FROM a_python_table",
    ):
        with pytest.raises(duckdb.Error):
            ground.writer.cursor().execute(sql).fetchall()
        refused.append(sql)
    assert len(refused) == 18
    assert not list((ground.root / "out").iterdir())


def test_the_writer_works_on_after_hardening(ground: Ground) -> None:
    ground.writer.execute("CHECKPOINT")
    ground.writer.execute(f"COPY (SELECT 5 AS i, 'x' AS s) TO '{ground.archive}/next.parquet'")
    files = f"['{ground.archive}/day.parquet', '{ground.archive}/next.parquet']"
    ground.writer.execute(f"CREATE OR REPLACE VIEW v AS SELECT * FROM read_parquet({files})")
    assert ground.ask("SELECT count(*) AS n FROM v") == [{"n": 1001}]


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT count(*) FROM t", 1),
        ("FROM v LIMIT 3", 3),
        ("TABLE t LIMIT 3;", 3),
        ("-- a remark\nVALUES (1), (2)", 2),
        ("WITH a AS (SELECT 1), b AS (FROM a) FROM a, b", 1),
        ("WITH RECURSIVE r AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM r WHERE i < 5) FROM r", 5),
        ("DESCRIBE t", 2),
        ("DESCRIBE SELECT 1", 1),
        ("SUMMARIZE v", 2),
        ("SHOW TABLES", 2),
        ("SHOW ALL TABLES", 2),
        ("SHOW t", 2),
        ("EXPLAIN SELECT * FROM v WHERE i = 3", 1),
        ("explain\nfrom t", 1),
        ("PIVOT t ON s IN ('n0', 'n1') USING count(*)", 1000),
        ("UNPIVOT (SELECT 1 AS a, 2 AS b) ON a, b", 2),
        ("SELECT s, sum(i) FILTER (i > 3) OVER (PARTITION BY s ORDER BY i) FROM t QUALIFY row_number() OVER () = 1", 1),
        ("SELECT twice(3), [x + 1 FOR x IN [1, 2]], {'a': 1}.a, i::VARCHAR FROM main.t USING SAMPLE 3 ROWS", 3),
        ("SELECT * FROM range(3) r(i), generate_series(1, r.i)", 3),
        ("SELECT * FROM t ASOF JOIN (SELECT 5 AS i) u ON t.i >= u.i", 995),
        ("SELECT DISTINCT ON (s) s, i FROM t ORDER BY s, i DESC NULLS FIRST", 3),
        ("(SELECT 1 AS a) UNION ALL BY NAME (SELECT 2 AS a)", 2),
        ("SELECT s, grouping(s), count(*) FROM t GROUP BY ROLLUP (s) HAVING count(*) > 1", 4),
        ("SELECT random() < 2, uuid() IS NOT NULL, now() > '2020-01-01'::TIMESTAMPTZ", 1),
        ("SELECT table_name FROM information_schema.tables WHERE table_schema = 'main'", 2),
        ('SELECT * FROM json_each(\'{"a": 1, "b": 2}\')', 2),
        ("SELECT 'FROM read_text(1); DROP TABLE t' AS s", 1),
        ("FROM t WHERE false", 0),
    ],
)
def test_reading_is_answered(ground: Ground, sql: str, rows: int) -> None:
    assert len(ground.ask(sql)) == rows


def test_a_plan_names_no_directory(ground: Ground) -> None:
    assert str(ground.root) not in str(ground.ask("EXPLAIN SELECT * FROM v WHERE i = 3"))


def test_parameters(ground: Ground) -> None:
    assert ground.ask("SELECT count(*) AS n FROM t WHERE i < ? AND s = ?", parameters=[30, "n1"]) == [{"n": 10}]
    assert ground.ask("SELECT $a + 1 AS n", parameters={"a": 2}) == [{"n": 3}]
    with pytest.raises(BadSql, match="Values were not provided"):
        ground.ask("SELECT ?")


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("selec 1", 'not valid SQL: syntax error at or near "selec"'),
        ("", "there are 0: send a single SELECT"),
        ("SELECT 1; SELECT 2", "there are 2: send a single SELECT"),
        ("SELECT 1; DROP TABLE t", "there are 2: send a single SELECT"),
        ("DROP TABLE t", "only reading is allowed, and this is DROP"),
        ("SELECT nosuch FROM t", 'Referenced column "nosuch" not found'),
        ("FROM nosuch", "Table with name nosuch does not exist"),
        ("FROM 'x.csv'", "there is no table or view 'x.csv'"),
        ("FROM glob('*')", "glob() can't be read from"),
        ("SELECT 'a'::INT", "Could not convert string 'a'"),
        ("SELECT error('mine')", "mine"),
        ("PIVOT t ON s USING count(*)", "PIVOT must name its values"),
        ("SELECT " + "(" * 3000, "nests brackets"),
        ("SELECT 1" + " " * 40000, "at most 32768"),
        ("SELECT 1" + " + 1" * 150, None),
        ("SELECT 1" + " + 1" * 600, "depth"),
        ("SELECT " + "list_transform([1], lambda x: " * 20 + "1" + ")" * 20, "lambdas are nested"),
        (
            "WITH a0 AS (SELECT 1)"
            + "".join(f", a{n + 1} AS (SELECT 1 FROM a{n} x, a{n} y)" for n in range(25))
            + " FROM a25",
            "WITH parts written out",
        ),
    ],
)
def test_errors_say_what_to_do(ground: Ground, sql: str, sentence: str | None) -> None:
    began = time.monotonic()
    if sentence is None:
        assert len(ground.ask(sql)) == 1
        return
    with pytest.raises(BadSql) as caught:
        ground.ask(sql)
    assert sentence in str(caught.value)
    assert time.monotonic() - began < 5


def test_a_lost_file_is_told_without_its_directory(ground: Ground) -> None:
    (ground.archive / "day.parquet").unlink()
    with pytest.raises(ServiceFault) as caught:
        ground.ask("FROM v")
    assert caught.value.code == "internal"
    assert str(ground.root) not in str(caught.value)
    assert "<history>/archive/day.parquet" in str(caught.value)


@pytest.mark.parametrize("sql", [LONG, ENDLESS, "SELECT count(*) FROM range(100000000000) WHERE hash(range) % 7 = 9"])
def test_time_is_limited(ground: Ground, sql: str) -> None:
    began = time.monotonic()
    with pytest.raises(QueryLimit, match="stopped after 0.5 s: raise the limit with --timeout") as caught:
        with ground.queries.run(sql, seconds=0.5, rows=10**12) as result:
            for _ in result:
                pass
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


def test_a_process_that_grows_stops_its_queries(ground: Ground) -> None:
    queries = Queries(ground.writer, ceiling=1)
    with pytest.raises(QueryLimit) as caught:
        list(queries.run(LONG, seconds=20, rows=10))
    assert caught.value.code == "memory_limit"
    queries.close()


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
    time.sleep(0.5)
    began = time.monotonic()
    ground.queries.close()
    reader.join(10)
    assert not reader.is_alive()
    assert time.monotonic() - began < 5
    assert isinstance(outcome[0], BadRequest)


def test_relieving_the_writer_stops_queries(ground: Ground) -> None:
    outcome: list[QueryLimit] = []

    def read() -> None:
        with pytest.raises(QueryLimit) as caught:
            ground.ask(LONG, seconds=60)
        outcome.append(caught.value)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.5)
    assert ground.queries.relieve() == 1
    reader.join(10)
    assert outcome[0].code == "memory_limit"
    assert ground.queries.relieve() == 0


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
