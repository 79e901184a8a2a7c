"""Gateways and engines are restarted one after the other, under load: no request fails, and each is recorded once."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest

from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.simulation.simnode import NodeConfig, SimNodes
from tests.support.gateways import recorded
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup, TaskStatus

    from tests.support.fleet import Fleet

TALKERS = 5
ANEW = httpx.Limits(max_keepalive_connections=0)
"""Each request on a connection of its own: one that is kept may be closed just when it is used again."""


class Part:
    """A service that can be stopped in good order, as by SIGTERM, and started again."""

    def __init__(self, fleet: Fleet, group: TaskGroup, make: Callable[[Fleet], Awaitable[Gateway | SimNodes]]) -> None:
        self._fleet, self._group, self._make = fleet, group, make
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    async def start(self) -> None:
        self._scope, self._ended = anyio.CancelScope(), anyio.Event()
        await self._group.start(self._run)

    async def stop(self) -> None:
        self._scope.cancel()
        await self._ended.wait()

    async def _run(self, *, task_status: TaskStatus[None]) -> None:
        service = await self._make(self._fleet)
        with self._scope:
            await service.run(task_status=task_status)
        self._ended.set()


@asynccontextmanager
async def parts(fleet: Fleet, *makes: Callable[[Fleet], Awaitable[Gateway | SimNodes]]) -> AsyncIterator[list[Part]]:
    async with anyio.create_task_group() as group:
        made = [Part(fleet, group, make) for make in makes]
        for part in made:
            await part.start()
        yield made
        for part in reversed(made):
            await part.stop()


def gateway_at(port: int) -> Callable[[Fleet], Awaitable[Gateway]]:
    async def make(fleet: Fleet) -> Gateway:
        return Gateway(await fleet.connect("gateway"), fleet.name, bound("127.0.0.1", port))

    return make


def engine(name: str) -> Callable[[Fleet], Awaitable[SimNodes]]:
    async def make(fleet: Fleet) -> SimNodes:
        config = NodeConfig(name=name, prefill_speed=20_000.0, decode_speed=200.0, http="127.0.0.1")
        return SimNodes([await fleet.connect(name)], fleet.name, [config], leave_seconds=5)

    return make


@pytest.mark.parametrize("what", ["gateways", "engines"])
async def test_a_rolling_restart_fails_no_request(fleet: Fleet, what: str) -> None:
    await fleet.coordinator()
    ports = [free_port(), free_port()]
    asked: list[str] = []
    refused = 0
    over = anyio.Event()

    async def talk(number: int, http: httpx.AsyncClient) -> None:
        nonlocal refused
        rng = random.Random(number)
        while not over.is_set():
            words, stream = rng.randrange(1, 25), rng.random() < 0.5
            request = f"r{number}.{len(asked)}"
            asked.append(request)
            body = {"model": "sim", "prompt": list(range(number, number + rng.randrange(20, 200))), "max_tokens": words}
            for port in rng.sample(ports, 2):
                # Who can't connect takes the other one, as a load balancer does; any other failure is one.
                try:
                    answer = await http.post(
                        f"http://127.0.0.1:{port}/v1/completions", json={**body, "stream": stream},
                        headers={"x-request-id": request},
                    )  # fmt: skip
                except httpx.ConnectError:
                    refused += 1
                    continue
                break
            assert answer.status_code == 200, answer.text
            assert answer.text.count('"text"') == (words + 1 if stream else 1), answer.text
            assert answer.text.endswith("data: [DONE]\n\n") == stream

    async def more_asked() -> None:
        goal = len(asked) + 2 * TALKERS
        await until(lambda: len(asked) > goal, 30)

    engines, gateways = [engine(f"sim-{at}") for at in range(2)], [gateway_at(port) for port in ports]
    async with (
        httpx.AsyncClient(timeout=60, limits=ANEW) as http,
        parts(fleet, *engines) as nodes,
        parts(fleet, *gateways) as entrances,
        anyio.create_task_group() as group,
    ):
        for number in range(TALKERS):
            group.start_soon(talk, number, http)
        for part in entrances if what == "gateways" else nodes:
            await more_asked()
            await part.stop()
            # The others go on meanwhile.
            await more_asked()
            await part.start()
        over.set()
    assert refused or what == "engines"
    routed, completed = await recorded(fleet)
    ok = [event.request for event in completed if event.status == "ok"]
    assert sorted(request.rpartition(".")[0] if request.count(".") > 1 else request for request in ok) == sorted(asked)
    assert sorted(event.request for event in routed) == sorted(event.request for event in completed)
