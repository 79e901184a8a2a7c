"""Commands that run on: `up`, `router`, `coordinator`, `simnode`."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import anyio
import structlog
from cyclopts import Parameter
from rich.console import Console

from events.errors import KvplaneError
from events.log.connection import connected
from services.cli.common import COMMON, Common, PolicyModules, run_until_signal, start
from services.compaction import SNAPSHOT_COMMITS
from services.coordinator import Coordinator
from services.errors import BadRequest
from services.router import Router
from services.routing.policies import allow
from services.server import embedded_server
from services.simnode import NodeConfig, run_nodes
from services.workers import beside

RESTART_SECONDS = 5.0
STOP_SECONDS = 15.0

_log = structlog.get_logger("kvplane.up")


def up(
    *,
    data: Annotated[Path, Parameter(env_var="KVPLANE_DATA")] = Path("kvplane-data"),
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(env_var="KVPLANE_PORT")] = 4222,
    simulate: int = 0,
    bare: bool = False,
    no_history: Annotated[bool, Parameter(negative="")] = False,
    common: Common = COMMON,
) -> None:
    """Start a NATS server with its log in a folder, a coordinator, a router and a historian, until Ctrl-C.

    Parameters
    ----------
    data
        Folder of the log. Keep it: it is all that must survive.
    host
        Address to listen on.
    port
        Port to listen on.
    simulate
        Also run this many simulated nodes, named sim-1, sim-2, ... of model `sim`.
    bare
        Start the server only.
    no_history
        Keep no history; otherwise it lies beside the log, kept by a process of its own.
    """
    start(common)
    if simulate < 0:
        raise BadRequest(f"--simulate is {simulate}; it must not be negative")
    run_until_signal(_up, data, host, port, simulate, bare, not no_history, common)


async def _up(
    data: Path, host: str, port: int, simulate: int, bare: bool, history: bool, common: Common  # noqa: FBT001
) -> None:  # fmt: skip
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(embedded_server(data, host=host, port=port))
        # Clients are entered after the server and so leave before it.
        if not bare:
            clients = [
                await stack.enter_async_context(connected([server.url], name))
                for name in ("coordinator", "router", "simulated nodes")[: 3 if simulate else 2]
            ]
            group = await stack.enter_async_context(anyio.create_task_group())
            await group.start(Coordinator(clients[0], common.fleet).run)
            await group.start(Router(clients[1], common.fleet).run)
            if simulate:
                configs = [NodeConfig(name=f"sim-{number + 1}") for number in range(simulate)]
                await group.start(run_nodes, clients[2], common.fleet, configs)
            if history:
                group.start_soon(_keep_history, data / "history", server.url, common)
        console = Console(stderr=True)
        console.print(f"[bold]kvplane is up[/] at {server.url}, fleet {common.fleet!r}, log in {data.absolute()}")
        option = "" if server.url == COMMON.server[0] else f" --server {server.url}"
        console.print(f"  kvplane node list{option}\n  kvplane events tail{option}")
        if history and not bare:
            console.print(f"  kvplane sql 'SHOW TABLES'{option}")
        if simulate:
            console.print(f"  kvplane route sim --prompt 'Hello, which node is mine?'{option}")
        console.print("Ctrl-C stops it.")
        await anyio.sleep_forever()


async def _keep_history(folder: Path, url: str, common: Common) -> None:
    """Run a historian beside this process, again when it ends: routers don't share their core with it."""
    while True:
        code = await beside(_historian, folder, replace(common, server=(url,)), patience=STOP_SECONDS)
        _log.error("historian_ended", code=code, again_in=RESTART_SECONDS)
        await anyio.sleep(RESTART_SECONDS)


def _historian(folder: Path, common: Common) -> None:
    from services.cli.history import historian  # noqa: PLC0415 - DuckDB is loaded in that process only

    try:
        historian(history=folder, common=common)
    except KvplaneError as error:
        _log.error("historian_failed", error=str(error), code=error.code)
        sys.exit(1)


def router(*, policy_module: PolicyModules = (), common: Common = COMMON) -> None:
    """Run a router. Start as many as you like; they share the requests.

    Parameters
    ----------
    policy_module
        Modules from which policies of the form module:attr may be taken.
    """
    start(common)
    allow(policy_module)
    run_until_signal(_run_router, common)


async def _run_router(common: Common) -> None:
    async with connected(common.server, "kvplane-router") as client:
        await Router(client, common.fleet).run()


def coordinator(
    *,
    replicas: int | None = None,
    snapshot_commits: int = SNAPSHOT_COMMITS,
    policy_module: PolicyModules = (),
    common: Common = COMMON,
) -> None:
    """Run a coordinator. Start as many as you like; there is no leader.

    Parameters
    ----------
    replicas
        Copies of the log, if this coordinator creates it: 1, 3 or 5. By itself 3 on a cluster and 1 on a single server.
    snapshot_commits
        Take a snapshot of the state when so many commits have come since the last one.
    policy_module
        Modules from which policies of the form module:attr may be taken.
    """
    start(common)
    allow(policy_module)
    if replicas not in {None, 1, 3, 5}:
        raise BadRequest(f"--replicas is {replicas}; it must be 1, 3 or 5")
    if snapshot_commits < 1:
        raise BadRequest(f"--snapshot-commits is {snapshot_commits}; it must be at least 1")
    run_until_signal(_run_coordinator, replicas, snapshot_commits, common)


async def _run_coordinator(replicas: int | None, snapshot_commits: int, common: Common) -> None:
    async with connected(common.server, "kvplane-coordinator") as client:
        await Coordinator(client, common.fleet, replicas=replicas, snapshot_commits=snapshot_commits).run()


def simnode(
    *name: str,
    model: str = "sim",
    cache_mode: Literal["reported", "managed"] = "reported",
    block_size: int = 16,
    capacity_blocks: int = 4096,
    prefill_speed: float = 8000.0,
    decode_speed: float = 60.0,
    max_active: int = 64,
    common: Common = COMMON,
) -> None:
    """Run simulated nodes of these names in one process.

    Parameters
    ----------
    name
        Names of the nodes.
    model
        Model that they serve.
    cache_mode
        Who owns eviction: the node, which reports it, or the coordinator.
    block_size
        Tokens a block.
    capacity_blocks
        Blocks that a node can hold.
    prefill_speed
        Tokens per second that a node prefills.
    decode_speed
        Tokens per second that each request decodes.
    max_active
        Most requests at once on a node; 0 is no limit.
    """
    start(common)
    if not name:
        raise BadRequest("name at least one node: kvplane simnode node-a node-b")
    if min(prefill_speed, decode_speed) <= 0 or min(block_size, capacity_blocks) < 1:
        raise BadRequest("speeds, block size and capacity must be more than 0")
    configs = [
        NodeConfig(
            name=each,
            model=model,
            cache_mode=cache_mode,
            block_size=block_size,
            capacity_blocks=capacity_blocks,
            prefill_speed=prefill_speed,
            decode_speed=decode_speed,
            max_active=max_active,
        )
        for each in name
    ]
    run_until_signal(_run_simnodes, configs, common)


async def _run_simnodes(configs: list[NodeConfig], common: Common) -> None:
    async with connected(common.server, "kvplane-simnode") as client:
        await run_nodes(client, common.fleet, configs)
        await anyio.sleep_forever()
