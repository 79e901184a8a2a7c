"""The history: a fold of the log in DuckDB, for SQL. The one place in this package that touches a disk.

`tables` says what is kept, `views` what can be asked, `rows` makes columns of commits, `replay` makes commits of rows again,
`store` is the file, `archive` moves closed hours to Parquet.
"""
