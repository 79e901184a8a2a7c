"""The NATS client with what a control plane needs beside.

It survives bad headers, can't be answered by guessing, never falls back to plain text, and learns what it may not publish.
"""

from __future__ import annotations

import asyncio
import re
import time
from asyncio import Future
from collections import Counter
from secrets import token_hex, token_urlsafe
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from nats.aio.client import Client, Srv
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionDrainingError
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.nuid import NUID

from kvplane.events.errors import KvplaneError, LoginRefused, NotAllowed, ServerTooOld, UntrustedServer
from kvplane.events.log.inboxes import served_inbox
from kvplane.events.subjects import asked_node

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from nats.aio.msg import Msg

T = TypeVar("T")

_FORBIDDEN = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)
CLOSE_SECONDS = 0.5
READ_BYTES = 1 << 18
"""Most bytes of a read: 64 requests of 256 hashes are 150 KB."""
LEAST_SERVER = (2, 10)
"""Oldest version of a server that has all that is used: consumers with a list of filters, and `sync_interval: always`."""
_VERSION = re.compile(r"v?(\d+)\.(\d+)")
_TOKEN = 26
"""Characters of a request's own token: that of `_Random` and four that the client adds."""

_log = structlog.get_logger("kvplane.nats")


class Unacceptable(NatsError):
    """A server that greeted and is not to be used; `reason` says why. Upon errors of its own kind the client tries the next."""

    def __init__(self, reason: KvplaneError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Random(NUID):
    """Reply subjects hold 128 random bits: one that was seen says nothing about the next."""

    def next(self) -> bytearray:
        return bytearray(token_urlsafe(16).encode())


def _said(write: Callable[[T], object], payload: T) -> object:
    """Write to a connection; one that has gone this moment is no other error than one that went a moment before."""
    try:
        return write(payload)
    except RuntimeError as error:
        raise ConnectionResetError(str(error)) from None


class _Transport(TcpTransport):
    """A connection that reads what is there at once, and that can be closed when its TLS handshake has failed.

    asyncio never says that such a one is closed.
    """

    async def read(self, buffer_size: int) -> bytes:
        data: bytes = await super().read(max(buffer_size, READ_BYTES))
        return data

    def write(self, payload: bytes) -> Any:  # noqa: ANN401 - as the client has it
        return _said(super().write, payload)

    def writelines(self, payload: list[bytes]) -> Any:  # noqa: ANN401 - as the client has it
        return _said(super().writelines, payload)

    async def wait_closed(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await super().wait_closed()  # type: ignore[no-untyped-call]
        except TimeoutError:
            if self._io_writer is not None:
                self._io_writer.transport.abort()


class LogClient(Client):
    """A client of the fleet's servers, made by `events.log.connection`."""

    def __init__(self, *, encrypted: bool, key: str = "") -> None:
        super().__init__()
        self._nuid = _Random()
        self.key = key
        """Public key that it logs in with; empty without credentials."""
        self._served = ""
        """Where nodes answer it, without their names; empty until the first is asked."""
        self._serving: dict[str, asyncio.Future[Any]] = {}
        self._encrypted = encrypted
        self._asked: dict[str, list[asyncio.Future[Any]]] = {}
        self.errors: Counter[str] = Counter()
        """Errors that the server sent unasked, by kind; counted by `events.log.connection`."""
        self.refused = ""
        """Why the server wants this client no more; empty as long as it does."""
        self.again: Callable[[str], AbstractAsyncContextManager[Client]] | None = None
        """Makes another connection like this one, under a name."""
        self._starved: MemoryError | None = None

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, Any] | None = None
    ) -> None:
        """Publish; the server's refusal of a request reaches the one who asked."""
        prefix = self._resp_sub_prefix
        if reply and ((prefix and reply.startswith(prefix.decode())) or self._serving):
            future = self._resp_map.get(reply[-_TOKEN:]) or self._serving.get(reply[-_TOKEN:])
            if future is not None:
                self._asked.setdefault(subject, []).append(future)
                future.add_done_callback(lambda done: self._answered(subject, done))
        await super().publish(subject, payload, reply, headers)

    def _answered(self, subject: str, done: asyncio.Future[Any]) -> None:
        waiting = self._asked.get(subject, [])
        if done in waiting:
            waiting.remove(done)
        if not waiting:
            self._asked.pop(subject, None)

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, Any] | None = None  # noqa: ASYNC109
    ) -> Msg:  # fmt: skip
        """A node answers to inboxes with its own name only: it may write to no others."""
        node = asked_node(subject) if self.key else ""
        if not node:
            return await super()._request_new_style(subject, payload, timeout, headers)
        if self.is_draining_pubs:
            raise ConnectionDrainingError
        if not self._served:
            self._served = token_urlsafe(16)
            await self.subscribe(served_inbox("*", self.key, self._served, "*"), cb=self._node_answered)
        token = token_urlsafe(16) + token_hex(2)
        future: asyncio.Future[Msg] = asyncio.Future()
        self._serving[token] = future
        try:
            await self.publish(subject, payload, served_inbox(node, self.key, self._served, token), headers)
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise NatsTimeout from None
        finally:
            del self._serving[token]

    async def _node_answered(self, message: Msg) -> None:
        future = self._serving.get(message.subject[-_TOKEN:])
        if future is not None and not future.done():
            future.set_result(message)

    async def _process_err(self, err_msg: str) -> None:
        found = _FORBIDDEN.search(err_msg)
        refused = False
        if found and found[1].lower() == "publish":
            # The client has made small letters of all.
            for subject in [subject for subject in self._asked if subject.lower() == found[2]]:
                for future in self._asked.pop(subject):
                    if not future.done():
                        sentence = f"these credentials may not ask {subject}; use those of another role"
                        future.set_exception(NotAllowed(sentence))
                        refused = True
        if not refused:
            await super()._process_err(err_msg)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Malformed headers are none: the client's read loop would end on them, and `is_connected` stay true.

        For want of memory it shall end, and is made anew: a commit without its headers is judged otherwise than elsewhere.
        """
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a stranger's bytes cause
            _log.warning("malformed_headers", client=self.options.get("name"), error=repr(error))
            parsed = None
        starved, self._starved = self._starved, None
        if starved is not None:
            raise starved
        return parsed

    def _parse_header_lines(self, raw: bytes) -> dict[str, str]:  # type: ignore[override] # it is called on the client
        try:
            parsed: dict[str, str] = super()._parse_header_lines(raw)
        except MemoryError as error:
            # The client takes it for one of the bytes'.
            self._starved = error
            raise
        return parsed

    async def _connect_to_server(self, s: Srv) -> None:
        s.last_attempt = time.monotonic()
        if self._transport is None:
            self._transport = _Transport()  # type: ignore[no-untyped-call]
        await self._transport.connect(s.uri, buffer_size=READ_BYTES, connect_timeout=self.options["connect_timeout"])

    async def _send_ping(self, future: Future[Any] | None = None) -> None:
        """A ping goes behind what was written before it: the client would send it ahead, and `flush` end too early."""
        if self._pending and self._transport is not None and self.is_connected:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        """The answer to a ping that was given up is nobody's: the client's read loop would end on it."""
        if self._pongs and self._pongs[0].done():
            # Each answers one ping, in order.
            self._pongs[0] = Future()
        await super()._process_pong()

    def _connect_command(self) -> bytes:
        if self._encrypted and not self._server_info.get("tls_required"):
            # Who can change what is on the wire can take the offer of TLS away.
            raise Unacceptable(
                UntrustedServer(
                    f"the server at {self._where()} offers no TLS, though --ca was given; include the auth folder's "
                    "client.conf in its configuration"
                )
            )
        text = str(self._server_info.get("version", ""))
        version = _VERSION.match(text)
        # A version that can't be read is that of a build of somebody's own.
        if version and (int(version[1]), int(version[2])) < LEAST_SERVER:
            least = ".".join(map(str, LEAST_SERVER))
            raise Unacceptable(
                ServerTooOld(
                    f"the server at {self._where()} is NATS {text[:40]}; kvplane needs {least} or newer: upgrade it, or "
                    "start one with `kvplane up`"
                )
            )
        command: bytes = super()._connect_command()
        return command

    def _where(self) -> str:
        # Without the login that a URL may hold.
        return self._current_server.uri.netloc.rpartition("@")[2] if self._current_server else "?"


def check_open(client: Client) -> None:
    """Raise `LoginRefused` when the client was shut out for good: its credentials were taken back."""
    if isinstance(client, LogClient) and client.is_closed and client.refused:
        raise LoginRefused(client.refused)
