"""A replica whose process fails at a commit ends and says so, or reads the commit again; none goes on otherwise."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import replay
from kvplane.events.subjects import subject
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.services.demo.fleet import Fleet
from kvplane.services.protocol.errors import NoAnswer
from kvplane.services.protocol.messages import StatusRequest
from kvplane.services.rpc.client import ask
from tests.support.fold_given import headers_of, registered
from tests.support.ports import free_port
from tests.support.starving import BLOCK, STARVES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.client import Client

NAME = "starving"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    running = Fleet(tmp_path, free_port(), NAME)
    await running.start_server()
    yield running
    await running.stop()


async def _status(client: Client, router: str, sequence: int) -> dict[str, Any]:
    """What the router says once it has applied this sequence."""
    with anyio.fail_after(20):
        while True:
            # One whose read loop has ended hears nothing for a second.
            with suppress(NoAnswer):
                asked = StatusRequest(digest=True)
                status: dict[str, Any] = await ask(client, f"kv.{NAME}.router.{router}.status", asked, seconds=2)
                if status["sequence"] >= sequence:
                    return status
            await anyio.sleep(0.05)


@pytest.mark.anyio
async def test_a_router_whose_memory_ends_at_a_commit_ends_and_says_why_and_others_go_on(fleet: Fleet) -> None:
    async with connected([fleet.url], "test") as client:
        await fleet.start("coordinator", "coordinator")
        await fleet.coordinators(client, 1)
        appender = Appender(client, NAME, new_writer("test"))
        epoch = await appender.append(subject(NAME, "node", "a"), [registered("a")])
        await fleet.start("starving", "router", program="tests.support.starving")
        (starving,) = await fleet.routers(client, 1)
        await fleet.start("router", "router")
        (router,) = {*await fleet.routers(client, 2)} - {starving}

        # Without its headers the second of these would be no duplicate.
        js = client.jetstream()
        body = codec.encode([types.PolicyChanged("ttft", {"x": 1.0})])
        headers = headers_of(body, writer=STARVES, counter=1, crc=True)
        for _ in range(2):
            last = (await js.publish(f"kv.{NAME}.control", body, headers=headers)).seq
        state = FleetState(NAME)
        await replay(client, NAME, state.apply)
        assert state.skipped == {"duplicate": 1}
        for writer in (starving, router):
            status = await _status(client, writer, last)
            assert (status["skipped"], status["digest"]) == ({"duplicate": 1}, digest(state))
        assert '"read_loop_ended"' in (fleet.folder / "starving.log").read_text()

        stored = types.BlocksStored("a", epoch, 1, pack_hashes([BLOCK]))
        last = await appender.append(subject(NAME, "cache", "a"), [stored])
        with anyio.fail_after(10):
            assert await fleet.ended("starving") == 1
        output = (fleet.folder / "starving.log").read_text()
        assert f"kvplane: this process failed while it applied commit {last} (MemoryError)" in output
        assert "give it more memory and start it again" in output
        assert "Traceback" not in output.partition("kvplane: this process failed")[2]
        status = await _status(client, router, last)
        assert (status["memberships"], status["skipped"]) == (1, {"duplicate": 1})
