"""Endpoints of the micro protocol (NATS ADR-32): what `nats micro ls`, `info` and `stats` show.

Every error is answered, with `Nats-Service-Error-Code`, a sentence, and a body `{"code", "error"}`; none ends a service.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import msgspec
import structlog
from nats.errors import Error as NatsError
from nats.errors import FlushTimeoutError, MaxPayloadError
from nats.micro.service import Service, ServiceConfig

from events.errors import KvplaneError
from events.versions import FORMAT
from services.api import decode_request, encode_answer, is_json
from services.errors import AnswerTooLarge, ServiceFault
from services.version import package_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup
    from nats.aio.client import Client
    from nats.micro.request import Request

STOP_SECONDS = 1.0

_log = structlog.get_logger("kvplane.micro")


class Endpoint(NamedTuple):
    """One endpoint: its name, its subject, the form of its requests, and what answers them.

    `answer` gives the answer at once, or waits for it when it is a coroutine function; then `concurrent` must be set.
    `after` is called when the answer is on its way; with several requests waiting it may be called once for all.
    """

    name: str
    subject: str
    form: type[msgspec.Struct]
    answer: Callable[[Any], Any]
    concurrent: bool = False
    after: Callable[[], None] | None = None


def fault(error: Exception) -> tuple[str, str, bytes]:
    """Status, sentence and body of the answer to an error."""
    if isinstance(error, ServiceFault):
        status, code, sentence = str(error.status), error.code, str(error)
    elif isinstance(error, KvplaneError):
        status, code, sentence = "503" if error.code.startswith("log") else "400", error.code, str(error)
    else:
        _log.exception("endpoint_failed", error=repr(error))
        status, code, sentence = "500", "internal", f"this is a defect of kvplane: {type(error).__name__}; see its log"
    line = " ".join(sentence.split()).encode("ascii", "backslashreplace").decode()
    return status, line[:500], msgspec.json.encode({"code": code, "error": sentence})


async def serve(
    client: Client, group: TaskGroup, name: str, description: str, endpoints: list[Endpoint], metadata: dict[str, str]
) -> Service:
    """Start a micro service. Concurrent endpoints answer from tasks of `group`, the others in turn."""
    about = {"kvplane": package_version(), "format": str(FORMAT), **metadata}
    config = ServiceConfig(name=name, version=package_version(), description=description, metadata=about)
    service = Service(client, config)
    with suppress(FlushTimeoutError):
        await service.start()
    for endpoint in endpoints:
        handler = _concurrent(endpoint, group) if endpoint.concurrent else _in_turn(endpoint)
        await service.add_endpoint(name=endpoint.name, subject=endpoint.subject, handler=handler)
    # A connection that is replaced just now subscribes again by itself.
    with suppress(FlushTimeoutError):
        await client.flush()
    return service


async def stop(service: Service) -> None:
    """Take no more requests; those that arrived are answered."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(STOP_SECONDS), suppress(NatsError, OSError):
        await service.stop()


def _in_turn(endpoint: Endpoint) -> Callable[[Request], Awaitable[None]]:
    answer, form, after = endpoint.answer, endpoint.form, endpoint.after

    async def handle(request: Request) -> None:
        try:
            body = request.data
            reply = encode_answer(answer(decode_request(body, form)), as_json=is_json(body))
        except Exception as error:  # noqa: BLE001 - every error is answered
            await _refuse(request, error)
        else:
            await _respond(request, reply)
            if after is not None:
                # The client's flusher was scheduled by the answer and comes first.
                asyncio.get_running_loop().call_soon(after)

    return handle


def _concurrent(endpoint: Endpoint, group: TaskGroup) -> Callable[[Request], Awaitable[None]]:
    async def work(request: Request) -> None:
        try:
            body = request.data
            result = await endpoint.answer(decode_request(body, endpoint.form))
            reply = encode_answer(result, as_json=is_json(body))
        except Exception as error:  # noqa: BLE001 - every error is answered
            await _refuse(request, error)
        else:
            await _respond(request, reply)

    async def handle(request: Request) -> None:
        group.start_soon(work, request)

    return handle


async def _respond(request: Request, reply: bytes) -> None:
    try:
        await request.respond(reply)
    except MaxPayloadError as error:
        await _refuse(
            request, AnswerTooLarge(f"the answer has {len(reply)} bytes, more than a message may; ask for less")
        )
        _log.warning("answer_too_large", bytes=len(reply), error=repr(error))
    except (NatsError, ValueError, OSError) as error:
        # Nobody waits for the answer, or the connection is gone: the one who asked will ask again.
        _log.debug("answer_not_sent", error=repr(error))


async def _refuse(request: Request, error: Exception) -> None:
    status, sentence, body = fault(error)
    try:
        await request.respond_error(status, sentence, data=body)
    except (NatsError, ValueError, OSError) as failed:
        _log.debug("answer_not_sent", error=repr(failed))
