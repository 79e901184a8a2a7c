"""Two servers with streams of their own, a hub and a leaf node: a fleet has one log all the same."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.events.errors import LogMissing, TwoLogs
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import single
from kvplane.events.log.stream import open_stream
from kvplane.services.diagnosis.examine import examine
from kvplane.services.embedded.server import server_binary
from kvplane.services.protocol import messages
from kvplane.services.protocol.status import CoordinatorStatus
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.rpc.client import ask
from tests.support.findings import sentence, wrong
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def hub_and_leaf(folder: Path) -> AsyncIterator[tuple[Client, Client]]:
    """Clients of both, once what is said at one is heard at the other."""
    hub, leaf, meeting = (free_port() for _ in range(3))
    more = {
        "hub": (hub, f"leafnodes {{ listen: 127.0.0.1:{meeting} }}"),
        "leaf": (leaf, f'leafnodes {{ remotes: [{{ url: "nats://127.0.0.1:{meeting}" }}] }}'),
    }
    with ExitStack() as stack:
        for name, (port, meet) in more.items():
            (folder / name).mkdir()
            path = folder / f"{name}.conf"
            path.write_text(
                f"server_name: {name}\nlisten: 127.0.0.1:{port}\nmax_payload: 8MB\n{meet}\n"
                f'jetstream {{ store_dir: "{folder / name}", domain: {name}, sync_interval: always }}\n'
            )
            process = subprocess.Popen([server_binary(), "-c", str(path), "-l", str(folder / f"{name}.log")])  # noqa: ASYNC220
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
        async with (
            connected([f"nats://127.0.0.1:{hub}"], "hub") as at_hub,
            connected([f"nats://127.0.0.1:{leaf}"], "leaf") as at_leaf,
        ):
            heard = anyio.Event()

            async def hear(_: object) -> None:
                heard.set()

            await at_hub.subscribe("meeting", cb=hear)

            async def met() -> bool:
                await at_leaf.publish("meeting", b"")
                await at_leaf.flush()
                return heard.is_set()

            await until(met)
            yield at_hub, at_leaf


async def test_a_coordinator_creates_no_log_where_another_answers_with_one(tmp_path: Path) -> None:
    async with hub_and_leaf(tmp_path) as (hub, leaf), anyio.create_task_group() as group:
        first = Coordinator(hub, "default")
        await group.start(first.run)
        with (
            anyio.fail_after(10),
            pytest.raises(TwoLogs, match=f"{first.writer}.*answers and so has a log.*--server") as caught,
        ):
            try:
                await Coordinator(leaf, "default").run()
            except BaseExceptionGroup as errors:
                raise single(errors) from None
        assert caught.value.code == "two_logs"
        with pytest.raises(LogMissing):
            await open_stream(leaf.jetstream(), "default")
        # What is asked at the leaf is answered by the hub, and a fleet of another name may have its log there.
        status = await ask(leaf, "kv.default.coordinator.status", messages.StatusRequest(), CoordinatorStatus)
        assert status.writer == first.writer
        other = Coordinator(leaf, "other", replicas=1)
        await group.start(other.run)
        second = Coordinator(hub, "default")
        await group.start(second.run)
        group.cancel_scope.cancel()


async def test_the_doctor_sees_two_logs(tmp_path: Path) -> None:
    async with hub_and_leaf(tmp_path) as (hub, leaf), anyio.create_task_group() as group:
        # As it was made by hand, or before somebody connected the two.
        await open_stream(leaf.jetstream(), "default", create=True)
        first = Coordinator(hub, "default")
        await group.start(first.run)
        assert ("problem", "log") not in wrong(await examine(hub, "default"))
        found = sentence(await examine(leaf, "default"), "log")
        assert f"the fleet has two: {first.writer} has another one" in found
        group.cancel_scope.cancel()


async def test_those_who_start_at_once_share_the_log_that_one_of_them_creates(tmp_path: Path) -> None:
    async with hub_and_leaf(tmp_path) as (hub, _), anyio.create_task_group() as group:
        several = [Coordinator(hub, "default") for _ in range(3)]
        async with anyio.create_task_group() as starting:
            for one in several:
                starting.start_soon(group.start, one.run)
        assert len({one._log_created for one in several}) == 1
        group.cancel_scope.cancel()
