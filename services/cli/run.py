"""Commands that run one service: `router`, `coordinator`, `simnode`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from kvplane.services.cli.common import (
    COMMON,
    Common,
    Http,
    ServedPolicyModules,
    allow_modules,
    run_until_signal,
    start,
)
from kvplane.services.membership.leaving import LEAVE_SECONDS
from kvplane.services.observability.web import check_address, observing
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.replication.compaction import SNAPSHOT_BYTES, SNAPSHOT_COMMITS
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.simulation.simnode import NodeConfig, SimNodes

if TYPE_CHECKING:
    from kvplane.services.observability.collect import Service


def router(*, policy_module: ServedPolicyModules = (), http: Http = None, common: Common = COMMON) -> None:
    """Run a router. Start as many as you like; they share the requests.

    Parameters
    ----------
    policy_module
        Modules from which policies of the form module:attr may be taken; they may lie in the current folder.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none.
    """
    start(common)
    check_address(http)
    allow_modules(policy_module)
    run_until_signal(_run_router, http, common)


async def _run_router(http: str | None, common: Common) -> None:
    async with common.connected("kvplane-router") as client:
        await _observed(http, Router(client, common.fleet))


async def _observed(http: str | None, service: Service) -> None:
    async with observing(http, service):
        await service.run()


def coordinator(
    *,
    replicas: Annotated[int | None, Parameter(env_var="KVPLANE_REPLICAS")] = None,
    snapshot_commits: Annotated[int, Parameter(env_var="KVPLANE_SNAPSHOT_COMMITS")] = SNAPSHOT_COMMITS,
    snapshot_bytes: Annotated[int, Parameter(env_var="KVPLANE_SNAPSHOT_BYTES")] = SNAPSHOT_BYTES,
    policy_module: ServedPolicyModules = (),
    trust_history: Annotated[bool, Parameter(negative="", env_var="KVPLANE_TRUST_HISTORY")] = False,
    http: Http = None,
    common: Common = COMMON,
) -> None:
    """Run a coordinator. Start as many as you like; there is no leader.

    Parameters
    ----------
    replicas
        Copies of the log, if this coordinator creates it: 1, 3 or 5. By itself 3 on a cluster and 1 on a single server.
    snapshot_commits
        Take a snapshot of the state when so many commits have come since the last one.
    snapshot_bytes
        Take one when so many bytes of commits have come, too.
    policy_module
        Modules from which policies of the form module:attr may be taken; they may lie in the current folder.
    trust_history
        Begin with what a historian gives, when the log was purged, no snapshot is left and no replica runs that vouches for it.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none.
    """
    start(common)
    check_address(http)
    allow_modules(policy_module)
    if replicas not in {None, 1, 3, 5}:
        raise BadRequest(f"--replicas is {replicas}; it must be 1, 3 or 5")
    for option, value in (("--snapshot-commits", snapshot_commits), ("--snapshot-bytes", snapshot_bytes)):
        if value < 1:
            raise BadRequest(f"{option} is {value}; it must be at least 1")
    run_until_signal(_run_coordinator, replicas, snapshot_commits, snapshot_bytes, trust_history, http, common)


async def _run_coordinator(
    replicas: int | None, snapshot_commits: int, snapshot_bytes: int, trust_history: bool, http: str | None,  # noqa: FBT001 - as asked
    common: Common,
) -> None:  # fmt: skip
    async with common.connected("kvplane-coordinator") as client:
        service = Coordinator(
            client, common.fleet, replicas=replicas, snapshot_commits=snapshot_commits, snapshot_bytes=snapshot_bytes,
            trust_history=trust_history, newest=True,
        )  # fmt: skip
        await _observed(http, service)


def simnode(
    *name: str,
    model: Annotated[str, Parameter(env_var="KVPLANE_MODEL")] = "sim",
    cache_mode: Annotated[Literal["reported", "managed"], Parameter(env_var="KVPLANE_CACHE_MODE")] = "reported",
    block_size: Annotated[int, Parameter(env_var="KVPLANE_BLOCK_SIZE")] = 16,
    capacity_blocks: Annotated[int, Parameter(env_var="KVPLANE_CAPACITY_BLOCKS")] = 4096,
    prefill_speed: Annotated[float, Parameter(env_var="KVPLANE_PREFILL_SPEED")] = 8000.0,
    decode_speed: Annotated[float, Parameter(env_var="KVPLANE_DECODE_SPEED")] = 60.0,
    max_active: Annotated[int, Parameter(env_var="KVPLANE_MAX_ACTIVE")] = 64,
    host: Annotated[str, Parameter(env_var="KVPLANE_HOST")] = "127.0.0.1",
    http: Http = None,
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
    host
        Address on which the nodes answer as engines do, each at a port of its own.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none.
    """
    start(common)
    check_address(http)
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
            http=host,
        )
        for each in name
    ]
    run_until_signal(_run_simnodes, configs, http, common)


async def _run_simnodes(configs: list[NodeConfig], http: str | None, common: Common) -> None:
    async with common.connected("kvplane-simnode") as client:
        await _observed(http, SimNodes([client], common.fleet, configs, leave_seconds=LEAVE_SECONDS))
