"""`kvplane gateway`: an OpenAI URL in front of the fleet."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from kvplane.services.cli.common import (
    COMMON,
    Common,
    Http,
    ServedPolicyModules,
    allow_modules,
    run_until_signal,
    start,
)  # fmt: skip
from kvplane.services.gateway.service import Gateway
from kvplane.services.http.server import bound
from kvplane.services.observability.web import check_address, observing
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    import socket

LISTEN = "127.0.0.1:8080"


def gateway(
    *,
    listen: Annotated[str, Parameter(env_var="KVPLANE_LISTEN")] = LISTEN,
    access_log: Annotated[bool, Parameter(env_var="KVPLANE_ACCESS_LOG", negative="")] = False,
    http: Http = None,
    policy_module: ServedPolicyModules = (),
    common: Common = COMMON,
) -> None:
    """Serve OpenAI's and Anthropic's APIs in front of the fleet's engines: route, forward, record.

    Parameters
    ----------
    listen
        HOST:PORT for clients; an empty host is every address.
    access_log
        Write a line of JSON a request to standard output.
    http
        HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none.
    policy_module
        Module that policies may be taken from, as `module:attr`; may be repeated.
    """
    start(common)
    check_address(http)
    host, port = listening(listen)
    allow_modules(policy_module)
    run_until_signal(_gateway, bound(host, port), access_log, http, common)


def listening(address: str, option: str = "--listen") -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises `BadRequest`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BadRequest(f"{option} is {address[:80]!r}; it must be HOST:PORT, such as {LISTEN}")
    return host.strip("[]"), int(port)


async def _gateway(where: socket.socket, access_log: bool, http: str | None, common: Common) -> None:  # noqa: FBT001
    async with common.connected("kvplane-gateway") as client:
        service = Gateway(client, common.fleet, where)
        if access_log:
            service.access.stream = sys.stdout
        async with observing(http, service):
            await service.run()
