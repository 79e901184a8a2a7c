"""A real vLLM engine that asks for a key, loads and unloads a LoRA adapter while it runs, sleeps and wakes up.

`make test-engine` runs it behind `live`, with one engine: some minutes. With `ranks` as its argument it is an engine of two
data-parallel ranks instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from secrets import token_hex
from typing import Any

import anyio

from kvplane.events.log.connection import connected
from kvplane.services.cli.common import run_async
from kvplane.services.dataplane.complete import Completer
from kvplane.services.embedded.server import start_server
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from tests.engines.live import MAKE_ADAPTER, Live, Run, installed, make_adapters, model_folder, say
from tests.support.ports import free_port

LATE = "late"
WHILE_SECONDS = 180.0


async def live(ranks: int = 1) -> None:
    python, key = installed(), token_hex(8)
    # The adapter is started with this environment.
    os.environ["KVPLANE_API_KEY"] = key
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_adapters(python, folder)
        config = model_folder() / "config.json"
        subprocess.run([python, "-c", MAKE_ADAPTER, folder / LATE, config, "9"], check=True)  # noqa: ASYNC221
        server = await start_server(folder / "data", port=free_port())
        stack.push_async_callback(server.stop)
        one, two, client = [
            await stack.enter_async_context(connected([server.url], name)) for name in ("one", "two", "client")
        ]
        completer = await stack.enter_async_context(Completer(client, "default", api_key=key))
        coordinator, router = Coordinator(one, "default"), Router(two, "default")
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        await group.start(coordinator.run)
        await group.start(router.run)
        several = f"--data-parallel-size {ranks}" if ranks > 1 else ""
        engine = Live(
            "a", python, server.url, folder, arguments=several, VLLM_API_KEY=key, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True"
        )  # fmt: skip
        run = Run(client, completer, coordinator, [engine])
        await client.subscribe("kv.default.cache.*", cb=run.count_removed)
        stack.callback(engine.kill_engine)
        stack.callback(engine.kill_adapter)
        engine.start_engine()
        engine.start_adapter()
        await run.until("the engine is a node", lambda: run.up(ranks))
        await (scenes(run, engine) if ranks == 1 else of_ranks(run))
    wrong = [row for row in run.rows if row.exact < row.requests or row.above]
    if wrong or run.beyond:
        raise SystemExit(f"not predicted exactly: {wrong}; {run.beyond}")


async def scenes(run: Run, engine: Live) -> None:
    nodes = run.coordinator.state.nodes

    async def post(path: str, body: dict[str, Any]) -> None:
        async with run.completer.http.post(engine.url + path, json=body) as answer:
            answer.raise_for_status()

    await run.talk("an engine with a key", 3)
    folder = str(engine.folder / LATE)
    await post("/v1/load_lora_adapter", {"lora_name": LATE, "lora_path": folder})
    await timed(run, "the LoRA is known", lambda: LATE in nodes["a"].registered.models)
    await run.talk("a LoRA loaded at runtime", 3, model=LATE)
    await run.talk("beside it, the base model", 2)
    await post("/v1/unload_lora_adapter", {"lora_name": LATE})
    await timed(run, "the LoRA is gone", lambda: LATE not in nodes["a"].registered.models)
    await run.talk("after it was unloaded", 2)
    for level in (1, 2, 0):
        await post(f"/sleep?level={level}", {})
        await timed(run, f"it sleeps at level {level}", lambda: nodes["a"].lost is not None)
        # On a machine that stood still meanwhile it may be lost for its silence.
        say(f"lost: {nodes['a'].lost}")
        await post("/wake_up" if level else "/wake_up?tags=scheduling", {})
        await timed(run, "it is back", lambda: nodes["a"].lost is None)
        await run.talk(f"slept at level {level}", 3)


async def of_ranks(run: Run) -> None:
    """Conversations that stay at the rank that has them."""
    await run.talk("two data-parallel ranks", 6)
    await run.talk("the same, eight talks", 3, talks=8)
    index = run.coordinator.state.caches.index("tiny")
    held = {
        name: len(index.held(node.slots["gpu"])) for name, node in run.coordinator.state.nodes.items() if node.slots
    }
    say(f"blocks that ranks hold: {held}")
    if len(held) < 2 or not all(held.values()):
        raise SystemExit("one rank got nothing")


async def timed(run: Run, what: str, holds: Any) -> None:
    begin = anyio.current_time()
    await run.until(what, holds, WHILE_SECONDS)
    say(f"{what} after {anyio.current_time() - begin:.1f} s")


if __name__ == "__main__":
    if not model_folder().exists():
        raise SystemExit("no model: give KVPLANE_TINY_MODEL the folder of a small one that fits blocks of 32 tokens")
    run_async(live, 2 if sys.argv[1:] == ["ranks"] else 1)
