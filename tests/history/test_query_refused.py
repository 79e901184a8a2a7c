"""What may be asked of the history, and what is refused."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pytest

from kvplane.services.protocol.errors import BadSql, ServiceFault
from tests.support.closed_database import Ground

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
        ("FROM t t0" + "".join(f" JOIN t t{n} USING (i)" for n in range(1, 60)), "more than 50 tables"),
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
