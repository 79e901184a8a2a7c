"""NATS without a client library: thousands of forbidden things are tried in a second, and each refusal is read."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import nkeys
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSStream

from kvplane.events.log.credentials import trust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from kvplane.events.log.credentials import Seed

LONGEST_LINE = 1 << 20
ANSWER_SECONDS = 60.0


class Raw:
    """One connection that is logged in."""

    def __init__(self, stream: TLSStream) -> None:
        self._stream = stream
        self._received = BufferedByteReceiveStream(stream)
        self.messages: list[tuple[str, bytes]] = []
        """What was delivered: subject and body."""

    async def refusals(self, commands: Iterable[bytes]) -> list[str]:
        """Send commands of the protocol; all that the server said against them."""
        await self._stream.send(b"".join(commands) + b"PING\r\n")
        found = []
        with anyio.fail_after(ANSWER_SECONDS):
            while (line := (await self._line()).decode(errors="replace")) != "PONG":
                words = line.split(" ")
                if words[0] == "PING":
                    await self._stream.send(b"PONG\r\n")
                elif words[0] == "-ERR":
                    found.append(line)
                elif words[0] in {"MSG", "HMSG"}:
                    headers = int(words[-2]) if words[0] == "HMSG" else 0
                    body = await self._received.receive_exactly(int(words[-1]) + 2)
                    self.messages.append((words[1], body[headers:-2]))
        return found

    async def login(self, seed: Seed, nonce: str) -> None:
        """Say who this is."""
        signed = nkeys.from_seed(bytearray(seed.text.encode())).sign(nonce.encode())
        said = {
            "verbose": False, "pedantic": False, "tls_required": True, "protocol": 1, "headers": True, "nkey": seed.public,
            "no_responders": True, "sig": urlsafe_b64encode(signed).rstrip(b"=").decode(), "lang": "raw", "version": "0",
        }  # fmt: skip
        await self._stream.send(f"CONNECT {json.dumps(said)}\r\n".encode())

    async def _line(self) -> bytes:
        return await self._received.receive_until(b"\r\n", LONGEST_LINE)


@asynccontextmanager
async def raw(url: str, seed: Seed, ca: Path) -> AsyncIterator[Raw]:
    """A connection to a server that asks for credentials."""
    host, _, port = url.removeprefix("nats://").rpartition(":")
    async with await anyio.connect_tcp(host, int(port)) as plain:
        info = json.loads((await plain.receive()).partition(b" ")[2])
        stream = await TLSStream.wrap(plain, hostname=host, ssl_context=trust(ca), standard_compatible=False)
        connection = Raw(stream)
        await connection.login(seed, info["nonce"])
        yield connection


def published(subject: str, body: bytes = b"", reply: str = "") -> bytes:
    """A command that publishes."""
    return f"PUB {subject} {reply + ' ' if reply else ''}{len(body)}\r\n".encode() + body + b"\r\n"
