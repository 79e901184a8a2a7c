"""A historian that is told to stop while it answers: it leaves soon, in good order, and loses nothing."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.projections.history.store import Store
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from tests.support.historians import (
    NAME,
    Scribe,
    check_unbroken,
    commanded,
    counted,
    counted_rows,
    messages_of,
    one_go,
    question,
)
from tests.support.processes import alive, children
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

LONG = "SELECT sum(hash(a.range * b.range)) FROM range(3000000) a, range(2000000) b"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_a_historian_that_is_stopped_leaves_soon_and_in_order(
    server: Server, client: Client, tmp_path: Path, ending: signal.Signals
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scribe = Scribe(client)
    await scribe.write(2000)
    arguments = ["historian", "--history", str(tmp_path / "h"), "--server", server.url, "--log-level", "warning"]
    stopped = anyio.Event()

    async def keep_asking(endpoint: str, request: messages.SqlRequest | messages.MomentRequest) -> None:
        while not stopped.is_set():
            with suppress(ServiceFault):
                await question(client, endpoint, request, seconds=8)
            await anyio.sleep(0.01)

    async def keep_writing() -> None:
        while not stopped.is_set():
            await scribe.write(20)
            await anyio.sleep(0.05)

    with commanded(*arguments) as process:
        async with anyio.create_task_group() as group:
            with anyio.fail_after(20):
                while True:
                    with suppress(ServiceFault):
                        await question(client, "history.state", messages.MomentRequest(at="10"))
                        break
                    await anyio.sleep(0.05)
            group.start_soon(keep_asking, "sql", messages.SqlRequest(sql=LONG, seconds=25))
            group.start_soon(keep_asking, "history.state", messages.MomentRequest(at="2000"))
            group.start_soon(keep_asking, "history.state", messages.MomentRequest(at="1999"))
            group.start_soon(keep_writing)
            # The query and both states are asked for: each way of work has begun.
            await until(lambda: children(process.pid))
            workers = children(process.pid)
            began = time.monotonic()
            process.send_signal(ending)
            output, _ = await anyio.to_thread.run_sync(process.communicate)
            took = time.monotonic() - began
            stopped.set()
            group.cancel_scope.cancel()
        assert (process.returncode, output) == (0, "")
        assert took < 5
        await until(lambda: not any(alive(worker) for worker in workers), 3)
    store = Store(tmp_path / "h", NAME)
    stored = store.checkpoint.sequence
    assert stored >= 2000
    assert check_unbroken(store.connection, stored) == 1
    log = (await messages_of(client))[:stored]
    once = one_go(tmp_path / "once", log)
    assert counted_rows(store) == counted(log)
    assert store.content() == once.content()
    store.close()
    once.close()
