"""Real vLLM engines with tiny hybrid models of random weights: what was foretold against what they delivered.

`make test-engine` runs it behind `live_runtime`: a Gemma 3 (sliding windows beside full attention). Other layouts are run by
their name: `python -m tests.engines.live_hybrid gemma3 gpt_oss`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio

from kvplane.events.log.connection import connected
from kvplane.services.cli.common import run_async
from kvplane.services.dataplane.complete import Completer
from kvplane.services.embedded.server import start_server
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from tests.engines.live import Live, Run, installed, model_folder, say
from tests.support.ports import free_port

_COMMON: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16", "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
_TURNS = ["sliding_attention", "full_attention"] * 2
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        **_COMMON, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "layer_types": _TURNS,
        "sliding_window": 128, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
    "gpt_oss": {
        **_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "layer_types": _TURNS,
        "sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 150000.0,
        "swiglu_limit": 7.0, "attention_bias": True, "hidden_act": "silu", "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Tiny hybrid models by their names."""
ARGUMENTS = {"gpt_oss": "--tool-call-parser openai"}
"""What the engine must be told of a model."""


def make_model(name: str, folder: Path) -> Path:
    """The folder of a tiny model: its configuration, and the tokenizer of the one that is there."""
    made = folder / name
    shutil.copytree(model_folder(), made)
    (made / "config.json").write_text(json.dumps(MODELS[name]))
    return made


async def live(name: str) -> None:
    """One engine with this model, and conversations."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = await start_server(folder / "data", port=free_port())
        stack.push_async_callback(server.stop)
        one, two, client = [
            await stack.enter_async_context(connected([server.url], who)) for who in ("one", "two", "client")
        ]
        completer = await stack.enter_async_context(Completer(client, "default"))
        coordinator, router = Coordinator(one, "default", newest=True), Router(two, "default")
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        await group.start(coordinator.run)
        await group.start(router.run)
        engine = Live(
            "a",
            installed(),
            server.url,
            folder,
            model=str(make_model(name, folder)),
            arguments=f"--max-model-len 768 {ARGUMENTS.get(name, '')}",
        )
        run = Run(client, completer, coordinator, [engine])
        await client.subscribe("kv.default.cache.*", cb=run.count_removed)
        stack.callback(engine.kill_engine)
        stack.callback(engine.kill_adapter)
        engine.start_engine()
        engine.start_adapter()
        await run.until("the engine is a node", lambda: run.up(1))
        await scenes(run, engine, name)
    total, exact = sum(row.requests for row in run.rows), sum(row.exact for row in run.rows)
    above = sum(row.above for row in run.rows)
    say(f"{name + ', all':28} {total:4} requests, {exact:4} predicted exactly, {above} tokens too many")
    if above or exact < 0.99 * total:
        raise SystemExit("more was foretold than delivered, or fewer than 99 % were right")


async def scenes(run: Run, engine: Live, name: str) -> None:
    nodes = run.coordinator.state.nodes
    await run.talk(f"{name}, one by one", 4)
    if nodes["a"].groups is None:
        raise SystemExit("the engine told of no further group")
    say(f"its further groups: {nodes['a'].groups.layouts}")
    await run.talk(f"{name}, eviction pressure", 8, talks=8)
    # Prompts that part again where the window of others has moved on.
    system = run.prompt(400)
    rows = [
        (await run.request(f"parts-{at}", prompt=[*system[: 400 - 48 * at], *run.prompt(40)]))[0] for at in range(8)
    ]
    run.note(f"{name}, prefixes that part", rows)
    epoch = nodes["a"].epoch
    engine.kill_adapter()
    engine.start_adapter()
    await run.until("the adapter is back", lambda: nodes["a"].epoch > epoch and nodes["a"].lost is None)
    await run.talk(f"{name}, adapter back", 3)
    await run.reset("a")
    # The engine tells of the reset with its next batch only.
    await run.request("after-reset", prompt=run.prompt(40))
    await run.talk(f"{name}, reset_prefix_cache", 3)


if __name__ == "__main__":
    if not model_folder().exists():
        raise SystemExit("no model: give KVPLANE_TINY_MODEL the folder of a small one that fits blocks of 32 tokens")
    for model in sys.argv[1:] or ["gemma3"]:
        run_async(live, model)
