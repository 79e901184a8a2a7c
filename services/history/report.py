"""A history at a glance: its views over a range of time, as tables and as curves.

Everything is asked in SQL and is an aggregate, so a history of any size gives a page. The views' own queries are used, over
the rows of the range.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from kvplane.events.hashing import format_hash
from kvplane.projections.history.tables import TABLES
from kvplane.projections.history.views import VIEWS
from kvplane.services.process.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pyarrow as pa

    Ask = Callable[[str], Awaitable[pa.Table]]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
BUCKETS = (
    1, 2, 5, 10, 15, 30, _MINUTE, 2 * _MINUTE, 5 * _MINUTE, 10 * _MINUTE, 15 * _MINUTE, 30 * _MINUTE,
    _HOUR, 2 * _HOUR, 3 * _HOUR, 6 * _HOUR, 12 * _HOUR, _DAY, 2 * _DAY, 4 * _DAY, 7 * _DAY, 14 * _DAY, 28 * _DAY, 364 * _DAY,
)  # fmt: skip
"""Seconds that a step of time may have."""
TABLE_STEPS = 12
"""Most steps of time in a table."""
CHART_STEPS = 60
"""Most steps of time in a picture."""
LINES = 8
"""Most models, policies or nodes that a picture names; the others are one."""
OTHERS = "others"

_QUERIES = {view.name: view.query for view in VIEWS}
_TOKENS = 'requests, prompt_tokens AS "prompt tokens", cached_tokens AS cached, hit_rate AS "hit rate"'


class Range(NamedTuple):
    """From when, inclusive, until when; none is without limit. Times are UTC and end before `until`, sequences with it."""

    since: datetime | int | None = None
    until: datetime | int | None = None

    def where(self, *, since: bool = True) -> str:
        """The condition on `time`."""
        terms = [_term(self.since, ">=", ">=")] if since and self.since is not None else []
        terms += [_term(self.until, "<", "<=")] if self.until is not None else []
        return " AND ".join(terms) or "true"

    def over(self, query: str) -> str:
        """The query, over the rows of this range."""
        # What nodes are follows from all that happened to them before.
        limited = ", ".join(
            f"{table.name} AS NOT MATERIALIZED "
            f"(SELECT * FROM main.{table.name} WHERE {self.where(since=table.name != 'node_changes')})"
            for table in TABLES
            if table.name in query
        )
        return f"WITH {limited} SELECT * FROM ({query})"


def _term(at: datetime | int, of_time: str, of_sequence: str) -> str:
    if isinstance(at, int):
        return f"sequence {of_sequence} {at}"
    return f"time {of_time} TIMESTAMP '{at.isoformat(sep=' ', timespec='microseconds')}'"


class Section(Struct, kw_only=True):
    """One table of the page. `total` is how many rows there are, `rows` are the first of them."""

    name: str
    title: str
    meaning: str
    columns: list[str]
    rows: list[list[Any]]
    total: int

    @property
    def numbers(self) -> list[bool]:
        """Which columns hold numbers only."""
        columns = zip(*self.rows, strict=True)
        return [all(isinstance(value, int | float | None) for value in column) for column in columns]


class Overview(Struct, kw_only=True):
    """What the range holds, in numbers. Times are of commits, `hit_rate` is a share of the prompt tokens."""

    first: datetime
    last: datetime
    first_sequence: int
    last_sequence: int
    commits: int
    skipped: int
    nodes: dict[str, int]
    """Nodes by their state at the end."""
    decisions: int
    completions: int
    failed: int
    hit_rate: float | None
    sessions: int
    """Sessions that were put on a node, moved or ended."""


class Chart(Struct, kw_only=True):
    """One picture's rows: the step's begin, whose value it is, and the values."""

    name: str
    title: str
    step: int
    """Seconds."""
    columns: list[str]
    rows: list[list[Any]]


class Report(Struct, kw_only=True):
    """The page."""

    fleet: str
    overview: Overview
    sections: list[Section]
    charts: list[Chart]
    lost: list[datetime]
    """When nodes were lost, the last few."""


def step(first: datetime, last: datetime, most: int) -> int:
    """Seconds a step, so that a range has no more than `most`."""
    span = (last - first).total_seconds()
    return next((size for size in BUCKETS if span / size <= most - 1), BUCKETS[-1])


class _Table(NamedTuple):
    """What one section asks. In the query, `{view}` is the view's query and `{bucket}` the begin of a step of time."""

    name: str
    view: str
    title: str
    query: str
    order: str
    rows: int = 20
    where: str = "true"


_SECTIONS = (
    _Table(
        "hit_rate", "hit_rate_by_hour", "Hit rate over time",
        'SELECT {bucket} AS "from", coalesce(model, \'unknown\') AS model, count(*) AS requests, '
        'sum(prompt_tokens)::UBIGINT AS "prompt tokens", sum(cached_tokens)::UBIGINT AS cached, '
        'sum(cached_tokens)::DOUBLE / nullif(sum(prompt_tokens), 0) AS "hit rate" '
        "FROM completions WHERE status = 'ok' GROUP BY ALL",
        '"from", model', rows=36,
    ),
    _Table(
        "hit_rate_by_node", "hit_rate_by_node", "Hit rate by node",
        f"SELECT node, {_TOKENS} FROM ({{view}})", "requests DESC, node",
    ),
    _Table(
        "ttft_by_policy", "ttft_by_policy", "Time to first token by policy, in seconds",
        'SELECT policy, model, requests, mean, p50, p90, p99, hit_rate AS "hit rate" FROM ({view})',
        "requests DESC, policy, model",
    ),
    _Table(
        "predicted_vs_delivered", "match_predicted_vs_delivered", "Predicted against delivered, in tokens",
        'SELECT node, sum(requests)::UBIGINT AS requests, sum(predicted_tokens)::UBIGINT AS predicted, '
        'sum(cached_tokens)::UBIGINT AS cached, sum("over")::UBIGINT AS "not found", sum("under")::UBIGINT AS unexpected, '
        'sum("right" * requests) / sum(requests) AS "right" FROM ({view}) GROUP BY node',
        "requests DESC, node",
    ),
    _Table(
        "evictions", "evictions_by_node", "Blocks stored and evicted",
        "SELECT node, sum(stored)::UBIGINT AS stored, sum(evicted)::UBIGINT AS evicted, sum(cleared)::UBIGINT AS "
        "cleared FROM ({view}) GROUP BY node",
        "evicted DESC, node",
    ),
    _Table(
        "session_moves", "session_moves", "Session moves",
        'SELECT from_node AS "from node", to_node AS "to node", count(*) AS moves, count(DISTINCT session) AS sessions '
        "FROM ({view}) GROUP BY ALL",
        'moves DESC, "from node", "to node"', rows=10,
    ),
    _Table(
        "last_session_moves", "session_moves", "The last session moves",
        'SELECT time, session, from_node AS "from node", to_node AS "to node", sequence FROM ({view})',
        "sequence DESC", rows=5,
    ),
    _Table(
        "node_timeline", "node_timeline", "What happened to nodes, the last first",
        "SELECT time, node, change, reason, seconds, sequence FROM ({view}) WHERE {where}", "sequence DESC, node",
    ),
    _Table(
        "hot_prefixes", "hot_prefixes", "Hot prefixes",
        "SELECT prefix, model, requests, tokens, matched, nodes, last FROM ({view})", "requests DESC, prefix", rows=10,
    ),
    _Table(
        "regret", "regret", "Regret: longer matches that were passed over",
        'SELECT policy, model, requests, passed_over AS "passed over", "match", best_match AS "best match", '
        "tokens FROM ({view})",
        "requests DESC, policy, model",
    ),
    _Table(
        "skipped_commits", "skipped_commits", "Skipped commits",
        'SELECT reason, commits, first_time AS "first", last_time AS "last", last_sequence AS "last sequence", '
        "names, writers FROM ({view})",
        "commits DESC, reason",
    ),
)  # fmt: skip
_MEANINGS = {view.name: view.meaning for view in VIEWS}


class _Curve(NamedTuple):
    """What one picture asks. `key` is whose value it is, `table` the rows, `values` the aggregates."""

    name: str
    title: str
    table: str
    where: str
    key: str
    values: str


_OK = "status = 'ok'"
_CURVES = (
    _Curve(
        "hit_rate", "Hit rate by model", "completions", _OK, "coalesce(model, 'unknown')",
        'sum(cached_tokens)::DOUBLE / nullif(sum(prompt_tokens), 0) AS "hit rate"',
    ),
    _Curve(
        "ttft", "Time to first token in seconds, p50 and p99 (dotted)", "completions",
        f"{_OK} AND routed IS NOT NULL", "policy", "approx_quantile(ttft, 0.5) AS p50, approx_quantile(ttft, 0.99) AS "
        "p99",
    ),
    _Curve("requests", "Requests by node", "decisions", "true", "node", "count(*) AS requests"),
    _Curve(
        "blocks", "Blocks stored and evicted", "cache_changes", "true", "''",
        "coalesce(sum(blocks) FILTER (change IN ('stored', 'placed')), 0)::UBIGINT AS stored, "
        "sum(evicted_blocks)::UBIGINT AS evicted",
    ),
    _Curve(
        "sessions", "Sessions that began and that moved", "session_changes", "true", "''",
        "count(*) FILTER (change = 'new') AS began, count(*) FILTER (change = 'moved') AS moved",
    ),
    _Curve(
        "predicted", "Cached tokens: predicted by routers, delivered by engines", "completions",
        f"{_OK} AND routed IS NOT NULL", "''",
        "sum(predicted_tokens)::UBIGINT AS predicted, sum(cached_tokens)::UBIGINT AS delivered",
    ),
)  # fmt: skip


async def extent(ask: Ask) -> tuple[datetime, datetime] | None:
    """First and last time of all that is kept; none when that is nothing."""
    (row,) = (await ask("SELECT min(time) AS first, max(time) AS last FROM commits")).to_pylist()
    return None if row["first"] is None else (row["first"], row["last"])


async def collect(ask: Ask, fleet: str, span: Range, *, charts: bool = True) -> Report | None:
    """Ask for everything, one query after the other; none when the range holds no commit."""
    overview = await _overview(ask, span)
    if overview is None:
        return None
    sections = [await _section(ask, span, overview, table) for table in _SECTIONS]
    curves = [await _chart(ask, span, overview, curve) for curve in _CURVES] if charts else []
    lost = await ask(
        f"SELECT time FROM node_changes WHERE change = 'lost' AND {span.where()} ORDER BY sequence DESC LIMIT 20"
    )
    return Report(
        fleet=fleet, overview=overview, sections=sections, charts=curves, lost=lost.column("time").to_pylist()
    )


async def _overview(ask: Ask, span: Range) -> Overview | None:
    (commits,) = (await ask(span.over(
        "SELECT min(time) AS first, max(time) AS last, min(sequence) AS first_sequence, max(sequence) AS "
        "last_sequence, count(*) AS commits, count(skipped) AS skipped FROM commits"
    ))).to_pylist()  # fmt: skip
    if not commits["commits"]:
        return None
    (completions,) = (await ask(span.over(
        f"SELECT count(*) AS completions, count(*) FILTER (status <> 'ok') AS failed, "
        f"(sum(cached_tokens) FILTER ({_OK}))::DOUBLE / nullif(sum(prompt_tokens) FILTER ({_OK}), 0) AS hit_rate "
        "FROM completions"
    ))).to_pylist()  # fmt: skip
    (decisions,) = (await ask(span.over("SELECT count(*) AS decisions FROM decisions"))).to_pylist()
    (sessions,) = (await ask(span.over(
        "SELECT count(DISTINCT (model, session)) AS sessions FROM session_changes"
    ))).to_pylist()  # fmt: skip
    states = await ask(span.over(f"SELECT state, count(*) AS nodes FROM ({_QUERIES['nodes']}) GROUP BY state"))
    nodes = {row["state"]: row["nodes"] for row in states.to_pylist()}
    return Overview(
        **commits, **completions, **decisions, **sessions,
        nodes={state: nodes[state] for state in ("up", "cordoned", "lost", "removed") if state in nodes},
    )  # fmt: skip


async def _section(ask: Ask, span: Range, overview: Overview, table: _Table) -> Section:
    size = step(overview.first, overview.last, TABLE_STEPS)
    query = table.query.format(view=_QUERIES[table.view], bucket=_bucket(size), where=span.where())
    answer = await ask(
        f"SELECT * FROM (SELECT *, count(*) OVER () AS total FROM ({span.over(query)})) "
        f"ORDER BY {table.order} LIMIT {table.rows}"
    )
    rows = [list(row.values()) for row in answer.to_pylist()]
    title = table.title + (f", by {spoken(size)}" if "{bucket}" in table.query else "")
    return Section(
        name=table.name, title=title, meaning=_MEANINGS[table.view].partition(", by hour")[0], columns=answer.column_names[:-1],
        rows=[row[:-1] for row in rows], total=rows[0][-1] if rows else 0,
    )  # fmt: skip


async def _chart(ask: Ask, span: Range, overview: Overview, curve: _Curve) -> Chart:
    size = step(overview.first, overview.last, CHART_STEPS)
    begin = _bucket(size)
    answer = await ask(span.over(
        f"WITH kept AS NOT MATERIALIZED (SELECT {begin} AS begins, {curve.key} AS line, * FROM {curve.table} WHERE "
        f"{curve.where}), top AS (SELECT line FROM kept GROUP BY line ORDER BY count(*) DESC, line LIMIT {LINES}) "
        f"SELECT begins, CASE WHEN line IN (SELECT line FROM top) THEN line END AS line, "
        f"{curve.values} FROM kept GROUP BY ALL"
    ) + " ORDER BY begins, line")  # fmt: skip
    rows = [list(row.values()) for row in answer.to_pylist()]
    return Chart(name=curve.name, title=curve.title, step=size, columns=answer.column_names[2:], rows=rows)


def _bucket(seconds: int) -> str:
    return f"time_bucket(INTERVAL {seconds} SECOND, time)"


def spoken(seconds: int) -> str:
    """A step of time in words."""
    for size, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if not seconds % size:
            return f"{seconds // size} {name}"
    return f"{seconds} s"


_SHARES = {"hit rate", "matched", "right"}
_NAMES = {"sequence", "last sequence"}


def readable(column: str, value: Any) -> str:  # noqa: ANN401 - any value of a row
    """A value as people read it."""
    match value:
        case None:
            return "-"
        case float() if column in _SHARES:
            return f"{value:.1%}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case int() if column == "prefix":
            return format_hash(value)
        case int():
            return str(value) if column in _NAMES else f"{value:,}"
        case datetime():
            return clock(value)
        case list():
            return ", ".join(readable(column, part) for part in value)
    return printable(str(value))


def clock(time: datetime) -> str:
    """A time to the second."""
    return (time + timedelta(milliseconds=500)).isoformat(sep=" ", timespec="seconds")


def headline(report: Report) -> list[tuple[str, str]]:
    """The overview as pairs of a name and a value."""
    seen = report.overview
    nodes = ", ".join(f"{count:,} {state}" for state, count in seen.nodes.items())
    skipped = f", {seen.skipped:,} of them skipped" if seen.skipped else ""
    failed = f", {seen.failed:,} of them failed" if seen.failed else ""
    return [
        ("time", f"{clock(seen.first)} to {clock(seen.last)} UTC"),
        ("sequences", f"{seen.first_sequence:,} to {seen.last_sequence:,}"),
        ("commits", f"{seen.commits:,}{skipped}"),
        ("nodes", nodes or "none"),
        ("requests", f"{seen.decisions:,} routed, {seen.completions:,} completed{failed}"),
        ("sessions", f"{seen.sessions:,}"),
        ("hit rate", readable("hit rate", seen.hit_rate)),
    ]
