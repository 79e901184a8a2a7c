"""HTTP beside a service, in its event loop: `/metrics` for Prometheus, `/healthz` and `/readyz` for its supervisor.

An answer shows by itself that the loop turns: where it is late, the service is.
"""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import structlog
from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from kvplane.services.observability.collect import FOLLOWING, Observed, registry
from kvplane.services.observability.lifeline import Lifeline
from kvplane.services.protocol.errors import BadRequest, HttpFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from kvplane.services.observability.collect import Service

UNIX = "unix:"
"""How an address begins that is a socket's path: processes of one service are asked there by the one that started them."""
LOOK_SECONDS = 1.0
REPEAT_SECONDS = 10.0
"""How often a service that is not ready says why."""

_log = structlog.get_logger("kvplane.http")


@asynccontextmanager
async def observing(http: str | None, *services: Service, optional: bool = False) -> AsyncIterator[str | None]:
    """Watch the services' connections for the length of a block and, with an address, answer HTTP about them.

    Gives the address. One that is `optional` is none when somebody else has it. Raises `BadRequest` or `HttpFailed` when
    another one can't be listened on, and `ConnectionBroken` as `Lifeline.run` does.
    """
    observed = [Observed(service, Lifeline(service.client, service.role)) for service in services]
    async with listening(http, observed, optional=optional) as where, anyio.create_task_group() as group:
        for one in observed:
            group.start_soon(one.lifeline.run)
            if one.service.role in FOLLOWING:
                group.start_soon(one.lifeline.watch_log, one.service.fleet)
        group.start_soon(_log_readiness, services)
        yield where
        group.cancel_scope.cancel()


async def _log_readiness(services: Sequence[Service]) -> None:
    """Log when services become ready or are no more, and now and then why they are not."""
    logged: dict[str, float] = {}
    begun: set[str] = set()
    while True:
        # Not at once: most are ready within a second.
        await anyio.sleep(LOOK_SECONDS)
        for service in services:
            reason, facts = service.readiness()
            if reason and anyio.current_time() - logged.get(service.role, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                logged[service.role] = anyio.current_time()
                # That one which begins is not ready yet is no news.
                say = _log.warning if service.role in begun else _log.info
                say("not_ready", service=service.role, reason=reason)
            elif not reason and (service.role in logged or service.role not in begun):
                say = _log.warning if service.role in begun else _log.info
                say("ready", service=service.role, **facts)
                logged.pop(service.role, None)
                begun.add(service.role)


def address(http: str) -> tuple[str, int]:
    """Host and port of an address. Raises `BadRequest`."""
    host, colon, port = http.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise BadRequest(
            f"--http is {http!r}; give HOST:PORT, such as 127.0.0.1:9464, or 0.0.0.0:9464 for all interfaces"
        )
    return host, int(port)


def check_address(http: str | None) -> None:
    """Raise `BadRequest` for an address that is none, before anything is started."""
    if http:
        address(http)


@asynccontextmanager
async def listening(http: str | None, observed: Sequence[Observed], *, optional: bool) -> AsyncIterator[str | None]:
    """Answer HTTP about services at an address, if there is one; gives where."""
    if not http:
        yield None
        return
    async with served(http, _application(observed), optional=optional) as where:
        yield where


@asynccontextmanager
async def served(http: str, application: web.Application, *, optional: bool = False) -> AsyncIterator[str | None]:
    """Serve an application at HOST:PORT, or at `unix:PATH`; gives where. Raises `HttpFailed`."""
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    try:
        host, port = ("", 0) if http.startswith(UNIX) else address(http)
        site = web.TCPSite(runner, host, port) if host else web.UnixSite(runner, http.removeprefix(UNIX))
        try:
            await site.start()
        except socket.gaierror:
            raise HttpFailed(f"--http: no address is known for host {host!r}; give one of this machine's") from None
        except OSError as error:
            # Tried, not looked at before: between a look and this somebody else could take it.
            if not optional:
                raise HttpFailed(
                    f"--http {http} can't be listened on ({os.strerror(error.errno or 0)}); choose another, or stop what has it"
                ) from None
            _log.warning("http_taken", address=http, instead="nothing; choose another with --http")
            yield None
        else:
            _log.info("http_listens", address=http)
            yield http
    finally:
        with anyio.CancelScope(shield=True):
            await runner.cleanup()


def _application(observed: Sequence[Observed]) -> web.Application:
    async def healthz(_: web.Request) -> web.Response:
        states = {
            one.service.role: {
                "reason": "the connection's read loop has ended" if one.lifeline.deaf else "",
                "connected": one.service.client.is_connected,
                "read_loop_failures": one.lifeline.failures,
            }
            for one in observed
        }
        return _answer("alive", states)

    async def readyz(_: web.Request) -> web.Response:
        found = {one.service.role: one.service.readiness() for one in observed}
        return _answer("ready", {role: {"reason": one.reason, **one.facts} for role, one in found.items()})

    application = web.Application()
    application.router.add_get("/metrics", make_aiohttp_handler(registry(observed)))
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/readyz", readyz)
    return application


def _answer(what: str, states: dict[str, dict[str, Any]]) -> web.Response:
    """200, or 503 with the reasons of all services that are not so."""
    reasons = [f"{role}: {state['reason']}" for role, state in states.items() if state["reason"]]
    body = {what: not reasons, "reason": "; ".join(reasons), "services": states}
    return web.json_response(body, status=503 if reasons else 200)
