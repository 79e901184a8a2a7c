"""SQL over NATS under attack: pages of small messages, results that are left open, limits, and what ingestion feels of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.embedded import server as servers
from kvplane.services.embedded.server import start_server
from kvplane.services.history import client as asking
from kvplane.services.history import pages as paging
from kvplane.services.history import places
from kvplane.services.history.pages import Limits
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused
from kvplane.services.rpc.client import ask
from tests.support.historians import NAME, Scribe, historian, question
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

SMALL = 64 << 10
LONG = "SELECT sum(hash(a.range * b.range)) FROM range(3000000) a, range(2000000) b"


@pytest.fixture
async def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A client of a server that takes messages of 64 KB."""
    monkeypatch.setattr(servers, "MAX_PAYLOAD", SMALL)
    running = await start_server(tmp_path / "data", port=free_port())
    async with connected([running.url], "test") as client:
        assert client.max_payload == SMALL
        await Scribe(client).write(100)
        yield client
    await running.stop()


def url(client: Client) -> str:
    assert client.connected_url is not None
    return client.connected_url.geturl()


async def sql(client: Client, query: str, **options: Any) -> messages.SqlAnswer:
    return await ask(
        client, f"kv.{NAME}.sql", messages.SqlRequest(sql=query, **options), messages.SqlAnswer, seconds=10
    )


async def following(client: Client, answer: messages.SqlAnswer, *, close: bool = False) -> messages.SqlAnswer:
    request = messages.SqlNextRequest(result=answer.result, close=close)
    return await ask(client, answer.next, request, messages.SqlAnswer, seconds=10)


async def refused(client: Client, query: str, **options: Any) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        await sql(client, query, **options)
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize(
    ("value", "names", "rows"),
    [
        ("range % 3 = 0", "i", 40_000),
        (f"range, substr('{'é' * 500}', 1, range::INT % 500)", "i", 3000),
        ("range / 7, 1e300, 0.5, -1.0", "i", 5000),
        ("{'a name that is far longer than what it names, again and again': range % 2 = 0}", "i", 5000),
        (f"range || '{'x' * 14000}'", "i, wide", 20),
        ("NULL", "i", 40_000),
    ],
)
async def test_pages_fit_into_small_messages_and_lose_no_row(
    small: Client, tmp_path: Path, value: str, names: str, rows: int
) -> None:
    async with historian(url(small), tmp_path / "h") as running:
        client = small
        query = f"SELECT * FROM (SELECT range, {value} FROM range({rows})) t({names}) ORDER BY i"
        found: list[int] = []
        pages = 0
        async for page in asking.pages(client, NAME, query, seconds=5):
            found += page["i"].to_pylist()
            pages += 1
        assert found == list(range(rows))
        assert pages > 1
        # As JSON and as MessagePack, of which either may be the longer one.
        for encode in (msgspec.json.encode, msgspec.msgpack.encode):
            found = []
            subject, request = f"kv.{NAME}.sql", encode(messages.SqlRequest(sql=query))
            while subject:
                raw = await client.request(subject, request, timeout=10)
                assert len(raw.data) <= SMALL
                decode: Any = msgspec.json.decode if encode is msgspec.json.encode else msgspec.msgpack.decode
                answer = decode(raw.data, type=messages.SqlAnswer)
                found += [row[0] for row in answer.rows]
                subject, request = answer.next, encode(messages.SqlNextRequest(result=answer.result))
            assert found == list(range(rows))
        assert running.pages.open == 0


async def test_a_row_that_fits_into_no_message_is_refused(small: Client, tmp_path: Path) -> None:
    async with historian(url(small), tmp_path / "h") as running:
        client = small
        for form in ("rows", "arrow"):
            query = f"SELECT s || s || s || s AS wide FROM (SELECT '{'x' * 25_000}' AS s)"
            code, message = await refused(client, query, form=form)
            assert code == "memory_limit"
            assert "one row has 100" in message
            assert "ask for fewer columns" in message
        assert running.pages.open == 0


async def test_names_of_columns_that_fit_into_no_message_are_refused(small: Client, tmp_path: Path) -> None:
    async with historian(url(small), tmp_path / "h") as running:
        client = small
        for form in ("rows", "arrow"):
            code, message = await refused(client, f"SELECT 1 AS {'x' * 30_000}", form=form)
            assert code == "memory_limit"
            assert "the names of the columns take" in message
        assert running.pages.open == 0
        assert (await sql(client, "SELECT 1")).rows == [[1]]


async def test_a_closed_result_has_no_next_page(small: Client, tmp_path: Path) -> None:
    async with historian(url(small), tmp_path / "h") as running:
        client = small
        answer = await sql(client, "FROM range(100000)")
        assert answer.next
        assert running.pages.open == 1
        await following(client, answer)
        await following(client, answer, close=True)
        assert running.pages.open == 0
        with pytest.raises(Refused, match="there is no such result") as caught:
            await following(client, answer)
        assert caught.value.code == "bad_request"


async def test_an_abandoned_result_is_closed_and_a_slow_one_is_not(
    small: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with historian(url(small), tmp_path / "h") as running:
        client = small
        left = [await sql(client, "FROM range(100000)") for _ in range(places.MOST_OF_ONE)]
        assert (await refused(client, "SELECT 1")) == (
            "busy", "3 of your queries run or have pages left, as many as one may have: ask again in a moment",
        )  # fmt: skip
        monkeypatch.setattr(places, "IDLE_SECONDS", 0.3)
        monkeypatch.setattr(paging, "IDLE_SECONDS", 0.3)
        # The loop that looks for them sleeps as long as it did before.
        async with anyio.create_task_group() as group:
            group.start_soon(running.pages.run)
            await until(lambda: running.pages.open == 0, 5)
            with pytest.raises(Refused, match="nobody asked for its next page in 0.3 s"):
                await following(client, left[0])
            # One page takes longer than a result may be idle.
            began = time.monotonic()
            assert await refused(client, LONG, seconds=1.5) == (
                "time_limit", "stopped after 1.5 s: raise the limit with --timeout or ask for less",
            )  # fmt: skip
            assert time.monotonic() - began > 1.4
            assert (await sql(client, "SELECT 1")).rows == [[1]]
            group.cancel_scope.cancel()


async def test_limits_are_named(server: Server, client: Client, tmp_path: Path) -> None:
    await Scribe(client).write(10)
    limits = Limits(seconds=1.0, rows=1000, memory=100_000_000, spill=10_000_000)
    async with historian(server.url, tmp_path / "h", limits=limits) as running:
        code, message = await refused(client, LONG, seconds=60)
        assert (code, "stopped after 1 s" in message) == ("time_limit", True)
        code, message = await refused(client, "SELECT list(range) FROM range(300000000)", seconds=60)
        assert code in {"memory_limit", "time_limit"}
        for asked, most in ((None, 1000), (5000, 1000), (10, 10)):
            answer = await sql(client, "FROM range(100000)", rows=asked)
            assert answer.rows is not None
            assert len(answer.rows) == most
            with pytest.raises(Refused, match=f"the first {most} rows of more") as caught:
                await following(client, answer)
            assert caught.value.code == "row_limit"
        assert (await refused(client, "SELECT nothing FROM commits"))[0] == "bad_sql"
        assert (await refused(client, "DELETE FROM live.commits"))[0] == "bad_sql"
        assert (await refused(client, " "))[0] == "bad_request"
        assert running.pages.open == 0
        assert (await sql(client, "SELECT count(*) FROM commits")).rows == [[10]]


async def test_ingestion_goes_on_beside_queries(server: Server, client: Client, tmp_path: Path) -> None:
    scribe = Scribe(client)
    await scribe.write(100)
    async with historian(server.url, tmp_path / "h") as running, anyio.create_task_group() as group:

        async def busy() -> None:
            assert (await refused(client, LONG, seconds=4))[0] == "time_limit"

        for _ in range(2):
            group.start_soon(busy)
        await until(lambda: len(running.pages.processes()) == 2)
        for _ in range(3):
            last = await scribe.write(300)
            assert await running.ingest.reached(last, seconds=3)
            answer = await sql(client, "SELECT count(*) FROM commits")
            assert answer.rows == [[last]]
            assert answer.stored == last
        status = await question(client, "history.status", messages.StatusRequest())
        assert status["stored"] == last


async def test_an_empty_result_has_rows_that_are_none(server: Server, client: Client, tmp_path: Path) -> None:
    """As any client reads it, without kvplane's structs."""
    await Scribe(client).write(3)
    request = {"sql": "SELECT sequence FROM commits WHERE false"}
    async with historian(server.url, tmp_path / "h"):
        for encode, decode in (
            (msgspec.json.encode, msgspec.json.decode),
            (msgspec.msgpack.encode, msgspec.msgpack.decode),
        ):
            answer = decode((await client.request(f"kv.{NAME}.sql", encode(request), timeout=10)).data)
            assert answer["rows"] == []
            assert [column["name"] for column in answer["columns"]] == ["sequence"]
            arrow = decode(
                (await client.request(f"kv.{NAME}.sql", encode({**request, "form": "arrow"}), timeout=10)).data
            )
            assert "rows" not in arrow
            assert arrow["data"]
