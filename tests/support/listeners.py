"""Things that answer where something else was meant: HTTP, TLS, silence, a stranger, and an old NATS server."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.streams.tls import TLSListener

from kvplane.services.auth import certificates

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from anyio.abc import ByteStream

INFO = b'INFO {"server_id":"X","version":"%s","proto":1,"max_payload":1048576,"headers":true,"jetstream":true}\r\n'


async def _http(stream: ByteStream) -> None:
    await stream.receive()
    await stream.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


async def _silent(_: ByteStream) -> None:
    await anyio.sleep_forever()


async def _says(greeting: bytes, stream: ByteStream) -> None:
    await stream.send(greeting)
    await anyio.sleep_forever()


def _context(folder: Path) -> ssl.SSLContext:
    ca = certificates.new_ca("test")
    pair = certificates.new_server(ca, "here", ["127.0.0.1"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pem").write_bytes(pair.certificate)
    (folder / "key").write_bytes(pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pem", folder / "key")
    return context


KINDS: dict[str, Callable[[ByteStream], Awaitable[None]]] = {
    "http": _http,
    "https": _http,
    "silent": _silent,
    "ssh": partial(_says, b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nats 2.9.25": partial(_says, INFO % b"2.9.25"),
    "nats 2.10.0": partial(_says, INFO % b"2.10.0"),
}


@asynccontextmanager
async def listening(kind: str, folder: Path) -> AsyncIterator[int]:
    """Answer in this manner at a port of this machine."""
    context = _context(folder) if kind == "https" else None
    listener: Any = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
    if context is not None:
        listener = TLSListener(listener, context, standard_compatible=False)

    async def answer(stream: ByteStream) -> None:
        async with stream:
            try:
                await KINDS[kind](stream)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return

    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, answer)
        yield port
        group.cancel_scope.cancel()
    await listener.aclose()
