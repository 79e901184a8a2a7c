"""Two servers on one folder would lose what either acknowledged: the second is refused, whatever became of the first."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import anyio
import pytest

from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream
from kvplane.events.subjects import stream_name
from kvplane.services.embedded.orphan import LOCK as SERVER_LOCK
from kvplane.services.embedded.server import CONFIG, holding, server_binary, start_server
from kvplane.services.process.owner import LOCK, RECORD
from kvplane.services.protocol.errors import FolderTaken
from tests.support.commands import run, up
from tests.support.ports import free_port
from tests.support.processes import alive, children, stopped
from tests.support.waiting import until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"),
]

LEFT_BEHIND = "import kvplane.services.embedded.server as s\ns.ending_with_this = lambda command: command"
"""Where the kernel does not end a server with its parent."""
OWNER = "import kvplane.services.process.owner as o\n"
NETWORK = (
    OWNER + "o.file_system = lambda _: 'nfs4'\no.RENEW_SECONDS, o.FRESH_SECONDS, o.SETTLE_SECONDS = 0.3, 2.5, 0.2\n"
)
OTHER_HOST = NETWORK + (
    "o.machine = lambda: 'another'\no.fcntl.flock = lambda *_: None\n"
    "import kvplane.services.embedded.orphan as e\ne._command = lambda _: ''\n"
)
"""A host that sees neither the first one's locks nor its processes."""
NOWHERE = ("up", "--bare", "--host", "203.0.113.1", "--http", "off")
"""Takes the folder, and then has no address to listen on."""
NO_LOCKS = OWNER + "import errno\ndef flock(*_): raise OSError(errno.ENOLCK, 'no locks')\no.fcntl.flock = flock"


async def acknowledged(url: str, count: int) -> dict[int, bytes]:
    """Write messages to the log; those that were acknowledged, by sequence."""
    found = {}
    async with connected([url], "test") as client:
        js = client.jetstream()
        await open_stream(js, "default", create=True)
        for number in range(count):
            body = b"%d at %d" % (number, time.monotonic_ns())
            found[(await js.publish("kv.default.access.test", body)).seq] = body
    return found


async def on_log(url: str) -> dict[int, bytes]:
    found = {}
    async with connected([url], "test") as client:
        js = client.jetstream()
        for sequence in range(1, (await open_stream(js, "default")).last_seq + 1):
            found[sequence] = (await js.get_msg(stream_name("default"), sequence)).data or b""
    return found


def refused(folder: Path, pid: int, url: str, *, before: str = "") -> str:
    """Start a second one, which must end with one sentence that names the first; the sentence."""
    done = run("up", "--bare", "--data", str(folder), "--port", str(free_port()), "--http", "off", before=before)
    assert done.returncode == 1, done.stderr
    (last,) = done.stderr.splitlines()
    assert f"process {pid} on host {socket.gethostname()} (kvplane up, {url})" in last
    assert f"--server {url}, or choose another folder with --data" in last
    assert last.endswith("[folder_taken]")
    return last


async def test_a_second_one_is_refused_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    with up(tmp_path / "d", "--bare") as (url, first):
        wanted = await acknowledged(url, 50)
        (server,) = children(first.pid)
        refused(tmp_path / "d", first.pid, url)
        # With the first one's port, the folder is what matters.
        same = run("up", "--bare", "--data", str(tmp_path / "d"), "--port", url.rpartition(":")[2])
        assert "[folder_taken]" in same.stderr
        wanted |= await acknowledged(url, 50)
        first.kill()
        begin = time.monotonic()
        with up(tmp_path / "d", "--bare") as (again, second):
            assert time.monotonic() - begin < 30
            assert not alive(server)
            assert await on_log(again) == wanted
            refused(tmp_path / "d", second.pid, again)
    assert not (tmp_path / "d" / RECORD).exists()


async def test_a_server_ends_with_who_started_it(tmp_path: Path) -> None:
    with up(tmp_path / "d", "--bare") as (_, first):
        (server,) = children(first.pid)
        first.kill()
        await until(lambda: not alive(server))


@pytest.mark.parametrize("stands", [False, True])
async def test_a_server_that_was_left_behind_is_ended(tmp_path: Path, stands: bool) -> None:
    with up(tmp_path / "d", "--bare", before=LEFT_BEHIND) as (url, first):
        wanted = await acknowledged(url, 20)
        (server,) = children(first.pid)
        first.kill()
        first.wait()
        assert alive(server)
        wanted |= await acknowledged(url, 20)
        if stands:
            subprocess.run(["kill", "-STOP", str(server)], check=True)  # noqa: ASYNC221
            await until(lambda: stopped(server))
        with up(tmp_path / "d", "--bare") as (again, _):
            assert not alive(server)
            assert await on_log(again) == wanted


async def test_the_folder_is_held_while_no_server_runs(tmp_path: Path) -> None:
    async with holding(tmp_path, "nats://here:1"):
        done = await anyio.to_thread.run_sync(lambda: run("up", "--bare", "--data", str(tmp_path)))
        assert "(kvplane up, nats://here:1)" in done.stderr
        with pytest.raises(FolderTaken, match="nats://here:1"):
            await start_server(tmp_path, port=free_port())


async def test_locks_that_were_deleted_still_hold(tmp_path: Path) -> None:
    with up(tmp_path, "--bare") as (url, first):
        (tmp_path / LOCK).unlink()
        (tmp_path / SERVER_LOCK).unlink()
        refused(tmp_path, first.pid, url)
        first.kill()
        first.wait()
        with up(tmp_path, "--bare"):
            pass


async def test_a_server_that_was_started_by_hand_is_not_touched(tmp_path: Path) -> None:
    with up(tmp_path, "--bare"):
        pass
    async with await anyio.open_process([server_binary(), "-c", str(tmp_path / CONFIG)]) as by_hand:
        await until(lambda: (tmp_path / "nats-server.pid").exists() and _read(tmp_path) == by_hand.pid)
        done = await anyio.to_thread.run_sync(lambda: run("up", "--bare", "--data", str(tmp_path)))
        assert f"is in use by nats-server, process {by_hand.pid}: stop it first" in done.stderr
        assert by_hand.returncode is None
        by_hand.kill()


def _read(folder: Path) -> int:
    return int((folder / "nats-server.pid").read_text() or 0)


def test_a_host_whose_locks_are_not_seen_is_seen_by_its_record(tmp_path: Path) -> None:
    with up(tmp_path, "--bare", before=NETWORK) as (url, first):
        # It renews what it said for as long as it lives.
        for _ in range(3):
            assert "it renewed its record" in refused(tmp_path, first.pid, url, before=OTHER_HOST)
        first.kill()
        first.wait()
        assert "try again in" in refused(tmp_path, first.pid, url, before=OTHER_HOST.replace("2.5", "1000"))
        # That host has its lock for itself, and knows that the process is gone.
        with up(tmp_path, "--bare", before=NETWORK) as (_, second):
            second.kill()
            second.wait()
            begin = time.monotonic()
            while time.monotonic() < begin + 20:
                done = run(*NOWHERE, "--data", str(tmp_path), before=OTHER_HOST)
                if "[folder_taken]" not in done.stderr:
                    break
            assert "[server_failed]" in done.stderr


async def test_who_lost_the_folder_ends(tmp_path: Path) -> None:
    with up(tmp_path, "--bare", before=NETWORK) as (_, first):
        first.send_signal(signal.SIGSTOP)
        await until(lambda: stopped(first.pid))
        begin = time.monotonic()
        while "[folder_taken]" in run(*NOWHERE, "--data", str(tmp_path), before=OTHER_HOST).stderr:
            assert time.monotonic() < begin + 20
        with up(tmp_path, "--bare", before=OTHER_HOST):
            first.send_signal(signal.SIGCONT)
            stderr = (first.stderr or pytest.fail("no output")).read()
            first.wait(20)
    assert first.returncode == 1
    last = stderr.splitlines()[-1]
    assert "it took the folder while this process did not renew its record" in last
    assert "Traceback" not in stderr


def test_without_locks_the_record_is_enough_on_one_host(tmp_path: Path) -> None:
    with up(tmp_path, "--bare", before=NO_LOCKS) as (url, first):
        refused(tmp_path, first.pid, url, before=NO_LOCKS)
        first.kill()
        with up(tmp_path, "--bare", before=NO_LOCKS) as (_, second):
            assert second.poll() is None
