"""What answers at an address: a small look, for those who did not get the answer that they expected there."""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from typing import TYPE_CHECKING, Literal, NamedTuple

import anyio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import ByteStream

CONNECT_SECONDS = 1.0
GREETING_SECONDS = 0.4
"""How long a server that speaks first has to begin; NATS does so at once."""
ANSWER_SECONDS = 0.7
"""How long one that speaks when it was spoken to has to answer."""
_SHOWN = 40
_TLS_ALERT = 0x15

Kind = Literal["nats", "http", "tls", "other", "silent", "refused", "unknown", "unreachable"]


class Answer(NamedTuple):
    """What answers at an address, and a sentence about it without a full stop."""

    kind: Kind
    sentence: str

    @property
    def final(self) -> bool:
        """Whether something is there that is not going to be NATS, so that waiting is of no use."""
        return self.kind in {"http", "tls", "other"}


async def answers(host: str, port: int) -> Answer:
    """Look what answers. Takes three seconds at the most, and raises nothing."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        greeting = await _greeting(host, port)
    except (OSError, TimeoutError) as error:
        return _nobody(host, where, error)
    if not greeting or greeting[0] == _TLS_ALERT or b"HTTPS" in greeting[:400]:
        inside = await _inside_tls(host, port)
        if inside is not None:
            nats = inside.startswith(b"INFO ")
            return Answer(
                "tls", f"{'a NATS server' if nats else 'something'} at {where} speaks TLS from the first byte"
            )
    if greeting.startswith(b"INFO "):
        version = re.search(rb'"version": ?"([^"]{1,40})"', greeting)
        return Answer("nats", f"a NATS server{f' {version[1].decode()}' if version else ''} answers at {where}")
    if greeting.startswith(b"HTTP/"):
        return Answer("http", f"an HTTP server answers at {where}")
    if not greeting:
        return Answer("silent", f"{where} takes connections and says nothing")
    if greeting[0] == _TLS_ALERT:
        return Answer("tls", f"something at {where} speaks TLS from the first byte")
    return Answer(
        "other", f"something else answers at {where}: {greeting[:_SHOWN].decode('ascii', 'backslashreplace')!r}"
    )


async def _greeting(host: str, port: int) -> bytes:
    """What is sent at once, or as an answer to HTTP; nothing if nothing is sent. Raises `OSError`, `TimeoutError`."""
    with anyio.fail_after(CONNECT_SECONDS):
        stream = await anyio.connect_tcp(host, port)
    async with stream:
        greeting = await _received(stream, GREETING_SECONDS)
        if greeting:
            return greeting
        try:
            await stream.send(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        except anyio.BrokenResourceError:
            return b""
        return await _received(stream, ANSWER_SECONDS)


async def _inside_tls(host: str, port: int) -> bytes | None:
    """What is sent at once behind a TLS handshake; none when there is none. Nobody is trusted: it is only looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with anyio.fail_after(ANSWER_SECONDS):
            stream = await anyio.connect_tcp(host, port, ssl_context=context, tls_standard_compatible=False)
    except (OSError, TimeoutError, anyio.BrokenResourceError, anyio.EndOfStream):
        return None
    async with stream:
        return await _received(stream, GREETING_SECONDS)


async def _received(stream: ByteStream, seconds: float) -> bytes:
    with anyio.move_on_after(seconds):
        try:
            return await stream.receive(4096)
        except (anyio.EndOfStream, anyio.BrokenResourceError, OSError):
            return b""
    return b""


def _nobody(host: str, where: str, error: Exception) -> Answer:
    return next(
        (known for cause in _causes(error) if (known := _known(host, where, cause)) is not None),
        Answer("unreachable", f"{where} can't be reached ({error})"),
    )


def why_not(host: str, port: int, error: BaseException) -> Answer | None:
    """What an error of connecting shows already, without a look; none when it does not show enough."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    found = (_known(host, where, cause) for cause in _causes(error) if not isinstance(cause, TimeoutError))
    return next((known for known in found if known is not None), None)


def _known(host: str, where: str, error: BaseException) -> Answer | None:
    if isinstance(error, socket.gaierror | UnicodeError):
        return Answer("unknown", f"no address is known for the name {host!r}")
    # Of several addresses of one name, event loops give the errors in a text only.
    if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return Answer("refused", f"nobody listens at {where} (connection refused)")
    if isinstance(error, TimeoutError):
        return Answer("unreachable", f"{where} does not answer a connection in {CONNECT_SECONDS:g} s")
    # Errors of TLS have numbers of their own.
    unreachable = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM}
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno in unreachable:
        return Answer("unreachable", f"{where} can't be reached ({os.strerror(error.errno or 0)})")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it is made of and what it came from."""
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:
                yield from _causes(one)
        yield error
        error = error.__cause__
