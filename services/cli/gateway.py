"""`kvplane gateway`: an OpenAI URL in front of the fleet, in one process or in several on one port."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import anyio
import structlog
from cyclopts import Parameter

from kvplane.services.cli.common import (
    COMMON,
    Common,
    Http,
    ServedPolicyModules,
    allow_modules,
    failing_as,
    run_until_signal,
    start,
)  # fmt: skip
from kvplane.services.cli.guarding import GUARDING, Guarding, on_hangup, warn_of_strangers
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.listener import bound
from kvplane.services.observability.joined import handler
from kvplane.services.observability.web import UNIX, check_address, observing, served
from kvplane.services.process.workers import beside
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    import socket
    from contextlib import AbstractAsyncContextManager

LISTEN = "127.0.0.1:8080"
WORKERS_LIMIT = 256
RESTART_SECONDS, LONGEST_SECONDS = 0.5, 30.0
"""Pause before a worker that ended is started again; doubled while it ends within `LONGEST_SECONDS`, which is the longest."""
STOP_SECONDS = 19.0
"""How long a worker may take to let what is on its way end and to write what it answered: less than `common.STOP_SECONDS`."""

_log = structlog.get_logger("kvplane.gateway")


def gateway(
    *,
    listen: Annotated[str, Parameter(env_var="KVPLANE_LISTEN")] = LISTEN,
    workers: Annotated[int, Parameter(env_var="KVPLANE_WORKERS")] = 1,
    access_log: Annotated[bool, Parameter(env_var="KVPLANE_ACCESS_LOG", negative="")] = False,
    tokenizer: Annotated[tuple[str, ...], Parameter(env_var="KVPLANE_TOKENIZER")] = (),
    continue_streams: Annotated[bool, Parameter(env_var="KVPLANE_CONTINUE_STREAMS")] = True,
    http: Http = None,
    policy_module: ServedPolicyModules = (),
    guarding: Guarding = GUARDING,
    common: Common = COMMON,
) -> None:
    """Serve OpenAI's and Anthropic's APIs in front of the fleet's engines: route, forward, record.

    Parameters
    ----------
    listen
        HOST:PORT for clients; an empty host is every address.
    workers
        Processes that share the port; each is a replica of the fleet with a router of its own. One that ends is started again.
    access_log
        Write a line of JSON a request to standard output.
    tokenizer
        MODEL=FOLDER with tokenizer.json and the chat template of a model, whose tokens are then found here instead of asked of
        engines; may be repeated. Models of the Hugging Face hub that are in its cache on this machine need none.
    continue_streams
        Go on at another engine with a stream whose engine broke off, where that is exact; else it ends with an error.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none.
    policy_module
        Module that policies may be taken from, as `module:attr`; may be repeated.
    """
    start(common)
    check_address(http)
    host, port = listening(listen)
    if not 1 <= workers <= WORKERS_LIMIT:
        raise BadRequest(f"--workers is {workers}; it must be from 1 to {WORKERS_LIMIT}, about one a core")
    folders = _folders(tokenizer)
    allow_modules(policy_module)
    guarding.guarded()
    serving = _Serving(access_log, folders, continue_streams, guarding, common)
    if workers == 1:
        where = bound(host, port)
        warn_of_strangers(where, guarding)
        run_until_signal(_gateway, where, http, serving)
    else:
        # Nobody else's from here on, and the same port for all when it was given as 0. It does not listen: it would be sent
        # connections.
        bound(host, port).close()
        place = bound(host, port, share=True, listen=False)
        warn_of_strangers(place, guarding)
        run_until_signal(_Several(place, workers, tuple(policy_module), serving).run, http)


def listening(address: str, option: str = "--listen") -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises `BadRequest`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BadRequest(f"{option} is {address[:80]!r}; it must be HOST:PORT, such as {LISTEN}")
    return host.strip("[]"), int(port)


def _folders(given: tuple[str, ...]) -> dict[str, Path]:
    """Folders of models. Raises `BadRequest`."""
    found = {}
    for each in given:
        model, equals, folder = each.rpartition("=")
        if not equals or not model or not Path(folder).is_dir():
            raise BadRequest(
                f"--tokenizer is {each[:200]!r}; it must be MODEL=FOLDER, with a tokenizer.json in the folder"
            )
        found[model] = Path(folder)
    return found


class _Serving(NamedTuple):
    """How gateways serve, in this process or in several."""

    access_log: bool
    folders: dict[str, Path]
    continues: bool
    guarding: Guarding
    common: Common


async def _gateway(where: socket.socket, http: str | None, serving: _Serving) -> None:
    common, guarding = serving.common, serving.guarding
    guarded = guarding.guarded()
    async with common.connected("kvplane-gateway") as client:
        service = Gateway(client, common.fleet, where, tokenizers=serving.folders, hub_cache=True, guarded=guarded)
        service.continues = serving.continues
        if serving.access_log:
            service.access.stream = sys.stdout
        async with observing(http, service), anyio.create_task_group() as group:
            if guarding.reloads:
                group.start_soon(on_hangup, service.guard.reload)
            await service.run()


class _Several:
    """Gateways that share a port, each in a process of its own."""

    def __init__(self, place: socket.socket, count: int, modules: tuple[str, ...], serving: _Serving) -> None:
        self._place = place
        self._count = count
        self._reloads = serving.guarding.reloads
        self._own = (modules, serving)
        self._running: dict[str, str] = {}
        self._restarts = 0

    async def run(self, http: str | None) -> None:
        """Keep them running until cancelled; then all of them let what is on its way end."""
        with tempfile.TemporaryDirectory(prefix="kvplane-") as folder:
            async with self._observed(http), anyio.create_task_group() as group:
                if self._reloads:
                    group.start_soon(on_hangup, self._pass_on)
                for number in range(1, self._count + 1):
                    group.start_soon(self._keep, f"{number}", Path(folder, f"{number}.sock"))

    @staticmethod
    def _pass_on() -> None:
        """Have all of them read their files again. One that has only begun to start reads them anyway, or is started again."""
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGHUP)

    def _observed(self, http: str | None) -> AbstractAsyncContextManager[object]:
        if not http:
            return nullcontext()
        return served(http, handler(lambda: dict(self._running), lambda: self._restarts))

    async def _keep(self, name: str, socket: Path) -> None:
        host, port = self._place.getsockname()[:2]
        pause = RESTART_SECONDS
        while True:
            began = anyio.current_time()
            self._running[name] = str(socket)
            try:
                code = await beside(_worker, host, port, f"{UNIX}{socket}", *self._own, patience=STOP_SECONDS)
            finally:
                del self._running[name]
            lived = anyio.current_time() - began
            pause = RESTART_SECONDS if lived > LONGEST_SECONDS else min(2 * pause, LONGEST_SECONDS)
            _log.error("worker_ended", worker=name, code=code, again_in=pause)
            self._restarts += 1
            await anyio.sleep(pause)


def _worker(host: str, port: int, http: str, modules: tuple[str, ...], serving: _Serving) -> None:
    start(serving.common)
    with failing_as("worker_failed"):
        allow_modules(modules)
        # It listens when the log is read: until then the others get all connections.
        run_until_signal(_gateway, bound(host, port, share=True, listen=False), http, serving)
