"""Connecting to NATS the way a control plane must: never give up, never buffer blindly, never fail in silence.

Only what can never work is given up: a login that is refused, TLS that can't be trusted, something that is no NATS server.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
import structlog
from nats.errors import AuthorizationError, SlowConsumerError, StaleConnectionError, UnexpectedEOF
from nats.errors import Error as NatsError

from kvplane.events.errors import KvplaneError, LoginRefused, UntrustedServer, WrongServer
from kvplane.events.log.client import LogClient, Unacceptable
from kvplane.events.log.credentials import read_seed, trust
from kvplane.events.log.inboxes import answers_inbox
from kvplane.events.log.servers import lost, move
from kvplane.events.log.waiting import connect, place_of

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


class _Connection:
    """One client, and what becomes of its connection: the client calls the methods that begin with `on_`."""

    def __init__(
        self, servers: Sequence[str], name: str, seed: Seed | None, ca: Path | str | None, refused_seconds: float
    ) -> None:  # fmt: skip
        self.client = LogClient(encrypted=ca is not None, key="" if seed is None else seed.public)
        self._servers, self._name = list(servers), name
        self._seed, self._ca = seed, ca
        self._refused_seconds = refused_seconds
        self._established = False
        """It was connected once; before that nothing is wrong yet."""
        self._leaving = False
        self._refusals = 0
        """How many servers said no to the first connection."""
        self._refused_since: float | None = None
        self._closing: asyncio.Future[None] | None = None
        self._move: asyncio.Task[None] | None = None

    async def open(self, seconds: float) -> None:
        """Connect for the first time. Raises as `connected` does."""
        await connect(self.client, self._servers, self._name, self._dial, seconds=seconds)
        self._established = True

    async def _dial(self) -> None:
        await self.client.connect(
            servers=self._servers,
            name=self._name,
            inbox_prefix=answers_inbox(self.client.key),
            nkeys_seed_str=None if self._seed is None else self._seed.text,
            tls=None if self._ca is None else trust(self._ca),
            connect_timeout=2,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,  # type: ignore[arg-type] # it is slept for
            ping_interval=PING_SECONDS,
            max_outstanding_pings=2,
            pending_size=0,
            flush_timeout=5,
            error_cb=self.on_error,
            disconnected_cb=self.on_disconnected,
            lame_duck_mode_cb=self.on_lame_duck,
            reconnected_cb=self.on_reconnected,
            closed_cb=self.on_closed,
        )

    async def close(self) -> None:
        """Drain and close. Raises nothing."""
        self._leaving = True
        if self._move is not None:
            self._move.cancel()
        # A client that is left open goes on reconnecting and can't even be cancelled then.
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(LEAVE_SECONDS), suppress(NatsError, OSError, TimeoutError):
                if self.client.is_connected:
                    # A drain that is cut short complains for ever; who does not answer a ping is not asked for one.
                    await self.client.flush(timeout=PONG_SECONDS)
                    await self.client.drain()
            # Its flusher may have ended with its queue full, and then it waits for ever.
            with anyio.move_on_after(LEAVE_SECONDS), suppress(NatsError, OSError, TimeoutError):
                await self.client.close()

    @property
    def _watched(self) -> bool:
        """Whether what becomes of the connection is anybody's concern: not before there is one, nor at the end."""
        return self._established and not self._leaving

    async def on_error(self, error: Exception) -> None:
        """Each failed try to connect, and what a server says aside."""
        refusal = _refusal(error, self._seed)
        if refusal is not None:
            self._refused(refusal)
        elif not self._established or isinstance(error, OSError | UnexpectedEOF | StaleConnectionError):
            # Every try to connect ends here; `nats_waited_for` or `nats_disconnected` says it.
            _log.debug("nats_retry", client=self._name, error=str(error))
        else:
            # Slow consumers and permission violations are only ever reported here.
            self.client.errors[_kind(error)] += 1
            _log.error("nats_error", client=self._name, error=str(error) or type(error).__name__)

    def _refused(self, refusal: KvplaneError) -> None:
        """A server says no. Raises that before the first connection, once all have."""
        if not self._established:
            self._refusals += 1
            if self._refusals >= len(self._servers):
                raise refusal
            _log.debug("nats_retry", client=self._name, error=str(refusal))
            return
        _log.error("login_refused", client=self._name, error=str(refusal))
        self._refused_since = self._refused_since or time.monotonic()
        if time.monotonic() - self._refused_since >= self._refused_seconds and self._closing is None:
            self.client.refused = str(refusal)
            # Not from within: this is called by what closing ends.
            self._closing = asyncio.ensure_future(self.client.close())

    async def on_lame_duck(self) -> None:
        """The server is about to stop."""
        _log.info("nats_server_leaves", client=self._name)
        if self._move is None or self._move.done():
            self._move = asyncio.create_task(move(self.client))

    async def on_disconnected(self) -> None:
        """The connection is gone."""
        lost(self.client)
        if self._watched:
            _log.warning("nats_disconnected", client=self._name)

    async def on_reconnected(self) -> None:
        """There is one again."""
        self._refused_since = None
        where = self.client.connected_url
        _log.info("nats_reconnected", client=self._name, server=str(place_of(where.geturl())) if where else "")

    async def on_closed(self) -> None:
        """The client gave up, or was closed."""
        if not self._watched or self.client.refused:
            return
        reason = _refusal(self.client.last_error, self._seed) if self.client.last_error else None
        self.client.refused = str(reason or f"the server closed the connection for good: {self.client.last_error}")
        _log.error("nats_closed", client=self._name, error=self.client.refused)


@asynccontextmanager
async def beside(client: Client, name: str) -> AsyncIterator[Client]:
    """Another connection like that of `client`: a flood on one does not hold up what comes on the other.

    A client that was not made by `connected` is given itself. Raises as `connected` does.
    """
    again = client.again if isinstance(client, LogClient) else None
    if again is None:
        yield client
        return
    async with again(f"{client.options['name']} {name}") as other:
        yield other


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
    connection = _Connection(servers, name, seed, ca, refused_seconds)
    connection.client.again = partial(
        connected, servers, connect_seconds=math.inf, credentials=credentials, ca=ca, refused_seconds=refused_seconds
    )
    await connection.open(connect_seconds)
    try:
        yield connection.client
    finally:
        await connection.close()
