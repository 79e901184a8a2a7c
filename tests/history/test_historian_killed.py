"""Kill -9 of historians while they store, archive and let go: no row is lost or doubled, and none is ahead of the log.

Each round is a seed, so a failure can be run again alone with `KILL_SEEDS=7 pytest tests/history/test_historian_killed.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events.errors import KvplaneError
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive
from kvplane.projections.history.archive import KEPT
from kvplane.projections.history.rows import Rows, Waiting
from kvplane.projections.history.store import Store
from kvplane.projections.history.tables import TABLES
from kvplane.services.history import ingest as ingestion
from kvplane.services.history.ingest import Ingest, Retention
from kvplane.services.process import logs
from tests.support.historians import (
    FAR,
    NAME,
    Scribe,
    check_unbroken,
    counted,
    counted_rows,
    listed_files,
    messages_of,
    one_go,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

SEEDS = [int(seed) for seed in os.environ.get("KILL_SEEDS", ",".join(map(str, range(20)))).split(",")]
KEPT_BYTES = 150_000
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.history.test_historian_killed"])


def live(url: str, folder: str, size: int | None, busy: Connection) -> None:
    """A historian's process. Every moment is one in which a closed hour is archived, or an old one goes."""
    logs.configure("error")
    ingestion.FLUSH_SECONDS = 0.02
    ingestion.SNAPSHOT_COMMITS = 200
    anyio.run(_live, url, Path(folder), size, busy, backend_options={"use_uvloop": True})


async def _live(url: str, folder: Path, size: int | None, busy: Connection) -> None:
    async with connected([url], "historian") as client, anyio.create_task_group() as group:
        ingest = Ingest(client, NAME, folder, Retention(size=size))
        group.start_soon(ingest.run)
        await ingest.follower.caught_up.wait()
        busy.send(())
        while True:
            # As `maintain` does it, but one hour at a time: there is always another one, and nothing would ever be let go.
            part = await ingest.beside(partial(archive.closed, now=FAR))
            if part is not None:
                files = await ingest.beside(partial(archive.export, ingest.store, part))
                await ingest.in_thread(partial(archive.adopt, ingest.store, part, files))
                busy.send(())
            await ingest.maintain(0)


def one_life(url: str, folder: Path, size: int | None, rng: random.Random) -> None:
    """Start a historian and kill it, while it begins or while it works."""
    progress, busy = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=live, args=(url, str(folder), size, busy), daemon=True)
    process.start()
    # Nothing, the log's end, an archived hour: so many steps it gets further, whatever else the machine does.
    for _ in range(rng.randrange(4)):
        assert progress.poll(30)
        progress.recv()
    time.sleep(rng.uniform(0.02, 0.3))
    assert process.exitcode is None, "it ended by itself"
    process.kill()
    process.join()
    process.close()
    progress.close()
    busy.close()


async def check_killed(client: Client, folder: Path) -> None:
    """What a killed historian left: rows up to the checkpoint, none beyond it, and nothing that isn't on the log."""
    store = Store(folder, NAME)
    checkpoint = store.checkpoint
    assert checkpoint.archived <= checkpoint.sequence
    assert checkpoint.sequence <= (await open_stream(client.jetstream(), NAME)).last_seq
    check_unbroken(store.connection, checkpoint.sequence)
    listed, there = listed_files(store)
    assert listed <= there
    store.close()


async def finish(client: Client, folder: Path, last: int) -> Store:
    """Let a historian come to the log's end in peace."""
    ingest = Ingest(client, NAME, folder)
    async with anyio.create_task_group() as group:
        group.start_soon(ingest.run)
        assert await ingest.reached(last, seconds=20)
        group.cancel_scope.cancel()
    return Store(folder, NAME)


def check_kept(store: Store, once: Store, first: int) -> None:
    """What retention left is what the log says, from `first` on; what never expires is whole."""
    for table in TABLES:
        since = 0 if table.name in KEPT else first
        # With its decision, what is known about a completion may be gone when it comes.
        columns = "* EXCLUDE (routed, model, policy, predicted_tokens)" if table.name == "completions" else "*"
        found, wanted = (
            each.cursor()
            .execute(
                f"SELECT count(*), bit_xor(hash(t)) FROM (SELECT {columns} FROM {table.name} WHERE sequence >= {since}) t"
            )
            .fetchall()
            for each in (store, once)
        )
        assert found == wanted, table.name


async def test_a_killed_historian_loses_and_doubles_nothing(server: Server, client: Client, tmp_path: Path) -> None:
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    scribe = Scribe(client, seed=SEEDS[0])
    await scribe.write(50)
    done = anyio.Event()

    async def write() -> None:
        while not done.is_set():
            await scribe.write(100)
            await anyio.sleep(0.2)

    async def life(folder: Path, size: int | None, rng: random.Random) -> None:
        await anyio.to_thread.run_sync(one_life, server.url, folder, size, rng)
        if (folder / "history.duckdb").exists():
            await check_killed(client, folder)

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        for seed in SEEDS:
            rng = random.Random(seed)
            try:
                async with anyio.create_task_group() as both:
                    both.start_soon(life, whole, None, random.Random(rng.random()))
                    both.start_soon(life, limited, KEPT_BYTES, random.Random(rng.random()))
            except* (AssertionError, KvplaneError) as errors:
                errors.add_note(f"seed {seed}; run it alone with KILL_SEEDS={seed}")
                raise
        done.set()
    log = await messages_of(client)
    last = len(log)
    once = one_go(tmp_path / "once", log)
    store = await finish(client, whole, last)
    assert check_unbroken(store.connection, last) == 1
    assert counted_rows(store) == counted_rows(once) == counted(log)
    assert store.content() == once.content()
    listed, there = listed_files(store)
    assert listed == there
    # Or the test would have attacked nothing.
    assert len(listed) > len(SEEDS) / 4
    assert last > 100 * len(SEEDS)
    store.close()

    store = await finish(client, limited, last)
    first = check_unbroken(store.connection, last)
    assert counted_rows(store, first - 1) == counted(log, first - 1)
    check_kept(store, once, first)
    listed, there = listed_files(store)
    assert listed == there
    if len(SEEDS) > 5:
        assert first > 1
    store.close()
    once.close()


class Stopped(Exception):
    """A process that was killed gets no further."""


class Stopping:
    """A connection that stops before the n-th statement that changes or commits."""

    def __init__(self, connection: Any, statements: int) -> None:
        self._connection = connection
        self.left = statements

    def execute(self, *arguments: Any) -> Any:
        if str(arguments[0]).startswith(("BEGIN", "UPDATE", "DELETE", "COMMIT")):
            if not self.left:
                raise Stopped
            self.left -= 1
        return self._connection.execute(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def stopped(store: Store, work: Callable[[], object], statements: int) -> bool:
    """Do some work up to a statement, and open the history as the next process does; whether it came to its end."""
    stopping: Any = Stopping(store.connection, statements)
    store.connection = stopping
    try:
        work()
    except Stopped:
        return False
    finally:
        store.reopen()
    return True


async def test_storing_and_archiving_may_stop_at_any_statement(client: Client, tmp_path: Path) -> None:
    await Scribe(client).write(120)
    log = await messages_of(client)
    once = one_go(tmp_path / "once", log)
    whole, counts = once.content(), counted(log)
    once.close()
    store, statements = Store(tmp_path / "h", NAME), 0
    while not stopped(store, partial(store_all, store, log), statements):
        assert store.checkpoint.sequence == 0
        assert counted_rows(store) == {}
        statements += 1
    assert statements >= 3
    assert store.content() == whole
    part = archive.Part("2026-01-31", 0, len(log))
    files = archive.export(store, part, store.cursor())
    statements = 0
    while not stopped(store, partial(archive.adopt, store, part, files), statements):
        assert store.checkpoint.archived == 0
        assert counted_rows(store) == counts
        assert store.content() == whole
        statements += 1
    assert statements >= 9
    assert store.checkpoint.archived == len(log)
    assert store.content() == whole
    archive.sweep(store)
    assert store.content() == whole
    statements = 0
    work = partial(archive.expire, store, FAR, days=None, size=0)
    while not stopped(store, work, statements):
        listed, _ = listed_files(store)
        assert len(listed) == len(files)
        assert store.content() == whole
        statements += 1
    assert counted_rows(store) == {key: count for key, count in counts.items() if key[0] in KEPT}
    store.close()


def store_all(store: Store, log: list[Message]) -> None:
    state, rows, waiting = FleetState(NAME), Rows(), Waiting()
    for message in log:
        rows.add(message, state.apply(message), state, waiting)
    store.write(rows, time=state.time)
