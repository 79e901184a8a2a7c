"""Connecting to NATS the way a control plane must: never give up, never buffer blindly, never fail in silence."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import nats
import structlog
from nats.errors import Error as NatsError
from nats.errors import StaleConnectionError, UnexpectedEOF

from events.errors import LogUnavailable
from events.log.servers import lost, move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nats.aio.client import Client

DEFAULT_URL = "nats://127.0.0.1:4222"
CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 3.0
PONG_SECONDS = 1
PING_SECONDS = 2.0
"""A server that answered none of two pings is left: a stopped one is noticed after three times this."""
_log = structlog.get_logger("kvplane.nats")


def _survive_headers(client: Client, name: str) -> None:
    """Make malformed headers harmless: the client's read loop would end on them, and `is_connected` stay true."""
    parse = client._process_headers  # noqa: SLF001 - there is no other way in

    async def process(headers: bytes) -> dict[str, str] | None:
        try:
            parsed: dict[str, str] | None = await parse(headers)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's bytes cause
            _log.warning("malformed_headers", client=name, error=repr(error))
            return None
        return parsed

    client._process_headers = process  # type: ignore[method-assign]  # noqa: SLF001


def _survive_late_pongs(client: Client) -> None:
    """Make the answer to a flush that was given up harmless: the client's read loop would end on it."""
    process = client._process_pong  # noqa: SLF001 - there is no other way in

    async def process_pong() -> None:
        waiting = client._pongs  # noqa: SLF001 - the same
        if waiting and waiting[0].done():
            # It belongs to nobody, but each answers one ping, in turn.
            waiting[0] = asyncio.Future()
        await process()

    client._process_pong = process_pong  # type: ignore[method-assign]  # noqa: SLF001


@asynccontextmanager
async def connected(
    servers: Sequence[str], name: str, *, connect_seconds: float = CONNECT_SECONDS
) -> AsyncIterator[Client]:
    """A client of these servers, drained at the end.

    Once connected it reconnects for ever. Publishing while it is disconnected is refused instead of buffered: a commit
    that was given up must not be stored later. Raises `LogUnavailable` when no server answers in `connect_seconds`.
    """

    async def on_error(error: Exception) -> None:
        if isinstance(error, OSError | UnexpectedEOF | StaleConnectionError):
            # Every try to reconnect ends here; `nats_disconnected` has said it already.
            _log.debug("nats_retry", client=name, error=str(error))
            return
        # Slow consumers and permission violations are only ever reported here.
        _log.error("nats_error", client=name, error=str(error) or type(error).__name__)

    leaving = False
    moves: list[asyncio.Task[None]] = []

    async def on_lame_duck() -> None:
        _log.info("nats_server_leaves", client=name)
        moves[:] = [each for each in moves if not each.done()]
        if not moves:
            moves.append(asyncio.create_task(move(client)))

    async def on_disconnected() -> None:
        lost(client)
        if not leaving:
            _log.warning("nats_disconnected", client=name)

    async def on_reconnected() -> None:
        where = client.connected_url
        _log.info("nats_reconnected", client=name, server=where.netloc if where else "")

    try:
        client = await nats.connect(
            servers=list(servers),
            name=name,
            inbox_prefix=f"_INBOX_{uuid4().hex[:12]}",
            connect_timeout=2,
            allow_reconnect=True,
            max_reconnect_attempts=max(3, int(connect_seconds / 0.1)),
            reconnect_time_wait=0.1,
            ping_interval=PING_SECONDS,
            max_outstanding_pings=2,
            pending_size=0,
            flush_timeout=5,
            error_cb=on_error,
            disconnected_cb=on_disconnected,
            lame_duck_mode_cb=on_lame_duck,
            reconnected_cb=on_reconnected,
        )
    except (NatsError, OSError) as error:
        where = ", ".join(servers)
        raise LogUnavailable(
            f"no NATS server answers at {where}; start one with `kvplane up`, or name yours with --server or "
            f"KVPLANE_SERVER ({type(error).__name__})"
        ) from None
    client.options["max_reconnect_attempts"] = -1
    _survive_headers(client, name)
    _survive_late_pongs(client)
    try:
        yield client
    finally:
        leaving = True
        for each in moves:
            each.cancel()
        # A client that is left open goes on reconnecting and can't even be cancelled then.
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(LEAVE_SECONDS), suppress(NatsError, OSError, TimeoutError):
                if client.is_connected:
                    # A drain that is cut short complains for ever; who does not answer a ping is not asked for one.
                    await client.flush(timeout=PONG_SECONDS)
                    await client.drain()
            with suppress(NatsError, OSError, TimeoutError):
                await client.close()
