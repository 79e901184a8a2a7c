"""What stands between strangers and the fleet: keys of clients and of engines, and TLS towards both.

Without any of it a gateway asks for nothing, and clients' credentials go to the engines. With keys, or with a key for engines,
no credentials of clients' go there.
"""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING

import anyio
import structlog
from msgspec import Struct
from nats.errors import Error as NatsError

from kvplane.events.errors import BadCredentials
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.rpc.client import of_fleet
from kvplane.services.tenancy.doors import Doors
from kvplane.services.tenancy.keys import read_keys

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.events.codec import Commit
    from kvplane.services.http.reader import Headers
    from kvplane.services.tenancy.keys import Key

SWEEP_SECONDS = 10.0
ALIVE_SECONDS = 2.0
"""How long gateways have to say that they live, of which the log has heard nothing for a while; they are asked twice."""

_log = structlog.get_logger("kvplane.gateway")


class Guarded(Struct, frozen=True, kw_only=True):
    """What a gateway is started with."""

    keys: Path | None = None
    engine_key: str = ""
    engine_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Guard:
    """All of it for one gateway. Raises `BadCredentials` for files that can't be used."""

    def __init__(self, given: Guarded, client: Client, fleet: str, writer: str) -> None:
        self._given = given
        self._client, self._fleet, self._writer = client, fleet, writer
        self.doors = None if given.keys is None else Doors(read_keys(given.keys), writer)
        self.tls = _served(given)
        self.engine_tls = _trusting(given.engine_ca)
        self._line = b"authorization: Bearer %b\r\n" % given.engine_key.encode() if given.engine_key else b""
        self._asked = anyio.Event()

    @property
    def credentials(self) -> bytes | None:
        """Lines that go to engines instead of the client's credentials; none when those go."""
        return self._line if self._line or self.doors is not None else None

    def for_prompts(self, headers: Headers) -> bytes:
        """Lines with which an engine is asked for a prompt's tokens."""
        if self.credentials is not None:
            return self._line
        return b"".join([b"%b: %b\r\n" % pair for pair in headers if pair[0] == b"authorization"])

    def observe(self, commit: Commit, time: int) -> None:
        """What the log says of other gateways' requests; `time` is when it was stored, in unix nanoseconds."""
        if self.doors is not None:
            self.doors.used.observe(commit, time)

    def look_for(self, key: Key) -> None:
        """A key has as many requests running as it may: look soon whether gateways that have some of them still live."""
        doors, now = self.doors, time.time()
        if doors is not None and doors.used.of(key.name, now).elsewhere and doors.used.silent_writers(now):
            self._asked.set()

    def reload(self) -> None:
        """Read the files again. Those that can't be used leave all as it was, and that is said."""
        given = self._given
        try:
            keys = None if given.keys is None else read_keys(given.keys)
            if self.tls is not None:
                # Into another one first: what fails half-way must not be served.
                _served(given)
                self.tls.load_cert_chain(given.tls_cert or "", given.tls_key)
        except BadCredentials as error:
            _log.error("keys_not_reloaded", error=str(error), instead="those that were read before stay in force")
            return
        if self.doors is not None and keys is not None:
            self.doors.keys = keys
        _log.info("keys_reloaded", keys=None if keys is None else len(keys.all), certificate=self.tls is not None)

    async def run(self) -> None:
        """Forget what is over, and gateways that are gone, until cancelled."""
        doors = self.doors
        while doors is not None:
            with anyio.move_on_after(SWEEP_SECONDS):
                await self._asked.wait()
            if self._asked.is_set():
                self._asked = anyio.Event()
                await self._forget_the_dead(doors)
            doors.used.sweep(time.time())

    async def _forget_the_dead(self, doors: Doors) -> None:
        """Requests of a gateway that was killed never end: they run no longer when it does not answer."""
        suspects = doors.used.silent_writers(time.time())
        for _ in range(2):
            try:
                found = await of_fleet(self._client, "kvplane-router", self._fleet, seconds=ALIVE_SECONDS)
            except (NatsError, OSError) as error:
                _log.warning("gateways_not_asked", error=str(error))
                return
            alive = {metadata.get("writer", "") for metadata in found}
            if self._writer not in alive:
                # Who does not hear itself hears nobody.
                return
            suspects -= alive
            if not suspects:
                return
        for writer in suspects:
            _log.warning("gateway_gone", writer=writer, requests=doors.used.gone(writer))


def check(given: Guarded) -> None:
    """Raise `BadCredentials` or `BadRequest` unless all files can be used."""
    if given.keys is not None:
        read_keys(given.keys)
    _served(given)
    _trusting(given.engine_ca)


def _served(given: Guarded) -> ssl.SSLContext | None:
    """For clients. Raises `BadCredentials`, and `BadRequest` for a key without a certificate."""
    if given.tls_cert is None:
        if given.tls_key is not None:
            raise BadRequest("--tls-key is given without --tls-cert; give the certificate as well")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a key of its own the file holds both. A passphrase is not asked for: nobody may be there.
        context.load_cert_chain(given.tls_cert, given.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:
        names = " and ".join(str(path) for path in (given.tls_cert, given.tls_key) if path is not None)
        raise BadCredentials(
            f"{names} can't be used for TLS ({_reason(error)}); give a certificate and its key as PEM"
        ) from None
    return context


def _trusting(authority: Path | None) -> ssl.SSLContext:
    """For engines. Raises `BadCredentials`."""
    try:
        return ssl.create_default_context(cafile=authority)
    except (OSError, ValueError) as error:
        raise BadCredentials(
            f"{authority} can't be used as --engine-ca ({_reason(error)}); give certificates as PEM"
        ) from None


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
