"""What the fleet did: the log as tables in DuckDB and Parquet files, and read-only questions about it."""
