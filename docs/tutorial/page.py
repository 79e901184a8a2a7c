"""docs/history.md, made from a simulated log: the same bytes at every run.

python -m docs.tutorial > docs/history.md
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec

from docs.tutorial import log as tutorial_log
from docs.tutorial import past as tutorial_past
from docs.tutorial.notebook import Notebook
from docs.tutorial.questions import QUESTIONS
from kvplane.events.codec import REASONS as MALFORMED
from kvplane.projections.history.archive import CLOSED_SECONDS, KEPT
from kvplane.projections.history.store import Store
from kvplane.projections.history.tables import TABLES
from kvplane.projections.history.views import VIEWS
from kvplane.projections.skips import REASONS as ILLEGAL
from kvplane.services.history.pages import Limits
from kvplane.services.history.places import CONCURRENT, IDLE_SECONDS, MOST_OF_ONE, WANTED_SECONDS
from kvplane.services.history.plain import plain
from kvplane.services.history.query import Queries, harden
from kvplane.services.protocol import messages
from kvplane.services.simulation.world import FLEET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.events.codec import Message

COMMAND = "python -m docs.tutorial > docs/history.md"


def make() -> str:
    """The whole document."""
    log = tutorial_log.make()
    with TemporaryDirectory() as folder:
        store = Store(Path(folder), FLEET)
        tutorial_log.store(store, log)
        # One thread: sums of floats and estimates depend on the order of rows.
        harden(store.connection, store.archive, temporary=store.spill, memory="1GB", threads=1, spill="1GB")
        queries = Queries(store.connection, hidden=[store.folder])
        try:
            page = Notebook(queries)
            _introduction(page)
            _asking(page, log)
            _keeping(page)
            _questions(page, log)
            _reference(page)
        finally:
            queries.close()
            store.close()
    return page.text


def _introduction(page: Notebook) -> None:
    page.title("The history", 1)
    page.say(
        "The historian follows the log and keeps it as tables, as long as you like. It answers SQL about them, and "
        "it rebuilds past states of the fleet. `kvplane up` runs one beside the router; `kvplane historian` runs one "
        "on any machine, one for each fleet. Nothing waits for it: routers don't know that it is there."
    )
    page.table(["table", "rows"], ([f"`{table.name}`", table.meaning] for table in TABLES))
    page.say(
        "Every event is a row, with the sequence of its commit and the log's time. Commits that were skipped are rows, too. "
        "Views answer the most frequent questions:"
    )
    page.table(["view", "what it answers"], ([f"`{view.name}`", view.meaning] for view in VIEWS))
    page.say(
        "Columns are [below](#tables-and-views). Times are UTC; sizes are in tokens or blocks, durations in seconds; "
        "a share is a number from 0 to 1."
    )


def _asking(page: Notebook, log: Sequence[Message]) -> None:
    page.title("Asking")
    page.code("""
        kvplane sql                                          # a prompt
        kvplane sql 'SELECT * FROM hit_rate_by_node'         # also --json, --csv, --parquet FILE, --arrow FILE
        kvplane report --since 2h                            # all views at a glance; also --html FILE, --png FILE, --json
        kvplane state --at 2026-01-31T09:53:00               # the fleet as it was
        kvplane diff 2026-01-31T09:52 2026-01-31T09:54       # what changed
        kvplane explain 7.1234                               # why a request went where it went
        kvplane history status                               # how far the history is
    """)
    page.say(
        "A moment is written alike everywhere (`--at`, `--since`, `--until`, `events tail --from`, both moments of `diff`): a "
        "sequence; `10m`, `2h`, `3d` or `1h30m` ago; `now`, `today`, `yesterday`; a date, which is its beginning; or a time in "
        "ISO 8601. Days and times without a zone are UTC."
    )
    page.say(
        "On a terminal, `kvplane sql` shows at the most 200 rows; a result that is too wide shows fewer columns and names "
        "those it left out, and a few rows go one below the other. In a pipe it gives all rows, with tabs between the cells. "
        "People are shown block hashes in hex, as `events tail` and `route --hashes` have them: `WHERE prefix = "
        "'0x223f18b8eae12179'::UBIGINT`."
    )
    page.say(
        "The SQL is DuckDB's, read only, one statement at a time. No client library is needed: `kv.<fleet>.sql` takes "
        "JSON or MessagePack and answers in the same form."
    )
    sql = "SELECT node, requests, hit_rate FROM hit_rate_by_node ORDER BY node LIMIT 2"
    answer = page.quiet(sql)
    example = messages.SqlAnswer(
        columns=[messages.Column(field.name, str(field.type)) for field in answer.schema],
        rows=[[plain(value) for value in row.values()] for row in answer.to_pylist()], stored=len(log),
    )  # fmt: skip
    question = msgspec.json.encode({"sql": sql}).decode()
    page.code(f"nats req kv.default.sql '{question}'\n{msgspec.json.encode(example).decode()}")
    page.table(["field of the request", "meaning"], [
        ["`sql`", "the query"],
        ["`form`", "`rows` (default), or `arrow`: each page is an Arrow IPC stream in `data` (base64 in JSON)"],
        ["`seconds`", "how long it may take; the historian's limit if not given"],
        ["`rows`", "how many rows it may give; the same"],
    ])  # fmt: skip
    page.table(["field of the answer", "meaning"], [
        ["`columns`", "name and type of each column, the type as Arrow calls it"],
        ["`rows`", "one list a row, `[]` when there is none. Times are ISO 8601, bytes are hex, NaN is null"],
        ["`stored`", "sequence up to which the history was complete when the query began"],
        ["`next`, `result`", 'there is another page: ask the subject `next` with `{"result": ...}`; absent on the last one'],
    ])  # fmt: skip
    page.say(
        'Go on until an answer has no `next`. To stop before that, send `{"result": ..., "close": true}`; a result that nobody '
        f"asks for is closed after {IDLE_SECONDS:g} s. Block hashes have 64 bits, more than a number in JavaScript "
        "can hold: ask for `SELECT prefix::VARCHAR`. `kvplane sql --json` writes every integer beyond 2^53 as a string of "
        "its digits. "
        'Errors carry `Nats-Service-Error-Code` and a body `{"code", "error"}`: '
        "`bad_sql`, `time_limit`, `row_limit`, `memory_limit`, `busy`."
    )
    limits = Limits()
    page.say(
        f"A query may take {limits.seconds:g} s of work and give {limits.rows:,} rows; {CONCURRENT} may run at once, "
        f"{MOST_OF_ONE} of them of one client, and share {limits.memory / 1e9:g} GB of memory and "
        f"{limits.spill / 1e9:g} GB of disk. `kvplane historian` has `--timeout`, `--max-rows` and `--memory-gb`. "
        "Each runs in a process of its own, which the system ends when it takes more time or memory. While others wait, "
        f"a result with pages left is closed {WANTED_SECONDS:g} s after the last one, and so is the last of several queries of "
        "one client that has run as long. A result that is cut short ends with an error, never silently. Queries see no "
        "files, no network and no settings."
    )


def _keeping(page: Notebook) -> None:
    page.title("Files, retention, rebuild")
    page.say(
        "The folder is `kvplane-data/history` with `kvplane up`, or `--history`. The last hours are in "
        "`history.duckdb`, which one "
        f"process has open. An hour is closed {CLOSED_SECONDS} s after its end; its rows then go to Parquet files, "
        "which any tool can "
        "read while the historian runs:"
    )
    page.code("""
        history/archive/<table>/day=2026-01-31/<first sequence>-<last sequence>.parquet
        duckdb -c "SELECT count(*) FROM 'history/archive/decisions/*/*.parquet'"
        python -c "import pandas; print(pandas.read_parquet('history/archive/completions'))"
    """)
    kept = ", ".join(f"`{name}`" for name in KEPT)
    page.say(
        "Everything is kept, unless `kvplane historian` has `--keep-days` or `--keep-gb`: then the oldest files of the "
        "archive are deleted. "
        f"{kept} are always kept, they are small. A file that was unfinished when a process was killed is deleted."
    )
    page.say(
        "`kvplane history rebuild --history FOLDER` makes the history again, from the archive and from the log where "
        "the archive ends; with `--from-log` from the log alone. Rows keep all that the fold reads of an event, so "
        "past states can be rebuilt from rows where the log has been purged."
    )


def _questions(page: Notebook, log: Sequence[Message]) -> None:
    page.title("Questions")
    page.say(
        f"`{COMMAND}` made this page: it simulates a fleet of four nodes for twenty minutes, the same at every run, "
        f"stores its {len(log):,} commits, and asks. At 09:47 the policy becomes `ttft`, at 09:50 node-2 is cordoned "
        f"for a minute, at 09:53 {tutorial_log.LOST} fails, at 09:55 node-5 joins, and at 09:58 {tutorial_log.LOST} "
        "is back. Each query can be pasted into "
        "`kvplane sql` and asked of your own fleet."
    )
    for question in QUESTIONS:
        question(page)
    tutorial_past.states(page, log)
    tutorial_past.explanation(page, log)


def _reference(page: Notebook) -> None:
    page.title("Tables and views")
    page.say(
        "`kvplane sql 'DESCRIBE decisions'` shows the columns of one, `.columns decisions` at the prompt what they "
        "mean."
    )
    for table in TABLES:
        page.title(f"`{table.name}`: {table.meaning}", 3)
        page.table(["column", "type", "meaning"], ([f"`{c.name}`", f"`{c.sql}`", c.meaning] for c in table.columns))
    for view in VIEWS:
        page.title(f"`{view.name}`: {view.meaning}", 3)
        page.table(["column", "meaning"], ([f"`{name}`", meaning] for name, meaning in view.columns))
    page.title("Why a commit is skipped", 3)
    page.table(["reason", "meaning"], ([f"`{name}`", meaning] for name, meaning in {**MALFORMED, **ILLEGAL}.items()))
