"""Rows of the live part in pieces of a bounded size: a single row may have megabytes, and DuckDB holds thousands at once.

Their size is estimated; who has no memory for a piece tries smaller ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.events.types import HASHES_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.projections.history.tables import Table

PIECE_BYTES = 64 << 20
"""So many bytes of rows are written to a file at once, if they are of more than one commit."""

LEAST_BYTES = 1 << 16
"""Smallest pieces that are tried where larger ones can't be written."""

_BYTES = {
    # To look at a list's length is to read all of it, so it is taken from a column that says the same.
    "decisions": f"400 + least(blocks, {HASHES_LIMIT}) * 8",
    "cache_changes": "100 + (blocks + evicted_blocks) * 8",
    "group_changes": "100 + blocks * 8",
    "node_changes": "4096",
    "commits": "CASE WHEN skipped IS NULL THEN 100 ELSE 16384 END",
}
"""About how many bytes the rows of these tables have; those of others have 200."""


def sizes(schema: str, tables: Sequence[Table], after: int, last: int) -> str:
    """A query for the rows of a range with about how many bytes each has."""
    return " UNION ALL ".join(
        f"SELECT sequence, ({_BYTES.get(table.name, '200')})::BIGINT AS size FROM {schema}.{table.name} "
        f"WHERE sequence > {after} AND sequence <= {last}"
        for table in tables
    )


def query(schema: str, tables: Sequence[Table], after: int, last: int, size: int) -> str:
    """A query for the sequences at which to cut the rows of a range, so that what is between two has about `size` bytes.

    What one commit has is never cut. After the last of them there may be commits without rows.
    """
    return (
        f"WITH commits AS (SELECT sequence, sum(size)::BIGINT AS size FROM ({sizes(schema, tables, after, last)}) "
        "GROUP BY sequence), run AS (SELECT sequence, sum(size) OVER (ORDER BY sequence) AS upto FROM commits) "
        f"SELECT max(sequence)::UBIGINT AS last FROM run GROUP BY upto // {max(size // 2, 1)} ORDER BY 1"
    )
