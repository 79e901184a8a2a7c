"""Connecting to NATS the way a control plane must: never give up, never buffer blindly, never fail in silence.

Only what can never work is given up: a login that is refused, TLS that can't be trusted, something that is no NATS server.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import structlog
from nats.errors import AuthorizationError, SlowConsumerError, StaleConnectionError, UnexpectedEOF
from nats.errors import Error as NatsError

from kvplane.events.errors import KvplaneError, LoginRefused, UntrustedServer, WrongServer
from kvplane.events.log.client import LogClient, Unacceptable
from kvplane.events.log.credentials import read_seed, trust
from kvplane.events.log.servers import lost, move
from kvplane.events.log.waiting import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.events.log.credentials import Seed

DEFAULT_URL = "nats://127.0.0.1:4222"
CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 3.0
PONG_SECONDS = 1
PING_SECONDS = 2
"""A server that answered none of two pings is left: a stopped one is noticed after three times this."""
REFUSED_SECONDS = 30.0
"""So long a client that was connected before knocks at servers that refuse it: they may be reading a new configuration."""

_log = structlog.get_logger("kvplane.nats")


def errors_of(client: Client) -> Counter[str]:
    """How often a client was told of a `slow_consumer`, a `permission` that it lacks, or an `other` error."""
    return client.errors if isinstance(client, LogClient) else Counter()


def _kind(error: Exception) -> str:
    if isinstance(error, SlowConsumerError):
        return "slow_consumer"
    return "permission" if "permissions violation" in str(error).lower() else "other"


def _refusal(error: Exception, seed: Seed | None) -> KvplaneError | None:
    """What the server's no means, if the error is one."""
    if isinstance(error, Unacceptable):
        return error.reason
    if isinstance(error, KvplaneError):
        return error
    other_port = re.search(r"attempted to connect to ([a-z ]+) port", str(error).lower())
    if other_port:
        return WrongServer(
            f"a NATS server answers, but at its {other_port[1]} port, which is not for clients; name the port for clients with "
            "--server or KVPLANE_SERVER, 4222 if nothing else was configured"
        )
    if isinstance(error, AuthorizationError) or "authorization violation" in str(error).lower():
        if seed is None:
            return LoginRefused(
                "the server asks for credentials; give a seed file with --credentials or KVPLANE_CREDENTIALS"
            )
        return LoginRefused(
            f"the server does not know the credentials {seed.public}; `kvplane auth list` shows whose they are, and servers "
            "learn of new ones by SIGHUP"
        )
    return _untrusted(error)


def _untrusted(error: Exception) -> UntrustedServer | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message
        if "mismatch" in reason.lower() or "doesn't match" in reason.lower():
            return UntrustedServer(
                f"the server's certificate is for another name ({reason}); use a name that it has, or make it anew with "
                "`kvplane auth init --also NAME --renew`"
            )
        return UntrustedServer(
            f"the server's certificate is not trusted ({reason}); give the fleet's CA with --ca or KVPLANE_CA: ca.pem of the "
            "auth folder"
        )
    if isinstance(error, ssl.SSLError):
        return UntrustedServer(
            f"no TLS with the server ({error.reason or error}); is it configured by `kvplane auth init`?"
        )
    return None


def _new_inbox(seed: Seed | None) -> str:
    # A permission binds whole tokens, so the key is one; the rest is not to be guessed.
    return f"_INBOX_{uuid4().hex[:12]}" if seed is None else f"_INBOX.{seed.public}.{uuid4().hex}"


@asynccontextmanager
async def connected(
    servers: Sequence[str],
    name: str,
    *,
    connect_seconds: float = CONNECT_SECONDS,
    credentials: Path | str | None = None,
    ca: Path | str | None = None,
    refused_seconds: float = REFUSED_SECONDS,
) -> AsyncIterator[Client]:
    """A client of these servers, drained at the end.

    `credentials` is a seed file to log in with, `ca` the certificate that the servers' must be signed by. Once connected it
    reconnects for ever, unless all that servers say for `refused_seconds` is no: then it is closed, and `check_open` raises.
    Publishing while it is disconnected is refused instead of buffered: a commit that was given up must not be stored later.

    It says what it waits for after a second. Raises `LogUnavailable` when no server answers in `connect_seconds`, which may be
    infinite, and at once what can't change by waiting: `LoginRefused`, `UntrustedServer`, `WrongServer`, `ServerTooOld`,
    `BadServer`, `BadCredentials`.
    """
    seed = None if credentials is None else read_seed(credentials)
    client = LogClient(encrypted=ca is not None)
    leaving = connected_once = False
    refusals = 0
    refused_since: float | None = None

    async def on_error(error: Exception) -> None:
        nonlocal refusals, refused_since
        refusal = _refusal(error, seed)
        if refusal is not None and not connected_once:
            refusals += 1
            if refusals >= len(servers):
                raise refusal
        elif refusal is not None:
            _log.error("login_refused", client=name, error=str(refusal))
            refused_since = refused_since or time.monotonic()
            if time.monotonic() - refused_since >= refused_seconds:
                client.refused = str(refusal)
                # Not from within: this is called by what closing ends.
                closing.append(asyncio.ensure_future(client.close()))
            return
        if not connected_once or isinstance(error, OSError | UnexpectedEOF | StaleConnectionError):
            # Every try to connect ends here; `nats_waited_for` or `nats_disconnected` says it.
            _log.debug("nats_retry", client=name, error=str(error))
            return
        # Slow consumers and permission violations are only ever reported here.
        client.errors[_kind(error)] += 1
        _log.error("nats_error", client=name, error=str(error) or type(error).__name__)

    moves: list[asyncio.Task[None]] = []

    async def on_lame_duck() -> None:
        _log.info("nats_server_leaves", client=name)
        moves[:] = [each for each in moves if not each.done()]
        if not moves:
            moves.append(asyncio.create_task(move(client)))

    async def on_disconnected() -> None:
        lost(client)
        if not leaving:
            _log.warning("nats_disconnected", client=name)

    async def on_reconnected() -> None:
        nonlocal refused_since
        refused_since = None
        where = client.connected_url
        _log.info("nats_reconnected", client=name, server=where.netloc if where else "")

    async def on_closed() -> None:
        if leaving or client.refused:
            return
        reason = _refusal(client.last_error, seed) if client.last_error else None
        client.refused = str(reason or f"the server closed the connection for good: {client.last_error}")
        _log.error("nats_closed", client=name, error=client.refused)

    async def dial() -> None:
        await client.connect(
            servers=list(servers),
            name=name,
            inbox_prefix=_new_inbox(seed),
            nkeys_seed_str=None if seed is None else seed.text,
            tls=None if ca is None else trust(ca),
            connect_timeout=2,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,  # type: ignore[arg-type] # it is slept for
            ping_interval=PING_SECONDS,
            max_outstanding_pings=2,
            pending_size=0,
            flush_timeout=5,
            error_cb=on_error,
            disconnected_cb=on_disconnected,
            lame_duck_mode_cb=on_lame_duck,
            reconnected_cb=on_reconnected,
            closed_cb=on_closed,
        )

    closing: list[asyncio.Future[None]] = []
    leaving = True
    await connect(client, servers, name, dial, seconds=connect_seconds)
    leaving = False
    connected_once = True
    try:
        yield client
    finally:
        leaving = True
        for each in moves:
            each.cancel()
        # A client that is left open goes on reconnecting and can't even be cancelled then.
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(LEAVE_SECONDS), suppress(NatsError, OSError, TimeoutError):
                if client.is_connected:
                    # A drain that is cut short complains for ever; who does not answer a ping is not asked for one.
                    await client.flush(timeout=PONG_SECONDS)
                    await client.drain()
            # Its flusher may have ended with its queue full, and then it waits for ever.
            with anyio.move_on_after(LEAVE_SECONDS), suppress(NatsError, OSError, TimeoutError):
                await client.close()
