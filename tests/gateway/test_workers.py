"""Gateways that share a port: real processes, one of which is killed, and all of which are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest

from tests.support.commands import started
from tests.support.gateways import recorded
from tests.support.http_of_services import Http
from tests.support.ports import free_port
from tests.support.processes import children
from tests.support.scripted_engine import EVENTS, MODEL, ScriptedEngine, chunk, engines, whole
from tests.support.waiting import until

if TYPE_CHECKING:
    from anyio.abc import SocketStream

    from tests.support.fleet import Fleet

WORD = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
PROMPT = {"model": MODEL, "prompt": list(range(9))}


def workers_of(process: int) -> set[int]:
    """Processes of gateways; the one that keeps track of what they share is none."""
    return {each for each in children(process) if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
async def test_workers_share_a_port_are_started_again_and_end_in_good_order(fleet: Fleet) -> None:
    asked, go_on = anyio.Event(), anyio.Event()

    async def answers(stream: SocketStream) -> None:
        await stream.send(whole(b"{}"))

    async def streams(stream: SocketStream) -> None:
        await stream.send(EVENTS + chunk(WORD))
        asked.set()
        await go_on.wait()
        await stream.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    await fleet.coordinator()
    engine = ScriptedEngine("a", answers)
    at, metrics = f"127.0.0.1:{free_port()}", Http(f"127.0.0.1:{free_port()}")
    command = started("gateway", "--workers", "2", "--listen", at, "--http", metrics.address, "--server", fleet.url)
    async with engines(fleet, engine):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:  # noqa: ASYNC220 - starting it does not wait
            try:
                await until(lambda: are_both_ready(metrics, 0), 60, every=0.2)
                for _ in range(40):
                    answer = await asked_anew(at)
                    assert (answer.status_code, answer.content) == (200, b"{}")
                found = await metrics.metrics()
                by_worker = found.by("kvplane_gateway_requests_total", "worker", ending="ok")
                assert by_worker.keys() == {"1", "2"}
                assert sum(by_worker.values()) == 40
                assert (await metrics.state("/readyz"))[1]["workers"] == ["1", "2"]

                before = workers_of(process.pid)
                assert len(before) == 2
                os.kill(min(before), signal.SIGKILL)
                await until(lambda: are_both_ready(metrics, 1), 60, every=0.2)
                assert len(workers_of(process.pid) - before) == 1

                engine.scripts = [streams]
                async with (
                    httpx.AsyncClient(base_url=f"http://{at}", timeout=30) as http,
                    anyio.create_task_group() as group,
                ):
                    whole_answer: list[bytes] = []

                    async def read() -> None:
                        answer = await http.post("/v1/completions", json={**PROMPT, "stream": True})
                        whole_answer.append(answer.content)

                    group.start_soon(read)
                    await asked.wait()
                    process.terminate()
                    await until(lambda: refused(at), 15)
                    go_on.set()
                assert whole_answer == [WORD + b"data: [DONE]\n\n"]
                await until(lambda: process.poll() is not None, 20)
            finally:
                process.kill()
        assert process.returncode == 0
    routed, completed = await recorded(fleet)
    assert [event.status for event in completed] == ["ok"] * 41
    assert {event.request for event in routed} == {event.request for event in completed}


async def are_both_ready(metrics: Http, restarts: int) -> bool:
    """Whether both workers are ready, after so many restarts."""
    if (await metrics.get("/readyz"))[0] != 200:
        return False
    found = await metrics.metrics()
    ready = found.by("kvplane_ready", "worker", service="gateway")
    return found("kvplane_gateway_worker_restarts_total") == restarts and ready.keys() == {"1", "2"}


async def asked_anew(at: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{at}", timeout=30) as http:
        return await http.post("/v1/completions", json=PROMPT)


def refused(at: str) -> bool:
    try:
        httpx.get(f"http://{at}/health", timeout=5)
    except httpx.TransportError:
        return True
    return False
