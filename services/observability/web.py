"""HTTP beside a service, in its event loop: `/metrics` for Prometheus, `/healthz` and `/readyz` for its supervisor.

An answer shows by itself that the loop turns: where it is late, the service is.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import anyio
import structlog
from prometheus_client.exposition import choose_encoder

from kvplane.services.http.listener import bind, bind_path
from kvplane.services.http.server import Server
from kvplane.services.observability.collect import FOLLOWING, Observed, reading, registry
from kvplane.services.observability.lifeline import Lifeline
from kvplane.services.protocol.errors import BadRequest, HttpFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from prometheus_client import CollectorRegistry

    from kvplane.services.http.server import Exchange
    from kvplane.services.observability.collect import Service
    from kvplane.services.protocol.errors import BadHttp

    Handler = Callable[[Exchange], Awaitable[None]]

UNIX = "unix:"
"""How an address begins that is a socket's path: processes of one service are asked there by the one that started them."""
LOOK_SECONDS = 1.0
CONNECTIONS_LIMIT = 64
"""Most connections: for scrapers and supervisors, not for a crowd."""
BODY_BYTES = 1 << 16
"""Longest body of a request; none is needed."""
_JSON = [(b"content-type", b"application/json; charset=utf-8")]
REPEAT_SECONDS = 10.0
"""How often a service that is not ready says why."""

_log = structlog.get_logger("kvplane.http")


@asynccontextmanager
async def observing(http: str | None, *services: Service, optional: bool = False) -> AsyncIterator[str | None]:
    """Watch the services' connections for the length of a block and, with an address, answer HTTP about them.

    Gives the address. One that is `optional` is none when somebody else has it. Raises `BadRequest` or `HttpFailed` when
    another one can't be listened on, and `ConnectionBroken` as `Lifeline.run` does.
    """
    observed = [
        Observed(service, Lifeline(service.client, service.role, reading=partial(reading, service)))
        for service in services
    ]
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
    async with served(http, _handler(observed), optional=optional) as where:
        yield where


@asynccontextmanager
async def served(http: str, handle: Handler, *, optional: bool = False) -> AsyncIterator[str | None]:
    """Answer HTTP at HOST:PORT, or at `unix:PATH`; gives where. Raises `BadRequest` or `HttpFailed`."""
    host, port = ("", 0) if http.startswith(UNIX) else address(http)
    try:
        where = bind(host, port) if host else bind_path(http.removeprefix(UNIX))
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
        return
    server = Server(handle, refusal, connections=CONNECTIONS_LIMIT, descriptors=2, body_bytes=BODY_BYTES)
    async with server.listening(where):
        _log.info("http_listens", address=http)
        yield http


def _handler(observed: Sequence[Observed]) -> Handler:
    measured = registry(observed)

    async def handle(exchange: Exchange) -> None:
        request = exchange.request
        if request.method not in {b"GET", b"HEAD"}:
            _plain(exchange, 405, "only GET is answered here", [(b"allow", b"GET, HEAD")])
        elif request.path == b"/metrics":
            _metrics(exchange, measured)
        elif request.path == b"/healthz":
            _answer(exchange, "alive", {one.service.role: _alive(one) for one in observed})
        elif request.path == b"/readyz":
            found = {one.service.role: one.service.readiness() for one in observed}
            _answer(exchange, "ready", {role: {"reason": one.reason, **one.facts} for role, one in found.items()})
        else:
            _plain(exchange, 404, "there are /metrics, /healthz and /readyz here")

    return handle


def _metrics(exchange: Exchange, measured: CollectorRegistry) -> None:
    request = exchange.request
    encoder, kind = choose_encoder(request.header(b"accept").decode("latin-1"))
    names = parse_qs(request.target.partition(b"?")[2].decode("latin-1")).get("name[]")
    body = encoder(measured if names is None else measured.restricted_registry(names))
    headers = [(b"content-type", kind.encode())]
    if b"gzip" in request.header(b"accept-encoding"):
        body = gzip.compress(body, 1)
        headers.append((b"content-encoding", b"gzip"))
    exchange.send(200, headers, body)


def _alive(one: Observed) -> dict[str, Any]:
    return {
        "reason": "the connection's read loop has ended" if one.lifeline.deaf else "",
        "connected": one.service.client.is_connected,
        "read_loop_failures": one.lifeline.failures,
    }


def _answer(exchange: Exchange, what: str, states: dict[str, dict[str, Any]]) -> None:
    """200, or 503 with the reasons of all services that are not so."""
    reasons = [f"{role}: {state['reason']}" for role, state in states.items() if state["reason"]]
    body = {what: not reasons, "reason": "; ".join(reasons), "services": states}
    exchange.send(503 if reasons else 200, _JSON, json.dumps(body).encode())


def _plain(exchange: Exchange, status: int, sentence: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    exchange.send(status, [(b"content-type", b"text/plain; charset=utf-8"), *headers], sentence.encode())


def refusal(error: BadHttp) -> bytes:
    """Body of the answer to what is no request."""
    return json.dumps({"error": str(error)}).encode()
