"""How many servers keep a fleet's log and its snapshots, changed while both are in use."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
from nats.errors import Error as NatsError

from kvplane.events.errors import LogMissing, LogUnavailable
from kvplane.events.subjects import stream_name

if TYPE_CHECKING:
    from nats.aio.client import Client

ANSWER_SECONDS = 10.0
LOOK_SECONDS = 0.5
_NOT_FOUND = 404


async def set_copies(client: Client, fleet: str, copies: int, *, seconds: float) -> bool:
    """Have so many servers keep the log and the snapshots of a fleet; whether all copies were current in `seconds`.

    Raises `LogMissing`, or `LogUnavailable` with the server's reason.
    """
    log = stream_name(fleet)
    streams = [log, f"OBJ_{log}_snapshots"]
    for stream in streams:
        # As plain data: settings that nats-py does not know would be lost on the way through its types.
        info = await _ask(client, f"STREAM.INFO.{stream}", None)
        if info is None and stream == log:
            raise LogMissing(f"fleet {fleet!r} has no log yet; `kvplane coordinator --replicas {copies}` creates it so")
        if info is not None and info["config"]["num_replicas"] != copies:
            await _ask(client, f"STREAM.UPDATE.{stream}", {**info["config"], "num_replicas": copies})
    with anyio.move_on_after(seconds):
        while not all([await _current(client, stream, copies) for stream in streams]):  # noqa: ASYNC110 - no server announces it
            await anyio.sleep(LOOK_SECONDS)
        return True
    return False


async def _current(client: Client, stream: str, copies: int) -> bool:
    info = await _ask(client, f"STREAM.INFO.{stream}", None)
    if info is None:
        return True
    others = info.get("cluster", {}).get("replicas") or []
    return len(others) == copies - 1 and all(other["current"] for other in others)


async def _ask(client: Client, what: str, request: dict[str, Any] | None) -> dict[str, Any] | None:
    """Answer of the JetStream API; nothing when there is no such stream."""
    body = b"" if request is None else json.dumps(request).encode()
    try:
        reply = await client.request(f"$JS.API.{what}", body, timeout=ANSWER_SECONDS)
    except (NatsError, OSError, TimeoutError) as error:
        raise LogUnavailable(f"the log's server does not answer: {error!r}") from error
    answer: dict[str, Any] = json.loads(reply.data)
    refused = answer.get("error")
    if refused is None:
        return answer
    if refused["code"] == _NOT_FOUND:
        return None
    raise LogUnavailable(f"the server refused: {refused['description']}")
