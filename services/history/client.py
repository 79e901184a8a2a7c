"""Asking a historian in SQL, for programs and commands."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pyarrow as pa

from kvplane.services.protocol import messages
from kvplane.services.protocol.endpoints import following
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.rpc.client import ASK_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nats.aio.client import Client

LONGEST_SECONDS = 3600.0


async def pages(
    client: Client, fleet: str, sql: str, *, seconds: float | None = None, rows: int | None = None
) -> AsyncIterator[pa.Table]:
    """The pages of a query's result as Arrow tables, at least one.

    Raises `Refused` with the historian's code, or `NoAnswer`.
    """
    patience = (seconds or LONGEST_SECONDS) + ASK_SECONDS
    request = messages.SqlRequest(sql=sql, form="arrow", seconds=seconds, rows=rows)
    answer = await ask(client, f"kv.{fleet}.sql", request, messages.SqlAnswer, seconds=patience)
    ended = False
    try:
        while True:
            yield pa.ipc.open_stream(answer.data).read_all()
            if not answer.next:
                ended = True
                return
            more = messages.SqlNextRequest(result=answer.result)
            where = following(answer.next, fleet, "historian", "sql_next")
            answer = await ask(client, where, more, messages.SqlAnswer, seconds=patience)
    finally:
        if not ended and answer.next:
            closing = messages.SqlNextRequest(result=answer.result, close=True)
            # It closes by itself after a while.
            with anyio.CancelScope(shield=True), suppress(ServiceFault):
                await ask(client, following(answer.next, fleet, "historian", "sql_next"), closing, seconds=1)


async def table(client: Client, fleet: str, sql: str, *, seconds: float | None = None) -> pa.Table:
    """A query's whole result."""
    return pa.concat_tables([page async for page in pages(client, fleet, sql, seconds=seconds)])
