"""Options of what serves strangers: keys and TLS of a gateway."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import structlog
from cyclopts import Parameter

from kvplane.events.errors import BadCredentials
from kvplane.services.gateway.guard import Guarded, check
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_log = structlog.get_logger("kvplane.gateway")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Guarding:
    """What clients of a gateway must have, and what it shows to engines."""

    keys: Annotated[Path | None, Parameter(env_var="KVPLANE_KEYS")] = None
    """File of `kvplane key`: clients must send one of its keys, and are held to its limits. SIGHUP reads it again. Default is
    that no key is asked for."""
    tls_cert: Annotated[Path | None, Parameter(env_var="KVPLANE_TLS_CERT")] = None
    """Certificate (PEM) by which clients are served over TLS. SIGHUP reads it again."""
    tls_key: Annotated[Path | None, Parameter(env_var="KVPLANE_TLS_KEY")] = None
    """Its private key (PEM); default is that the file of the certificate has it."""
    engine_key: Annotated[str, Parameter(env_var="KVPLANE_ENGINE_KEY")] = ""
    """Key that engines ask for, instead of what the client sent: @FILE with it. Others on this machine can read options, so the
    key itself belongs in the environment."""
    engine_ca: Annotated[Path | None, Parameter(env_var="KVPLANE_ENGINE_CA")] = None
    """Certificates (PEM) that those of engines at https addresses must be signed by; default is the system's."""

    def guarded(self) -> Guarded:
        """What the gateway is started with. Raises `BadCredentials` and `BadRequest`."""
        key = self.engine_key
        if key.startswith("@"):
            try:
                key = Path(key[1:]).read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is no text"
                raise BadCredentials(
                    f"--engine-key {key[:200]} can't be read ({why}); give a file with the key alone"
                ) from None
        if not (key.isascii() and (key.isprintable())) or (self.engine_key and not key):
            raise BadRequest(
                "--engine-key is empty, or holds a character that no HTTP header takes; is there a line end in it?"
            )
        given = Guarded(
            keys=self.keys, engine_key=key, engine_ca=self.engine_ca, tls_cert=self.tls_cert, tls_key=self.tls_key
        )
        check(given)
        return given

    @property
    def reloads(self) -> bool:
        """Whether there is anything to read again on SIGHUP."""
        return self.keys is not None or self.tls_cert is not None


GUARDING = Guarding()


def warn_of_strangers(where: socket.socket, guarding: Guarding) -> None:
    """Say that whoever reaches the gateway may use it, where others than this machine can."""
    host = where.getsockname()[0]
    if guarding.keys is None and not ip_address(host).is_loopback:
        _log.warning(
            "no_keys", address=host, hint="whoever reaches this address may use every model: make keys with `kvplane key "
            "add` and give --keys, or let nobody reach it but what asks for credentials itself",
        )  # fmt: skip
    elif guarding.keys is not None and guarding.tls_cert is None and not ip_address(host).is_loopback:
        _log.warning("keys_in_clear", address=host, hint="keys travel readable: give --tls-cert, or have TLS in front")


async def on_hangup(call: Callable[[], object]) -> None:
    """Call at each SIGHUP, until cancelled."""
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _ in signals:
            call()
