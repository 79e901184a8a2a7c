"""Histories that can't be used: each is refused in a sentence, and made again from the archive and the log."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import duckdb
import pytest

from kvplane.events.errors import KvplaneError, LogCorrupt, first_known
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadHistory
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive
from kvplane.projections.history.store import FILE, Store
from kvplane.services.embedded.server import start_server
from kvplane.services.history.ingest import Ingest
from tests.support.commands import run
from tests.support.historians import (
    FAR,
    NAME,
    Scribe,
    counted_rows,
    historian,
    listed_files,
    messages_of,
    one_go,
    purge,
)
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A history without a log."""
    Store(tmp_path / "made", NAME).close()
    return tmp_path / "made"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def another_version(file: Path) -> None:
    with duckdb.connect(str(file)) as connection:
        connection.execute("UPDATE checkpoint SET version = 999")


def another_shape(file: Path) -> None:
    with duckdb.connect(str(file)) as connection:
        connection.execute("DROP TABLE checkpoint")
        connection.execute("CREATE TABLE checkpoint (edition INTEGER)")


def another_fleet(file: Path) -> None:
    with duckdb.connect(str(file)) as connection:
        connection.execute("UPDATE checkpoint SET fleet = 'other'")


def without_tables(file: Path) -> None:
    with duckdb.connect(str(file)) as connection:
        connection.execute("DROP TABLE archive_files")


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (another_version, "is of version 999, this kvplane reads 3; `kvplane history rebuild`"),
    (another_shape, "is of version None, this kvplane reads 3; `kvplane history rebuild`"),
    (another_fleet, "is of fleet 'other', not 'default'; choose another folder"),
    (without_tables, "can't be opened: .*archive_files.*; `kvplane history rebuild`"),
    (cut, "can't be opened: .*; `kvplane history rebuild`"),
    (lambda file: file.write_bytes(b""), "can't be opened: .*; `kvplane history rebuild`"),
    (lambda file: file.write_bytes(b"x" * 50_000), "can't be opened: .*; `kvplane history rebuild`"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("name", ["made", "a block of old locks"])
def test_a_file_that_is_no_history_is_refused(
    tmp_path: Path, made: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = made.rename(tmp_path / name)
    damage(folder / FILE)
    before = (folder / FILE).read_bytes()
    with pytest.raises(BadHistory, match=message):
        Store(folder, NAME)
    assert (folder / FILE).read_bytes() == before


def test_a_file_that_is_cut_off_or_changed_anywhere_is_refused_or_whole(made: Path) -> None:
    whole = (made / FILE).read_bytes()
    rng = random.Random(1)
    for _ in range(30):
        at = rng.randrange(len(whole))
        changed = bytes([whole[at] ^ (1 << rng.randrange(8))])
        for data in (whole[:at], whole[:at] + changed + whole[at + 1 :]):
            (made / FILE).write_bytes(data)
            try:
                store = Store(made, NAME)
            except BadHistory:
                continue
            assert store.checkpoint.sequence == 0
            assert counted_rows(store) == {}
            store.close()


async def test_the_command_says_what_is_wrong_and_a_rebuild_mends_it(
    server: Server, client: Client, tmp_path: Path
) -> None:
    last = await Scribe(client).write(400)
    folder = tmp_path / "h"
    async with historian(server.url, folder) as running:
        await running.ingest.maintain(FAR)
        before = running.ingest.store.content()
    for damage in (another_version,):
        damage(folder / FILE)
        options = ["--history", str(folder), "--server", server.url]
        done = await anyio.to_thread.run_sync(run, "historian", *options)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert "Traceback" not in done.stderr
        assert "`kvplane history rebuild`" in lines[-1]
        assert lines[-1].endswith("[bad_history]")
        done = await anyio.to_thread.run_sync(run, "history", "rebuild", *options)
        assert (done.returncode, done.stdout) == (0, "")
        assert f"archive: up to sequence {last}" in done.stderr
        store = Store(folder, NAME)
        assert store.content() == before
        assert (store.checkpoint.sequence, store.checkpoint.archived) == (last, last)
        store.close()


async def test_one_process_has_the_history(server: Server, client: Client, tmp_path: Path) -> None:
    await Scribe(client).write(50)
    folder = tmp_path / "h"
    async with historian(server.url, folder) as running:
        spilled = folder / "spill" / "past-1"
        spilled.mkdir()
        options = ["--history", str(folder), "--server", server.url]
        for arguments, sentence in (
            (("historian",), "another process has the history open"),
            (("history", "rebuild"), "stop it first"),
        ):
            done = await anyio.to_thread.run_sync(partial(run, *arguments, *options))
            assert (done.returncode, "Traceback" in done.stderr) == (1, False)
            assert sentence in done.stderr
            assert done.stderr.count("\n") == 1
        assert spilled.exists()
        assert running.ingest.store.checkpoint.sequence == 50


async def archived(server: Server, client: Client, folder: Path, parts: int = 3) -> tuple[Scribe, list[str]]:
    """A history of several archived parts and some live rows; names of the archived commits, oldest first."""
    scribe = Scribe(client)
    await scribe.write(10)
    async with historian(server.url, folder) as running:
        for _ in range(parts):
            last = await scribe.write(150)
            assert await running.ingest.reached(last, seconds=10)
            await running.ingest.maintain(FAR)
        last = await scribe.write(50)
        assert await running.ingest.reached(last, seconds=10)
    names = sorted(str(path.relative_to(folder / "archive")) for path in folder.rglob("commits/*/*.parquet"))
    assert len(names) == parts
    return scribe, names


async def rebuilt(client: Client, folder: Path) -> Store:
    """What the command does, in this process."""
    (folder / FILE).unlink()
    ingest = Ingest(client, NAME, folder)
    try:
        await ingest.in_thread(lambda: archive.recover(ingest.store))
        async with anyio.create_task_group() as group:
            group.start_soon(ingest.run)
            await ingest.follower.caught_up.wait()
            await ingest.flush()
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        found = first_known(errors)
        assert found is not None
        raise found from None
    finally:
        ingest.store.close()
    return Store(folder, NAME)


async def test_a_rebuilt_history_is_the_one_that_was_lost(server: Server, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "h"
    scribe, _ = await archived(server, client, folder)
    log = await messages_of(client)
    once = one_go(tmp_path / "once", log)
    store = await rebuilt(client, folder)
    assert store.content() == once.content()
    upto = store.checkpoint.archived
    store.close()
    once.close()
    # The log is let go as far as the archive has it; then there are no snapshots either.
    for step in ("log", "purged", "no snapshot"):
        if step == "purged":
            assert await purge(client, upto + 1) == upto + 1
        elif step == "no snapshot":
            shutil.rmtree(folder / "snapshots")
        async with historian(server.url, folder) as running:
            last = await scribe.write(20)
            assert await running.ingest.reached(last, seconds=10)
            state = FleetState(NAME)
            await replay(client, NAME, log.append, applied=log[-1].sequence)
            for message in log:
                state.apply(message)
            assert digest(running.ingest.state) == digest(state)
            if step == "log":
                assert await running.ingest.save_snapshot() == last
        store, once = await rebuilt(client, folder), one_go(tmp_path / step, log)
        assert store.content() == once.content()
        listed, there = listed_files(store)
        assert listed == there
        store.close()
        once.close()


async def failed(work: Callable[[], Awaitable[object]]) -> KvplaneError:
    """The error that a historian ends with."""
    try:
        await work()
    except KvplaneError as error:
        return error
    except BaseExceptionGroup as errors:
        found = first_known(errors)
        assert found is not None
        return found
    pytest.fail("it did not fail")


async def begin(server: Server, folder: Path) -> None:
    async with historian(server.url, folder):
        pass


def parquet(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}


async def test_a_damaged_archive_is_named_and_a_rebuild_loses_nothing(
    server: Server, client: Client, tmp_path: Path
) -> None:
    made, folder = tmp_path / "made", tmp_path / "h"
    _, names = await archived(server, client, made, parts=2)
    once = one_go(tmp_path / "once", await messages_of(client))
    for table, place in (("commits", 0), ("commits", 1), ("decisions", 0), ("decisions", 1)):
        for damage in (Path.unlink, cut):
            shutil.copytree(made, folder)
            name = names[place].replace("commits", table)
            damage(folder / "archive" / name)
            before = parquet(folder)
            if table == "commits":
                message = f"1 files of the archive are missing or cut off, such as {name}"
                assert message in str(await failed(partial(begin, server, folder)))
            if place:
                store = await rebuilt(client, folder)
                assert store.content() == once.content()
                store.close()
            else:
                message = "the archive's beginning can't be read or is not whole"
                assert message in str(await failed(partial(rebuilt, client, folder)))
                assert parquet(folder) == before
            shutil.rmtree(folder)
    once.close()


async def test_what_only_the_archive_has_is_not_swept_away(server: Server, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "h"
    _, names = await archived(server, client, folder)
    shutil.copytree(folder, tmp_path / "new")
    upto = int(names[-1].split("-")[-1].removesuffix(".parquet"))
    await purge(client, upto + 1)
    (folder / "archive" / names[1]).unlink()
    shutil.rmtree(folder / "snapshots")
    before = parquet(folder)
    error = await failed(partial(rebuilt, client, folder))
    assert isinstance(error, LogCorrupt)
    assert "what is between is lost" in str(error)
    assert parquet(folder) == before
    # A history whose file was lost, and one of another fleet.
    folder = tmp_path / "new"
    (folder / FILE).unlink()
    before = parquet(folder)
    assert "`kvplane history rebuild` makes it again" in str(await failed(partial(begin, server, folder)))
    (folder / FILE).unlink()
    store = Store(folder, "other")
    with pytest.raises(BadHistory, match="is of fleet 'default', not 'other'"):
        archive.recover(store)
    store.close()
    assert parquet(folder) == before


@pytest.mark.parametrize("longer", [False, True])
async def test_a_log_that_was_replaced_is_refused(
    server: Server, client: Client, tmp_path: Path, *, longer: bool
) -> None:
    await Scribe(client).write(100)
    async with historian(server.url, tmp_path / "h") as running:
        before = running.ingest.store.content()
    other = await start_server(tmp_path / "other", port=free_port())
    try:
        async with connected([other.url], "test") as there:
            await Scribe(there, seed=1).write(120 if longer else 60)
            done = await anyio.to_thread.run_sync(
                run, "historian", "--history", str(tmp_path / "h"), "--server", other.url
            )
    finally:
        await other.stop()
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    sentence = (
        "is another message" if longer else "the history holds 100 commits, the log of fleet 'default' ends at 60"
    )
    assert sentence in done.stderr
    assert "[log_corrupt]" in done.stderr
    store = Store(tmp_path / "h", NAME)
    assert store.content() == before
    store.close()
