"""A closed-down database with an archive, for attacks on the read-only questions."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import duckdb

from kvplane.services.history.query import Queries, harden

if TYPE_CHECKING:
    from pathlib import Path


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
