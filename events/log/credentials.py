"""What a process shows a server, and what it wants to see of it: a seed file (nkey) and the fleet's own CA."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import nkeys
import structlog

from kvplane.events.errors import BadCredentials

_log = structlog.get_logger("kvplane.nats")
_OTHERS = 0o077


class Seed(NamedTuple):
    """A user's nkey: the seed signs, the public key is the name that the server knows."""

    text: str
    public: str


def public_key(seed: str) -> str:
    """Public key of a user's seed. Raises `BadCredentials`."""
    try:
        pair = nkeys.from_seed(bytearray(seed.encode()))
        public: str = pair.public_key.decode()
    # The library decodes before it checks.
    except (nkeys.NkeysError, ValueError, IndexError, TypeError):
        raise BadCredentials("it holds no nkey seed; a seed is one line that begins with SU") from None
    if not public.startswith("U"):
        raise BadCredentials("it holds a seed that is none of a user; a user's begins with SU")
    return public


def read_seed(path: Path | str) -> Seed:
    """The seed in a file; others should not be able to read it, and are warned of. Raises `BadCredentials`."""
    path = Path(path)
    try:
        text = path.read_text().strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadCredentials(f"credentials {path} can't be read ({reason}); `kvplane auth add` makes a seed") from None
    if mode & _OTHERS:
        _log.warning("credentials_readable_by_others", file=str(path), do=f"chmod 600 {path}")
    try:
        return Seed(text, public_key(text))
    except BadCredentials as error:
        raise BadCredentials(f"credentials {path} can't be used: {error}") from None


def trust(ca: Path | str) -> ssl.SSLContext:
    """A context that trusts this CA and no other. Raises `BadCredentials`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or "it holds no certificate"
        raise BadCredentials(f"CA certificate {ca} can't be read ({reason}); it is ca.pem of the auth folder") from None
    return context
