"""Several gateways instead of one, and one that is killed: what conversations find cached.

Conversations by token ids talk to simulated nodes (`kvplane up --simulate`) through gateways that are processes of their own,
each request through another one. A decision is *blind* when the gateway that came back knows less of a prompt than one that
was there all the time.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from benchmarks.common import Limit, Row, row
from kvplane.services.embedded.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = 8
GATEWAYS = 4
FIRST_TOKENS, TURN_TOKENS = 1_000, 300
PAUSE_SECONDS = 0.2
"""Between an answer and the next request, as a short tool takes."""
READY_SECONDS = 60
SAME = Limit(least_ratio=0.99)
BLIND = Limit(most=0)
_QUIET = {"KVPLANE_LOG_LEVEL": "error"}


@contextmanager
def _started(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvplane", *words], env={**os.environ, **_QUIET}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _gateway(server: str, port: int) -> tuple[str, ...]:
    return ("gateway", "--listen", f"127.0.0.1:{port}", "--server", server)


def _wait(port: int) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"the gateway at {port} is not ready after {READY_SECONDS} s")


class Talk:
    """One conversation, by token ids."""

    def __init__(self, seed: int) -> None:
        self._drawn = random.Random(seed)
        self.name = f"talk-{seed}"
        self.ids = self._more(FIRST_TOKENS)

    def _more(self, count: int) -> list[int]:
        return [self._drawn.randrange(1, 50_000) for _ in range(count)]

    def go_on(self) -> None:
        """A further turn."""
        self.ids = [*self.ids, *self._more(TURN_TOKENS)]

    def body(self) -> dict[str, Any]:
        """Its next request."""
        return {"model": "sim", "prompt": self.ids, "max_tokens": 4}


async def _talked(ports: list[int], seeds: range, turns: int) -> float:
    """The share of the prompts' tokens that was cached, after each conversation's first turn."""
    cached = prompts = 0
    drawn = random.Random(seeds.start)
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as http:

        async def one(seed: int) -> None:
            nonlocal cached, prompts
            talk = Talk(seed)
            for turn in range(turns):
                port = drawn.choice(ports)
                answer = await http.post(
                    f"http://127.0.0.1:{port}/v1/completions", json=talk.body(), headers={"x-session-id": talk.name}
                )
                answer.raise_for_status()
                usage = answer.json()["usage"]
                if turn:
                    prompts += usage["prompt_tokens"]
                    cached += usage["prompt_tokens_details"]["cached_tokens"]
                talk.go_on()
                await anyio.sleep(drawn.uniform(0.5, 1.5) * PAUSE_SECONDS)

        async with anyio.create_task_group() as group:
            for seed in seeds:
                group.start_soon(one, seed)
    return cached / prompts


async def _killed(server: str, there: int, talks: int) -> tuple[int, int]:
    """Decisions of a gateway that was killed and came back under load, and how many of them were blind."""
    decided = blind = 0
    port = free_port()
    known = [Talk(10_000 + number) for number in range(talks)]
    async with httpx.AsyncClient(timeout=60) as http:

        async def ask(at: int, talk: Talk) -> None:
            (await http.post(f"http://127.0.0.1:{at}/v1/completions", json=talk.body())).raise_for_status()

        async def load() -> None:
            while True:
                await ask(there, random.choice(known))

        async with anyio.create_task_group() as group:
            for talk in known:
                await ask(there, talk)
            group.start_soon(load)
            with ExitStack() as stack:
                process = stack.enter_context(_started(*_gateway(server, port)))
                await anyio.to_thread.run_sync(_wait, port)
                for talk in known[::4]:
                    await ask(port, talk)
                process.send_signal(signal.SIGKILL)
                process.wait()
                stack.enter_context(_started(*_gateway(server, port)))
                await anyio.to_thread.run_sync(_wait, port)
                for talk in known:
                    body = {"model": "sim", "tokens": talk.ids, "dry_run": True}
                    answers = [
                        (await http.post(f"http://127.0.0.1:{at}/route", json=body)).json() for at in (there, port)
                    ]
                    decided += 1
                    blind += answers[1]["matched_tokens"] < answers[0]["matched_tokens"]
            group.cancel_scope.cancel()
    return decided, blind


async def measure(*, quick: bool) -> list[Row]:
    """The rows."""
    talks, turns = (16, 5) if quick else (96, 12)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port, first = free_port(), free_port()
        server = f"nats://127.0.0.1:{port}"
        stack.enter_context(
            _started(
                "up", "--data", folder, "--port", str(port), "--simulate", str(NODES), "--gateway", f"127.0.0.1:{first}",
                "--http", "off", "--no-history",
            )
        )  # fmt: skip
        await anyio.to_thread.run_sync(_wait, first)
        one = await _talked([first], range(talks), turns)
        ports = [first, *(free_port() for _ in range(GATEWAYS - 1))]
        for other in ports[1:]:
            stack.enter_context(_started(*_gateway(server, other)))
        for other in ports:
            await anyio.to_thread.run_sync(_wait, other)
        several = await _talked(ports, range(1_000, 1_000 + talks), turns)
        decided, blind = await _killed(server, first, talks * 4)
    return [
        row(f"gateways: share cached, {GATEWAYS} gateways", several * 100, "%", limit=SAME, beside="1 gateway", other=one * 100,
            note=f"{talks} conversations of {turns} turns, each request through another gateway"),
        row("gateways: blind decisions after kill -9", blind, "", limit=BLIND, note=f"of {decided}, once /health was well"),
    ]  # fmt: skip


def run(*, quick: bool) -> list[Row]:
    """Run it."""
    return anyio.run(lambda: measure(quick=quick))
