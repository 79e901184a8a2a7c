"""The NATS client with what a control plane needs beside.

It survives bad headers, can't be answered by guessing, never falls back to plain text, and learns what it may not publish.
"""

from __future__ import annotations

import re
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

import structlog
from nats.aio.client import Client
from nats.nuid import NUID

from events.errors import LoginRefused, NotAllowed, UntrustedServer

if TYPE_CHECKING:
    from asyncio import Future

_FORBIDDEN = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)
_TOKEN = 26
"""Characters of a request's own token: that of `_Random` and four that the client adds."""

_log = structlog.get_logger("kvplane.nats")


class _Random(NUID):
    """Reply subjects hold 128 random bits: one that was seen says nothing about the next."""

    def next(self) -> bytearray:
        return bytearray(token_urlsafe(16).encode())


class LogClient(Client):
    """A client of the fleet's servers, made by `events.log.connection`."""

    def __init__(self, *, encrypted: bool) -> None:
        super().__init__()
        self._nuid = _Random()
        self._encrypted = encrypted
        self._asked: dict[str, list[Future[Any]]] = {}
        self.refused = ""
        """Why the server wants this client no more; empty as long as it does."""

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, Any] | None = None
    ) -> None:
        """Publish; the server's refusal of a request reaches the one who asked."""
        prefix = self._resp_sub_prefix
        if reply and prefix and reply.startswith(prefix.decode()):
            future = self._resp_map.get(reply[-_TOKEN:])
            if future is not None:
                self._asked.setdefault(subject, []).append(future)
                future.add_done_callback(lambda done: self._answered(subject, done))
        await super().publish(subject, payload, reply, headers)

    def _answered(self, subject: str, done: Future[Any]) -> None:
        waiting = self._asked.get(subject, [])
        if done in waiting:
            waiting.remove(done)
        if not waiting:
            self._asked.pop(subject, None)

    async def _process_err(self, err_msg: str) -> None:
        found = _FORBIDDEN.search(err_msg)
        if found and found[1].lower() == "publish":
            for future in self._asked.pop(found[2], []):
                if not future.done():
                    future.set_exception(
                        NotAllowed(f"these credentials may not publish to {found[2]}; use those of another role")
                    )
        await super()._process_err(err_msg)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Malformed headers are none: the client's read loop would end on them, and `is_connected` stay true."""
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's bytes cause
            _log.warning("malformed_headers", client=self.options.get("name"), error=repr(error))
            return None
        return parsed

    def _connect_command(self) -> bytes:
        if self._encrypted and not self._server_info.get("tls_required"):
            # Who can change what is on the wire can take the offer of TLS away.
            raise UntrustedServer(
                f"the server at {self._where()} offers no TLS, though --ca was given; include the auth folder's client.conf "
                "in its configuration"
            )
        command: bytes = super()._connect_command()
        return command

    def _where(self) -> str:
        return self._current_server.uri.netloc if self._current_server else "?"


def check_open(client: Client) -> None:
    """Raise `LoginRefused` when the client was shut out for good: its credentials were taken back."""
    if isinstance(client, LogClient) and client.is_closed and client.refused:
        raise LoginRefused(client.refused)
