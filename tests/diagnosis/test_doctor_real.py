"""The doctor at fleets in which something is wrong for real."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest
from nats.js.errors import ServiceUnavailableError

import kvplane.services.diagnosis.examine
from kvplane.events.log.connection import connected
from kvplane.events.log.stream import open_stream, stream_config
from kvplane.services.diagnosis.doctor import FULL, judge
from kvplane.services.diagnosis.examine import examine
from kvplane.services.embedded.server import configuration, server_binary
from tests.support.commands import run
from tests.support.eventful_fleet import live, write_commits
from tests.support.findings import sentence, wrong
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    monitor: str


@asynccontextmanager
async def servers(
    folder: Path, *, count: int = 1, change: tuple[str, str] = ("", "")
) -> AsyncIterator[dict[str, Running]]:
    """Servers with a monitoring endpoint each, a cluster when there are several."""
    ports, routes, monitors = ([free_port() for _ in range(count)] for _ in range(3))
    found = {}
    with ExitStack() as stack:
        for number in range(count):
            data = folder / f"s{number}"
            data.mkdir(parents=True)
            text = configuration(data, name=f"s{number}", host="127.0.0.1", port=ports[number]).replace(*change)
            text += f"http: 127.0.0.1:{monitors[number]}\n"
            if count > 1:
                all_routes = ", ".join(f'"nats://127.0.0.1:{route}"' for route in routes)
                text += f"cluster {{ name: c\n listen: 127.0.0.1:{routes[number]}\n routes: [{all_routes}] }}\n"
            (data / "c.conf").write_text(text)
            command = [server_binary(), "-c", str(data / "c.conf"), "-l", str(data / "log")]
            process = subprocess.Popen(command, start_new_session=True)  # noqa: ASYNC220 - starting it does not wait
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            url, monitor = f"nats://127.0.0.1:{ports[number]}", f"http://127.0.0.1:{monitors[number]}"
            found[f"s{number}"] = Running(process, url, monitor)
        yield found


async def test_a_server_that_is_not_durable_and_nearly_full(tmp_path: Path) -> None:
    change = ("sync_interval: always", "sync_interval: 30s\n  max_file_store: 1MB")
    async with servers(tmp_path / "a", change=change) as running, connected([running["s0"].url], "test") as client:
        monitor = running["s0"].monitor
        await open_stream(client.jetstream(), "default", create=True)
        found = await examine(client, "default", [monitor])
        assert ("problem", "durability") in wrong(found)
        assert "server s0 loses what it acknowledged in the last 30 s" in sentence(found, "durability")
        assert ("warning", "room") not in wrong(found)
        body = b"x" * 10_000
        for _ in range(int(FULL * 100) + 6):
            await client.jetstream().publish("kv.default.access.w", body)
        assert ("warning", "room") in wrong(await examine(client, "default", [monitor]))
        with pytest.raises(ServiceUnavailableError):
            for _ in range(100):
                await client.jetstream().publish("kv.default.access.w", body)
        assert ("problem", "room") in wrong(await examine(client, "default", [monitor]))
    # By command, with nobody at the other end of the monitor.
    async with servers(tmp_path / "b") as running:
        _, url, monitor = running["s0"]
        async with connected([url], "test") as client:
            await open_stream(client.jetstream(), "default", create=True)
        arguments = ["doctor", "--server", url, "--monitor", monitor, "--monitor", "http://127.0.0.1:1"]
        done = await anyio.to_thread.run_sync(lambda: run(*arguments))
        assert "forces what it acknowledges to the disk" in done.stdout
        assert "http://127.0.0.1:1 does not answer" in done.stdout
        assert done.returncode == 1


async def test_a_copy_of_the_log_that_is_away(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(servers(tmp_path, count=3))
        urls, monitors = [each.url for each in running.values()], [each.monitor for each in running.values()]
        client = await stack.enter_async_context(connected(urls, "test", connect_seconds=20))
        js = client.jetstream()
        with anyio.fail_after(30):
            while True:
                try:
                    await js.add_stream(stream_config("default", replicas=3))
                    break
                except Exception:  # noqa: BLE001 - the cluster has no leader yet
                    await anyio.sleep(0.2)

        async def findings() -> dict[str, str]:
            return {f.level: f.message for f in judge(await examine(client, "default", monitors)) if f.what == "copies"}

        with anyio.fail_after(20):
            while await findings() != {"ok": "3 of the log, all current"}:
                await anyio.sleep(0.2)
        log = (await examine(client, "default")).log
        assert log is not None
        follower = log["cluster"]["replicas"][0]["name"]
        running[follower].process.kill()
        with anyio.fail_after(30):
            while "problem" not in (found := await findings()):
                await anyio.sleep(0.2)
        assert found["problem"].startswith(f"server {follower} has a copy of the log, and was last heard")
        assert ("problem", "durability") in wrong(await examine(client, "default", monitors))


STRANGE = """
import sys, time
real, real_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: real() + 60, lambda: real_ns() + 60 * 10**9
import kvplane.services.replication.replica
kvplane.services.replication.replica.package_version = lambda: "99.0.0"
from kvplane.services.cli import main
sys.argv = ["kvplane", "router", "--server", sys.argv[1]]
main()
"""


async def test_a_clock_that_is_wrong_and_a_version_that_is_another(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.coordinator()
    await fleet.router()
    async with await anyio.open_process(
        [sys.executable, "-c", STRANGE, fleet.url], stdout=None, stderr=None
    ) as process:
        with anyio.fail_after(30):
            while len((found := await examine(fleet.client, "default")).routers) < 2:
                await anyio.sleep(0.1)
        process.kill()
    strange = next(status.writer for status in found.routers if status.version == "99.0.0")
    assert sentence(found, "clock").startswith(f"{strange} is 60.0 s ahead of the log's server")
    assert f"99.0.0: {strange}" in sentence(found, "versions")
    # The one who asks may be the one that is wrong.
    monkeypatch.setattr(kvplane.services.diagnosis.examine, "time", Late)
    found = await examine(fleet.client, "default")
    assert [finding.message.split(" the ")[0] for finding in judge(found) if finding.what == "clock"] == [
        "this machine is 30.0 s behind"
    ]


class Late:
    """A clock that is half a minute behind."""

    @staticmethod
    def time() -> float:
        return time.time() - 30


async def test_a_replica_that_is_far_behind(fleet: Fleet) -> None:
    await fleet.coordinator()
    router = await fleet.router()
    await live(fleet)
    router.replica.follower.pause()
    await write_commits(fleet.client, 1200)
    found = await examine(fleet.client, "default")
    assert ("problem", "routers") in wrong(found)
    assert ("problem", "coordinators") not in wrong(found)
    router.replica.follower.resume()
    await until(lambda: router.state.sequence > 1200)
    assert ("problem", "routers") not in wrong(await examine(fleet.client, "default"))


async def test_a_log_with_a_hole_and_one_that_may_get_some(client: Client) -> None:
    js = client.jetstream()
    config = stream_config("default")
    config.deny_delete = False
    await js.add_stream(config)
    for _ in range(5):
        await js.publish("kv.default.control", b"x")
    assert "messages may be deleted" in sentence(await examine(client, "default"), "log")
    await js.delete_msg("KV_default", 3)
    config.deny_delete = True
    await js.update_stream(config)
    assert "has 1 deleted messages between 1 and 5" in sentence(await examine(client, "default"), "log")


async def test_a_log_with_a_limit_is_full_some_day(client: Client) -> None:
    config = stream_config("default")
    config.max_msgs = 100
    await client.jetstream().add_stream(config)
    await write_commits(client, 79)
    assert ("warning", "room") not in wrong(await examine(client, "default"))
    await write_commits(client, 5)
    assert ("warning", "room") in wrong(await examine(client, "default"))
