"""The report on a history: what it asks, what it says, and the files it writes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.stream import open_stream
from kvplane.projections.fleet import FleetState
from kvplane.projections.history.rows import Rows, Waiting
from kvplane.projections.history.store import Store
from kvplane.services.cli import main
from kvplane.services.history.historian import Historian
from kvplane.services.history.report import BUCKETS, LINES, Range, collect, extent, headline, readable, step
from kvplane.services.history.report_html import page
from kvplane.services.history.report_plot import png
from tests.support.fold_given import SECOND, START, Given, registered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa
    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server
    from kvplane.services.history.report import Report, Section

BEGIN = datetime.fromtimestamp(START // SECOND, UTC).replace(tzinfo=None)
EVIL = '<script>alert("$x^$")</script>'
SILENT = "_quiet"


class Asked:
    """A stored history that is asked directly."""

    def __init__(self, folder: Path, given: Given) -> None:
        self.store = Store(folder / "history", "f")
        state, rows, waiting = FleetState("f"), Rows(), Waiting()
        for message in given.messages:
            rows.add(message, state.apply(message), state, waiting)
        if len(rows):
            self.store.write(rows, time=state.time)

    async def __call__(self, query: str) -> pa.Table:
        return self.store.connection.sql(query).to_arrow_table()

    async def report(self, since: datetime | None = None, until: datetime | None = None) -> Report:
        found = await collect(self, "f", Range(since, until))
        assert found is not None
        return found


def lived() -> Given:
    """Ten requests, one a minute, on two nodes with odd names; a move, an eviction, a loss and a commit of a stranger."""
    log = Given()
    epoch = log.node(registered(EVIL))
    log.node(registered(SILENT))
    log.put("control", "", types.PolicyChanged("ttft", {}))
    log.put("session", "m", types.SessionAssigned("s", "m", EVIL, "new"))
    for number in range(10):
        node, cached = (EVIL, 32) if number % 2 else (SILENT, 0)
        log.put(
            "access", "r1",
            types.RequestRouted(
                f"q{number}", "m", node, cached // 16, 4, 64, pack_hashes([1, 2, 3, 4]), policy="ttft", best=2, decided=1,
                candidates=[types.Candidate(node, cached // 16, 0.5)],
            ),
            after=59,
        )  # fmt: skip
        log.put("access", node, types.RequestCompleted(f"q{number}", node, "ok", 64, cached, 8, 0.25, 1.0))
    log.put("cache", EVIL, types.BlocksStored(EVIL, epoch, 1, pack_hashes([1, 2, 3, 4])))
    log.put("cache", EVIL, types.BlocksRemoved(EVIL, epoch, 2, pack_hashes([4])))
    log.put("session", "m", types.SessionAssigned("s", "m", SILENT, f"from {EVIL}"))
    log.raw("kv.f.cache.x", b"nonsense", {"Kv-Writer": "stranger"})
    log.put("node", EVIL, types.NodeLost(EVIL, "silent"))
    return log


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    made = Asked(tmp_path, lived())
    yield made
    made.store.close()


def section(report: Report, name: str) -> Section:
    return next(section for section in report.sections if section.name == name)


async def test_a_report_says_what_happened(asked: Asked) -> None:
    report = await asked.report()
    seen = report.overview
    assert (seen.commits, seen.skipped, seen.nodes) == (29, 1, {"up": 1, "lost": 1})
    assert (seen.decisions, seen.completions, seen.failed, seen.hit_rate) == (10, 10, 0, 0.25)
    assert dict(headline(report))["sequences"] == "1 to 29"
    assert section(report, "hit_rate_by_node").rows == [[EVIL, 5, 320, 160, 0.5], [SILENT, 5, 320, 0, 0.0]]
    assert section(report, "ttft_by_policy").rows == [["ttft", "m", 10, 0.25, 0.25, 0.25, 0.25, 0.25]]
    assert section(report, "predicted_vs_delivered").rows[0] == [EVIL, 5, 160, 160, 0, 0, 1.0]
    assert section(report, "evictions").rows == [[EVIL, 4, 1, 0]]
    assert section(report, "session_moves").rows == [[EVIL, SILENT, 1, 1]]
    assert section(report, "last_session_moves").rows[0][1:4] == ["s", EVIL, SILENT]
    assert section(report, "regret").rows == [["ttft", "m", 10, 5, 1.0, 2.0, 160]]
    assert section(report, "node_timeline").rows[0][1:4] == [EVIL, "lost", "silent"]
    assert section(report, "hot_prefixes").rows[0][:4] == [4, "m", 10, 640]
    skipped = section(report, "skipped_commits").rows[0]
    assert (skipped[:2], skipped[-2:]) == (["invalid", 1], [["x"], ["stranger"]])
    assert len(section(report, "hit_rate").rows) == 10
    assert len(report.lost) == 1


async def test_a_range_limits_everything_but_what_nodes_are(asked: Asked) -> None:
    since, until = BEGIN + timedelta(seconds=64 + 60), BEGIN + timedelta(seconds=64 + 240)
    report = await asked.report(since, until)
    assert since <= report.overview.first
    assert report.overview.last < until
    assert report.overview.decisions == 3
    assert report.overview.nodes == {"up": 2}
    assert {row[0] for row in section(report, "hit_rate_by_node").rows} == {EVIL, SILENT}
    assert [part.name for part in report.sections if not part.rows] == [
        "evictions", "session_moves", "last_session_moves", "node_timeline", "skipped_commits",
    ]  # fmt: skip
    assert sum(row[2] for row in section(report, "hit_rate").rows) == 3
    assert (await asked.report(BEGIN + timedelta(seconds=608))).overview.nodes == {"up": 1, "lost": 1}
    assert await collect(asked, "f", Range(BEGIN + timedelta(days=1))) is None
    assert await extent(asked) == (BEGIN + timedelta(seconds=1), BEGIN + timedelta(seconds=609))


async def test_headers_that_are_no_text_break_nothing(tmp_path: Path) -> None:
    log = Given()
    for writer in ("b", "\udcff", "a"):
        log.raw("kv.f.cache.x", b"nonsense", {"Kv-Writer": writer})
    asked = Asked(tmp_path, log)
    assert section(await asked.report(), "skipped_commits").rows[0][-1] == ["a", "b"]
    asked.store.close()


async def test_an_empty_history_has_no_report(tmp_path: Path) -> None:
    asked = Asked(tmp_path, Given())
    assert await collect(asked, "f", Range()) is None
    assert await extent(asked) is None
    asked.store.close()


async def test_many_nodes_are_named_up_to_a_number(tmp_path: Path) -> None:
    log = Given()
    for number in range(LINES + 5):
        log.node(registered(f"n{number:02}"))
        for again in range(number + 1):
            log.put("access", "r1", types.RequestRouted(f"q{number}.{again}", "m", f"n{number:02}", 0, 1, 16))
    asked = Asked(tmp_path, log)
    report = await asked.report()
    (chart,) = [chart for chart in report.charts if chart.name == "requests"]
    assert {row[1] for row in chart.rows} == {None, *(f"n{number:02}" for number in range(5, LINES + 5))}
    assert sum(row[2] for row in chart.rows) == report.overview.decisions
    assert png(report).startswith(b"\x89PNG")
    asked.store.close()


class Reader(HTMLParser):
    """What an HTML file holds: tags, texts of cells, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "srcset", "href", "action"}]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.texts.add(data)


async def test_a_page_needs_nothing_else_and_runs_nothing(asked: Asked) -> None:
    report = await asked.report()
    text = page(report, datetime(2026, 1, 31, 12))  # noqa: DTZ001 - UTC
    reader = Reader()
    reader.feed(text)
    assert not {"script", "link", "iframe", "object"} & reader.tags
    assert EVIL in reader.texts
    assert SILENT in reader.texts
    assert len(reader.addresses) == 2 * len(report.charts)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert page(report, datetime(2026, 1, 31, 12)) == text  # noqa: DTZ001 - the same


def test_what_is_not_printable_does_not_reach_a_terminal() -> None:
    assert readable("node", "a\x1b[31m") == "a\\x1b[31m"
    assert [readable("hit rate", 0.5), readable("mean", 0.5), readable("sequence", 12345), readable("commits", 12345)] == [
        "50.0%", "0.5", "12345", "12,345",
    ]  # fmt: skip


@given(st.timedeltas(timedelta(0), timedelta(days=10_000)), st.sampled_from([12, 60]))
def test_a_range_has_few_steps(span: timedelta, most: int) -> None:
    size = step(BEGIN, BEGIN + span, most)
    assert size == BUCKETS[-1] or span.total_seconds() / size + 1 <= most
    smaller = [bucket for bucket in BUCKETS if bucket < size]
    assert not smaller or span.total_seconds() / smaller[-1] + 1 > most


def run(url: str, *arguments: str) -> int:
    """The command, in this process; its exit code."""
    try:
        main(["report", *arguments, "--server", url, "--fleet", "f"])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


async def test_the_command(
    server: Server, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    await open_stream(client.jetstream(), "f", create=True)
    historian = Historian(client, "f", tmp_path / "history", servers=[server.url])
    async with anyio.create_task_group() as group:
        await group.start(historian.run)

        async def history_show(*arguments: str) -> tuple[int, str, str]:
            code = await anyio.to_thread.run_sync(partial(run, server.url, *arguments))
            return code, *capsys.readouterr()

        code, out, _ = await history_show()
        assert (code, "The history is empty" in out) == (0, True)
        code, out, _ = await history_show("--json")
        assert (code, json.loads(out)) == (0, None)

        log = lived().messages
        for message in log:
            await client.jetstream().publish(message.subject, message.body, headers={**(message.headers or {})})
        assert await historian.ingest.reached(len(log), seconds=10)

        code, out, _ = await history_show()
        assert code == 0
        assert all(text in out for text in (EVIL, SILENT, "1 to 29", "invalid", "Session moves", "Regret"))
        code, out, _ = await history_show("--json")
        found = json.loads(out)
        assert (code, found["overview"]["commits"]) == (0, 29)
        assert {part["name"]: part["total"] for part in found["sections"]}["node_timeline"] == 3
        assert len(found["charts"]) == 6
        code, out, _ = await history_show("--until", "2020-01-01")
        assert (code, "The history holds nothing of that time" in out) == (0, True)

        html, picture = tmp_path / "page.html", tmp_path / "page.png"
        assert (await history_show("--html", str(html), "--png", str(picture)))[:2] == (0, "")
        assert html.read_text().startswith("<!doctype html>")
        assert picture.read_bytes().startswith(b"\x89PNG")
        for arguments, sentence in (
            (["--html", str(tmp_path)], "can't be written: Is a directory"),
            (["--png", str(tmp_path / "no" / "x.png")], "is no folder; make it first"),
            (["--since", "soon"], "is no moment"),
            (["--since", "2026-01-02", "--until", "2026-01-01"], "is not before --until"),
        ):
            code, out, error = await history_show(*arguments)
            assert (code, out) == (1, "")
            assert sentence in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "history", "page.html", "page.png"]
        group.cancel_scope.cancel()
