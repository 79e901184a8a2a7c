"""Why an HTTP address did not answer as it should: from the error if it says enough, else from a look at what is there."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import anyio

from kvplane.events.log.probe import Answer, answers, why_not

LOOK_SECONDS = 3.0


class Unanswered(NamedTuple):
    """`reason` is a sentence without a full stop; `final` is whether waiting is of no use."""

    reason: str
    final: bool = False


async def why(url: str, error: BaseException, *, seconds: float = LOOK_SECONDS) -> Unanswered:
    """Why a request to a URL failed with this error. A look takes `seconds` at the most."""
    parts = urlsplit(url)
    encrypted = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if encrypted else 80)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Unanswered(f"the certificate of {host}:{port} is not trusted ({error.certificate_error})", final=True)
    found = why_not(host, port, error)
    if found is None:
        with anyio.move_on_after(seconds):
            found = await answers(host, port)
    if found is None:
        return Unanswered(f"{host}:{port} does not answer ({type(error).__name__})")
    return _judged(found, error, encrypted=encrypted)


def _judged(found: Answer, error: BaseException, *, encrypted: bool) -> Unanswered:
    match found.kind:
        case "nats":
            return Unanswered(f"{found.sentence}, which speaks no HTTP", final=True)
        case "tls":
            if encrypted:
                return Unanswered(f"{found.sentence}, and the connection broke off ({error})")
            return Unanswered(f"{found.sentence}; write https://", final=True)
        case "http":
            if encrypted:
                return Unanswered(f"{found.sentence} without TLS; write http://", final=True)
            return Unanswered(f"{found.sentence}, but not as it must ({type(error).__name__})")
        case "other":
            return Unanswered(f"{found.sentence}, which is no HTTP", final=True)
        case _:
            return Unanswered(found.sentence)
