"""Queries that DuckDB can't stop, and askers that want all places: what the system ends, and what others feel of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events.log.connection import connected
from kvplane.services.history import places
from kvplane.services.history.pages import FORKSERVER, OWN_BYTES, Limits
from kvplane.services.history.places import Place, Places
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import QueryLimit, Refused
from kvplane.services.rpc.client import ask
from tests.support.historians import NAME, Scribe, historian
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

DOTS = "SELECT " + "a." * 15_000 + "a FROM (SELECT 1 AS a)"
NESTED = (
    "SELECT len(list_transform(l, lambda x: list_transform(l, lambda y: list_transform(l, lambda z: x + y + z)))) "
    "FROM (SELECT list(range) AS l FROM range(600)) t"
)
DIGITS = "(SELECT string_agg(range::VARCHAR, '') AS s FROM range(3000000)) t"
DOUBLED = f"SELECT length({'||'.join(['s'] * 200)}) FROM {DIGITS}"
LONG = "SELECT sum(hash(a.range * b.range)) FROM range(3000000) a, range(2000000) b"
PAGED = "FROM range(1000000)"


async def sql(client: Client, query: str, **options: Any) -> messages.SqlAnswer:
    request = messages.SqlRequest(sql=query, **options)
    return await ask(client, f"kv.{NAME}.sql", request, messages.SqlAnswer, seconds=30)


async def code_of(client: Client, query: str, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        await sql(client, query, **options)
    return caught.value.code


def processes() -> list[int]:
    """The processes that answer now."""
    assert FORKSERVER._process is not None
    pid = FORKSERVER._process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def peak(pid: int) -> int:
    """Most bytes of memory that a process ever had; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


async def test_what_duckdb_does_not_stop_is_ended_by_the_system(server: Server, client: Client, tmp_path: Path) -> None:
    """A chain of dots takes 39 s before the first row, nested lambdas 8 GB: neither is under DuckDB's limits."""
    await Scribe(client).write(20)
    limits = Limits(seconds=20, memory=400_000_000)
    async with historian(server.url, tmp_path / "h", limits=limits) as running, connected([server.url], "b") as other:
        # The first one loads DuckDB.
        assert (await sql(client, "SELECT count(*) FROM commits")).rows == [[20]]
        codes: list[str] = []
        async with anyio.create_task_group() as group:

            async def dots() -> None:
                codes.append(await code_of(client, DOTS, seconds=1))

            group.start_soon(dots)
            await until(lambda: len(processes()) == 1)
            assert (await sql(other, "SELECT count(*) FROM commits")).rows == [[20]]
            assert codes == []
        assert codes == ["time_limit"]
        for query in (NESTED, DOUBLED):
            most = 0
            async with anyio.create_task_group() as group:

                async def ended(query: str = query) -> None:
                    assert await code_of(client, query) == "memory_limit"
                    group.cancel_scope.cancel()

                group.start_soon(ended)
                while True:
                    most = max(most, *map(peak, processes()), 0)
                    await anyio.sleep(0.02)
            # What it began with is DuckDB itself.
            assert 0 < most < limits.own_memory + OWN_BYTES + (200 << 20)
        assert running.pages.open == 0
        await until(lambda: processes() == [])


async def test_a_forkserver_that_was_killed_is_started_anew(server: Server, client: Client, tmp_path: Path) -> None:
    await Scribe(client).write(20)
    async with historian(server.url, tmp_path / "h") as running:
        left = await sql(client, PAGED)
        assert FORKSERVER._process is not None
        os.kill(FORKSERVER._process.pid, signal.SIGKILL)
        FORKSERVER._process.wait()
        assert (await sql(client, "SELECT count(*) FROM commits")).rows == [[20]]
        assert (await sql(client, "SELECT count(*) FROM decisions")).stored == 20
        request = messages.SqlNextRequest(result=left.result, close=True)
        await ask(client, left.next, request, messages.SqlAnswer)
        assert running.pages.open == 0


async def test_results_that_nobody_reads_keep_nobody_out(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "WANTED_SECONDS", 0.3)
    monkeypatch.setattr(places, "PATIENCE_SECONDS", 1.0)
    await Scribe(client).write(20)
    async with (
        historian(server.url, tmp_path / "h") as running,
        connected([server.url], "b") as second,
        connected([server.url], "c") as third,
    ):
        left = [await sql(client, PAGED) for _ in range(places.MOST_OF_ONE)]
        assert await code_of(client, "SELECT 1") == "busy"
        assert (await sql(second, PAGED)).next
        assert (await sql(third, "SELECT count(*) FROM commits")).rows == [[20]]
        assert running.pages.open == places.MOST_OF_ONE
        with pytest.raises(Refused, match="others waited for its place"):
            await ask(client, left[0].next, messages.SqlNextRequest(result=left[0].result), messages.SqlAnswer)


async def test_one_that_has_several_places_gives_one_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WANTED_SECONDS", 0.05)
    monkeypatch.setattr(places, "PATIENCE_SECONDS", 0.3)
    given, ended = Places(), list[str]()
    first = []
    for number in range(3):

        def end(reason: str, number: int = number) -> None:
            ended.append(f"a{number}: {reason}")

        first.append(await given.take("a", end))
    await given.take("b", lambda reason: ended.append(f"b: {reason}"))
    with pytest.raises(QueryLimit, match="3 of your queries run"):
        await given.take("a", ended.append)
    assert ended == []
    await given.take("c", ended.append)
    assert ended == ["a2: others waited, and you have several: ask again"]
    await given.take("d", ended.append)
    assert ended[1:] == ["a1: others waited, and you have several: ask again"]
    # Now everybody has one.
    with pytest.raises(QueryLimit, match="as many queries run as may at a time"):
        await given.take("e", ended.append)
    given.give(first[0])
    assert isinstance(await given.take("e", ended.append), Place)


async def test_who_has_fewest_comes_first() -> None:
    given, order = Places(concurrent=2), list[str]()
    held = await given.take("a", order.append)
    other = await given.take("b", order.append)
    async with anyio.create_task_group() as group:

        async def take(asker: str) -> None:
            place = await given.take(asker, order.append)
            order.append(asker)
            given.give(place)

        for asker in ("a", "a", "c"):
            group.start_soon(take, asker)
        await until(lambda: len(given._waiting) == 3)
        given.give(other)
        await until(lambda: len(order) == 3)
        given.give(held)
    assert order == ["c", "a", "a"]
