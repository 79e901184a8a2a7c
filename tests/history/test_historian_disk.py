"""A full disk under the historian: it says so, waits with what it read, and goes on when there is room."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.projections.errors import BadHistory, HistoryFull
from kvplane.projections.history import archive
from kvplane.projections.history.store import Store
from kvplane.services.history import ingest as ingestion
from kvplane.services.history.ingest import Retention
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from tests.support.disks import filled
from tests.support.historians import (
    FAR,
    NAME,
    Scribe,
    check_unbroken,
    counted,
    counted_rows,
    historian,
    listed_files,
    messages_of,
    one_go,
    question,
)
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from duckdb import DuckDBPyConnection
    from nats.aio.client import Client

    from kvplane.projections.history.archive import File, Part
    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("free", [0, 100_000])
async def test_a_full_disk_stops_nothing_but_the_history(
    server: Server, client: Client, small: Path, monkeypatch: pytest.MonkeyPatch, free: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(ingestion, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(ingestion, "FLUSH_BYTES", 50_000)
    monkeypatch.setattr(ingestion, "PAUSE_BYTES", 200_000)
    monkeypatch.setattr(ingestion, "MAINTAIN_SECONDS", 0.1)
    scribe = Scribe(client)
    await scribe.write(300)
    async with historian(server.url, small / "h") as running:
        ingest = running.ingest
        sizes = []
        with filled(small, free=free):
            last = await scribe.write(5000)
            await until(lambda: ingest.failure)
            assert "disk of the history is full" in ingest.failure
            await until(lambda: ingest.follower.paused)
            held = ingest.state.sequence
            for _ in range(20):
                await anyio.sleep(0.05)
                sizes.append(ingest._rows.size)
                status = await question(client, "history.status", messages.StatusRequest())
                assert status["healthy"] is False
                assert "disk of the history is full" in status["failure"]
                # It may be away for a moment, and says so; it may not end the historian.
                with suppress(ServiceFault):
                    await question(client, "sql", messages.SqlRequest(sql="SELECT count(*) FROM commits"))
            assert ingest.state.sequence == held < last
            assert max(sizes) < ingestion.PAUSE_BYTES + 20_000
            assert ingest.stored < held
        assert await ingest.reached(last, seconds=10)
        assert ingest.failure == ""
        status = await question(client, "history.status", messages.StatusRequest())
        assert (status["healthy"], status["stored"]) == (True, last)
        answer = await question(client, "sql", messages.SqlRequest(sql="SELECT count(*) FROM commits"))
        assert answer["rows"] == [[last]]
    log = await messages_of(client)
    store, once = Store(small / "h", NAME), one_go(tmp_path / "once", log)
    assert check_unbroken(store.connection, last) == 1
    assert counted_rows(store) == counted(log)
    assert store.content() == once.content()
    store.close()
    once.close()


async def test_a_disk_that_fills_while_an_hour_is_archived_loses_nothing(
    server: Server, client: Client, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ingestion, "RETRY_SECONDS", 0.2)
    scribe = Scribe(client)
    last = await scribe.write(3000)
    async with historian(server.url, small / "h") as running:
        ingest = running.ingest
        for free in (0, 4096, 30_000, 200_000):
            with filled(small, free=free):
                with pytest.raises(HistoryFull, match="disk of the history is full"):
                    await ingest.maintain(FAR)
                status = await question(client, "history.status", messages.StatusRequest())
                assert (status["archived"], status["archive_files"]) == (0, 0)
            last = await scribe.write(10)
            assert await ingest.reached(last, seconds=10)
        await ingest.maintain(FAR)
        await ingest.maintain(FAR)
        assert ingest.store.checkpoint.archived == last
        log = await messages_of(client)
        once = one_go(tmp_path / "once", log)
        assert ingest.store.content() == once.content()
        listed, there = listed_files(ingest.store)
        assert listed == there
        once.close()


async def test_maintenance_waits_out_a_history_that_is_opened_anew(
    server: Server, client: Client, tmp_path: Path
) -> None:
    scribe = Scribe(client)
    last = await scribe.write(500)
    async with historian(server.url, tmp_path / "h") as running:
        ingest = running.ingest
        ingest.store.close()
        for _ in range(2):
            with pytest.raises(BadHistory):
                await ingest.maintain(FAR)
        ingest.broken()
        await until(lambda: not ingest._broken)
        await ingest.maintain(FAR)
        assert ingest.store.checkpoint.archived == last


async def test_the_history_is_opened_anew_while_somebody_still_reads_it(
    server: Server, client: Client, tmp_path: Path
) -> None:
    scribe = Scribe(client)
    await scribe.write(100)
    async with historian(server.url, tmp_path / "h") as running:
        reading = running.ingest.store.cursor()
        running.ingest.broken()
        last = await scribe.write(100)
        assert await running.ingest.reached(last, seconds=10)
        reading.close()
        answer = await question(client, "sql", messages.SqlRequest(sql="SELECT count(*) FROM commits"))
        assert answer["rows"] == [[last]]


async def test_an_hour_that_is_too_much_is_archived_in_pieces_and_keeps_nothing_from_expiring(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe, export = Scribe(client), archive.export
    first = await scribe.write(200)
    async with historian(server.url, tmp_path / "h", retention=Retention(days=1)) as running:
        ingest = running.ingest
        await ingest.maintain()
        ingest.retention.days = None
        await ingest.maintain(FAR)
        assert ingest.store.checkpoint.archived == first
        last = await scribe.write(300)
        assert await ingest.reached(last, seconds=10)
        most = 0

        def small(store: Store, part: Part, cursor: DuckDBPyConnection) -> list[File]:
            if part.last - part.archived > most:
                raise BadHistory("no memory")
            return export(store, part, cursor)

        monkeypatch.setattr(archive, "export", small)
        ingest.retention.days = 1
        with pytest.raises(BadHistory, match="no memory"):
            await ingest.maintain(FAR)
        # Nothing was archived, and what is old is gone all the same.
        assert {file.table for file in archive.listed(ingest.store)} <= set(archive.KEPT)
        assert ingest.store.checkpoint.archived == first
        most = 50
        monkeypatch.setattr(archive, "PIECE_BYTES", 1 << 20)
        ingest.retention.days = None
        await ingest.maintain(FAR)
        assert ingest.store.checkpoint.archived == last
        parts = {file.last for file in archive.listed(ingest.store) if file.last > first}
        assert len(parts) >= 6
        assert counted_rows(ingest.store, first) == counted(await messages_of(client), first)
