"""The command `up`: a server with its log in a folder, and the services on it."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import anyio
import structlog
from cyclopts import Parameter

from kvplane.events.errors import LogMissing
from kvplane.events.log.connection import CONNECT_SECONDS
from kvplane.events.log.stream import stream_info
from kvplane.services.auth.folder import FIRST, AuthFolder
from kvplane.services.cli import show
from kvplane.services.cli.common import (
    COMMON,
    Common,
    Http,
    ServedPolicyModules,
    allow_modules,
    failing_as,
    outlasting,
    run_until_signal,
    start,
)
from kvplane.services.cli.gateway import LISTEN, listening
from kvplane.services.cli.guarding import GUARDING, Guarding, on_hangup, warn_of_strangers
from kvplane.services.cli.show import Styled
from kvplane.services.demo.people import People
from kvplane.services.embedded.keeper import kept
from kvplane.services.embedded.server import holding, reached_at, start_server
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.observability.web import address, observing
from kvplane.services.process.workers import beside
from kvplane.services.protocol.errors import BadRequest, HttpFailed
from kvplane.services.roles.coordinator import Coordinator
from kvplane.services.roles.router import Router
from kvplane.services.simulation.simnode import NodeConfig, SimNodes

if TYPE_CHECKING:
    import socket

    from nats.aio.client import Client

    from kvplane.services.auth.roles import Role
    from kvplane.services.gateway.guard import Guarded
    from kvplane.services.observability.collect import Service

UP_HTTP = "127.0.0.1:9464"
"""Where `up` serves metrics and health without `--http`; the historian, a process of its own, on the next port."""
RESTART_SECONDS = 5.0
LONGEST_SECONDS = 60.0
"""Pause before a historian that ended is run again; doubled while it ends within a minute."""
STOP_SECONDS = 15.0
LEAVE_SECONDS = 1.0
"""How long simulated nodes may take to say that they leave."""

_log = structlog.get_logger("kvplane.up")


def up(
    *,
    data: Annotated[Path, Parameter(env_var="KVPLANE_DATA")] = Path("kvplane-data"),
    host: Annotated[str, Parameter(env_var="KVPLANE_HOST")] = "127.0.0.1",
    # Not KVPLANE_PORT: Kubernetes sets that to a URL for a Service of the name kvplane.
    port: Annotated[int, Parameter(env_var="KVPLANE_PORT_NUMBER")] = 4222,
    simulate: Annotated[int, Parameter(env_var="KVPLANE_SIMULATE")] = 0,
    traffic: Annotated[bool, Parameter(negative="", env_var="KVPLANE_TRAFFIC")] = False,
    bare: Annotated[bool, Parameter(env_var="KVPLANE_BARE")] = False,
    no_history: Annotated[bool, Parameter(negative="", env_var="KVPLANE_NO_HISTORY")] = False,
    trust_history: Annotated[bool, Parameter(negative="", env_var="KVPLANE_TRUST_HISTORY")] = False,
    policy_module: ServedPolicyModules = (),
    gateway: Annotated[str | None, Parameter(env_var="KVPLANE_GATEWAY")] = None,
    http: Http = None,
    auth: Annotated[Path | None, Parameter(env_var="KVPLANE_AUTH")] = None,
    guarding: Guarding = GUARDING,
    common: Common = COMMON,
) -> None:
    """Start a NATS server with its log in a folder, a coordinator, a gateway with its router, and a historian, until Ctrl-C.

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
    traffic
        Have people talk to the simulated nodes, so that there is something to see: conversations of several turns, with
        sessions, through the router; for each node a request in some three seconds.
    bare
        Start the server only.
    no_history
        Keep no history; otherwise it lies beside the log, kept by a process of its own.
    trust_history
        Begin with what a historian gives, when the log was purged and no snapshot leads there. Without --auth that is so in
        any case: nobody but the own historian is there yet.
    policy_module
        Modules from which policies of the form module:attr may be taken; they may lie in the current folder.
    gateway
        HOST:PORT where clients of OpenAI's and Anthropic's APIs are served. Default is 127.0.0.1:8080 where that port is
        free; `off` is none, only a router.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), and the port after it for the historian's. Default is
        127.0.0.1:9464 where these ports are free; `off` is none.
    auth
        Folder of `kvplane auth init`: ask everyone for credentials, and encrypt.
    """
    start(common)
    # What is written from here on is for its owner alone: the log, the history, and what servers say of themselves.
    os.umask(0o077)
    if simulate < 0:
        raise BadRequest(f"--simulate is {simulate}; it must not be negative")
    if traffic and (bare or not simulate):
        raise BadRequest("--traffic talks to simulated nodes; add --simulate 4, without --bare")
    allow_modules(policy_module)
    inside = _Inside(common, auth, tuple(policy_module))
    at = None if bare else _up_gateway(gateway)
    guarded = guarding.guarded()
    if at is not None:
        warn_of_strangers(at, guarding)
    elif guarding != GUARDING:
        raise BadRequest(
            "--keys, --tls-cert and --engine-key are a gateway's, and there is none; see --gateway and --bare"
        )
    run_until_signal(
        partial(
            _up, data, host=host, port=port, simulate=simulate, traffic=traffic, bare=bare, history=not no_history,
            gateway=at, http=_up_http(http), inside=inside, trust=trust_history,
            guarded=guarded,
        )
    )  # fmt: skip


def _up_gateway(gateway: str | None) -> socket.socket | None:
    """Where the gateway is to listen; none without one. Raises `BadRequest` or `HttpFailed`."""
    if gateway == "off":
        return None
    try:
        return bound(*listening(gateway or LISTEN, "--gateway"))
    except HttpFailed:
        if gateway is not None:
            raise
        _log.warning("gateway_port_taken", address=LISTEN, instead="a router only; choose another with --gateway")
        return None


class _Http(NamedTuple):
    """Addresses of metrics, for this process and for the historian's. Where `optional`, there is none that is taken."""

    own: str | None
    historian: str | None
    optional: bool


def _up_http(http: str | None) -> _Http:
    """Where metrics are to be served. Raises `BadRequest`."""
    if http == "off":
        return _Http(None, None, optional=True)
    host, port = address(http or UP_HTTP)
    asked = f"{host}:{port}" if ":" not in host else f"[{host}]:{port}"
    return _Http(asked, asked.removesuffix(str(port)) + str(port and port + 1), optional=not http)


class _Inside:
    """How what `up` runs connects to its server: each with credentials of its own, if there are any."""

    def __init__(self, common: Common, auth: Path | None, modules: tuple[str, ...] = ()) -> None:
        self.fleet = common.fleet
        self.modules = modules
        """Where policies may be taken from."""
        self.auth = None if auth is None else AuthFolder.existing(auth)
        self._common = common

    def prepare(self, nodes: list[str]) -> Path | None:
        """Let everyone in who is to be; what the server includes."""
        if self.auth is None:
            return None
        for role in FIRST:
            self.auth.add(self.fleet, role)
        for name in nodes:
            self.auth.add(self.fleet, "node", name)
        self.auth.save()
        return self.auth.place_alone()

    def common(self, url: str, role: Role, name: str = "") -> Common:
        """Options of one service."""
        own = replace(self._common, server=(url,))
        if self.auth is None:
            return own
        return replace(own, credentials=self.auth.seed_file(self.fleet, role, name), ca=self.auth.ca)

    def warn_of_another(self, url: str) -> None:
        """Say that a server which was named is not the one that is used."""
        if self._common.server not in {COMMON.server, (url,)}:
            hint = "`up` starts a server of its own; `kvplane coordinator`, `router` and `historian` use one that runs"
            _log.warning("server_not_used", own=url, hint=hint)


async def _up(
    data: Path, *, host: str, port: int, simulate: int, traffic: bool, bare: bool, history: bool,
    gateway: socket.socket | None, http: _Http, inside: _Inside, guarded: Guarded, trust: bool = False,
) -> None:  # fmt: skip
    configs = [NodeConfig(name=f"sim-{number + 1}", http="127.0.0.1") for number in range(simulate)]
    include = inside.prepare([config.name for config in configs])
    observed: str | None = None
    people: People | None = None
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(holding(data, reached_at(host, port)))
        begin = partial(start_server, data, host=host, port=port, include=include, owner=owner)
        keeper = await stack.enter_async_context(kept(begin))
        url = keeper.server.url
        inside.warn_of_another(url)

        async def client(role: Role, name: str = "") -> Client:
            return await stack.enter_async_context(
                inside.common(url, role, name).connected(name or role, seconds=CONNECT_SECONDS)
            )

        # Clients are entered after the server and so leave before it.
        if not bare:
            coordinator = Coordinator(
                await client("coordinator"), inside.fleet, server=keeper.about, newest=True,
                trust_history=trust or (history and inside.auth is None),
            )  # fmt: skip
            services: list[Service] = [
                Router(await client("router"), inside.fleet)
                if gateway is None
                else Gateway(await client("router"), inside.fleet, gateway, hub_cache=True, guarded=guarded),
            ]  # fmt: skip
            if configs:
                engines = [await client("node", config.name) for config in configs]
                services.append(SimNodes(engines, inside.fleet, configs, leave_seconds=LEAVE_SECONDS))
            observed = await stack.enter_async_context(
                observing(http.own, coordinator, *services, optional=http.optional)
            )
            keep_history = partial(
                _keep_history, data / "history", http, inside.modules, inside.common(url, "historian")
            )
            there = await _has_log(coordinator.client, inside.fleet)
            if history and there:
                # A coordinator may need what it has.
                early = await stack.enter_async_context(anyio.create_task_group())
                early.start_soon(keep_history)
            # It outlasts the others: nodes tell it that they leave.
            await stack.enter_async_context(outlasting(coordinator.run))
            group = await stack.enter_async_context(anyio.create_task_group())
            for service in services:
                await group.start(service.run)
                if isinstance(service, Gateway) and (guarded.keys or guarded.tls_cert):
                    group.start_soon(on_hangup, service.guard.reload)
            if history and not there:
                group.start_soon(keep_history)
            if traffic:
                people = People(
                    await client("client"),
                    inside.fleet,
                    configs[0].model,
                    nodes=simulate,
                    block_size=configs[0].block_size,
                )
                group.start_soon(people.run)
        _say(
            inside, url, data, http=observed, simulated=bool(configs), history=history, bare=bare,
            talking=people.talking if people else 0, gateway=gateway,
            guarded=guarded,
        )  # fmt: skip
        await anyio.sleep_forever()


async def _has_log(client: Client, fleet: str) -> bool:
    """Whether the fleet has a log, without which there is no historian."""
    try:
        await stream_info(client.jetstream(), fleet)
    except LogMissing:
        return False
    return True


def _say(
    inside: _Inside, url: str, data: Path, *, http: str | None, simulated: bool, history: bool, bare: bool, talking: int,
    gateway: socket.socket | None, guarded: Guarded,
) -> None:  # fmt: skip
    """What there is now, and what to try."""
    if gateway is not None:
        host, port = gateway.getsockname()[:2]
        served = f"{'https' if guarded.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        show.say(Styled(served, "bold"), " serves OpenAI's API at /v1, and Anthropic's", error=True, wrap=False)
    where = f" at {url}, fleet {inside.fleet!r}, log in {data.absolute()}"
    show.say(Styled("kvplane is up", "bold"), where, error=True, wrap=False)
    option = "" if url == COMMON.server[0] else f" --server {url}"
    if inside.auth is not None:
        admin = inside.common(url, "admin")
        option += f" --ca {admin.ca} --credentials {admin.credentials}"
        show.say(f"  after `kvplane auth add`: kill -HUP $(cat {data / 'nats-server.pid'})", error=True, wrap=False)
    tries = [f"kvplane node list{option}", f"kvplane events tail{option}"]
    if history and not bare:
        tries.append(f"kvplane sql 'SHOW TABLES'{option}")
    if http:
        tries.append(f"curl http://{http}/metrics")
    if simulated and not bare:
        if gateway is not None:
            key = " -H 'authorization: Bearer KEY'" if guarded.keys else ""
            tries.append(f'curl {served}/v1/completions{key} -d \'{{"model": "sim", "prompt": "Hello"}}\'')
        tries.append(f"kvplane route sim --prompt 'Hello, which node is mine?'{option}")
    for line in tries:
        show.say(f"  {line}", error=True, wrap=False)
    if talking:
        message = f"{talking} people talk to the nodes at a time, and after some seconds there is something to see:"
        show.say(message, error=True, wrap=False)
        shown = ["report", "sql 'FROM hit_rate_by_node'", "explain REQUEST"] if history else ["node list"]
        for command in shown:
            hint = "    # one of those that `events tail` shows" if command.startswith("explain") else ""
            show.say(f"  kvplane {command}{option}{hint}", error=True, wrap=False)
    show.say("Ctrl-C stops it.", error=True)


async def _keep_history(folder: Path, http: _Http, modules: tuple[str, ...], common: Common) -> None:
    """Run a historian beside this process, again when it ends: routers don't share their core with it."""
    pause = RESTART_SECONDS
    while True:
        began = anyio.current_time()
        code = await beside(_historian, folder, http, modules, common, patience=STOP_SECONDS)
        pause = RESTART_SECONDS if anyio.current_time() - began > LONGEST_SECONDS else min(2 * pause, LONGEST_SECONDS)
        _log.error("historian_ended", code=code, again_in=pause)
        await anyio.sleep(pause)


def _historian(folder: Path, http: _Http, modules: tuple[str, ...], common: Common) -> None:
    from kvplane.services.cli.historian import keep  # noqa: PLC0415 - DuckDB is loaded in that process only

    with failing_as("historian_failed"):
        keep(folder, http.historian, http.optional, modules, common)
