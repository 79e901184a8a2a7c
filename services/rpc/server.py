"""Endpoints of the micro protocol (NATS ADR-32): what `nats micro ls`, `info` and `stats` show.

Every error is answered, with `Nats-Service-Error-Code`, a sentence, and a body `{"code", "error"}`; none ends a service.

A reply subject is the asker's choice, and servers let a consumer be aimed at any subject. So what names a subject of the log
or of the server as its inbox, or none, is dropped before anything is done.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager, nullcontext, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import anyio
import msgspec
import structlog
from nats.errors import Error as NatsError
from nats.errors import FlushTimeoutError, MaxPayloadError
from nats.micro.service import Service, ServiceConfig
from structlog.contextvars import bound_contextvars

from kvplane.events.errors import BadName, KvplaneError
from kvplane.events.subjects import name_of
from kvplane.events.versions import FORMAT
from kvplane.services.process.version import package_version
from kvplane.services.protocol import signs
from kvplane.services.protocol.endpoints import served
from kvplane.services.protocol.errors import AnswerTooLarge, BadRequest, NotYours, ServiceFault
from kvplane.services.protocol.messages import decode_request, encode_answer, is_json
from kvplane.services.protocol.traceparent import HEADER, in_headers, parse
from kvplane.services.rpc.asker import REPLY
from kvplane.services.rpc.tally import OK, Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

    from anyio.abc import TaskGroup
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.micro.request import Request

    from kvplane.services.protocol.endpoints import Server

STOP_SECONDS = 1.0
LOGGED_CHARACTERS = 200
LARGE_BYTES = 256 << 10
"""A longer request may take others' time to decode: a prompt of some 50,000 tokens, say."""
_NOT_INBOXES = ("kv.", "$", "_DELIVER")

_log = structlog.get_logger("kvplane.micro")


class Endpoint(NamedTuple):
    """One endpoint: its name, its subject, the form of its requests, and what answers them.

    A subject that ends with `.*` has the name of a node there, and its requests may speak of that node only.
    `answer` gives the answer at once, or waits for it when it is a coroutine function; then `concurrent` must be set, as it
    must for a subject with a node's name.
    `after` is called when the answer is on its way; with several requests waiting it may be called once for all.
    """

    name: str
    subject: str
    form: type[msgspec.Struct]
    answer: Callable[..., Any]
    concurrent: bool = False
    after: Callable[[], None] | None = None
    traced: bool = False
    """Whether `answer` takes the request's traceparent as its second argument; its form has a field for it, too."""
    large: Callable[[bytes], Awaitable[Any]] | None = None
    """Decodes a request of more than `LARGE_BYTES`, somewhere else than in the event loop, for one that answers at once."""
    unasked: bool = False
    """Whether a request without a reply subject is accepted. What a server answers on its own has none either."""


def serving(
    server: Server, fleet: str, name: str, answers: dict[str, Callable[..., Any]], *, in_turn: Collection[str] = (),
    after: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    large: Mapping[str, Callable[[bytes], Awaitable[Any]]] = MappingProxyType({}),
) -> list[Endpoint]:  # fmt: skip
    """The endpoints of one service, by the table. `answers`, `after` and `large` are by endpoint; `name` is the service's own.

    Those `in_turn` answer at once. Raises `ValueError` unless every endpoint has its answer.
    """
    specs = served(server)
    if {spec.name for spec in specs} != answers.keys():
        raise ValueError(f"the table of endpoints and the answers of a {server} are not of the same names")
    return [
        Endpoint(
            spec.name, spec.at(fleet, name), spec.request, answers[spec.name], concurrent=spec.name not in in_turn,
            after=after.get(spec.name), traced=spec.traced, large=large.get(spec.name), unasked=spec.unasked,
        )
        for spec in specs
    ]  # fmt: skip


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


def answerable(reply: str) -> bool:
    """Whether an answer may be sent there: not to the log, nor to a service, the server or what a consumer delivers."""
    return not reply.startswith(_NOT_INBOXES)


class _Service(Service):
    """A micro service that lists itself to inboxes only."""

    async def _handle_ping_request(self, msg: Msg) -> None:
        if msg.reply and answerable(msg.reply):
            await super()._handle_ping_request(msg)

    async def _handle_info_request(self, msg: Msg) -> None:
        if msg.reply and answerable(msg.reply):
            await super()._handle_info_request(msg)

    async def _handle_stats_request(self, msg: Msg) -> None:
        if msg.reply and answerable(msg.reply):
            await super()._handle_stats_request(msg)


async def serve(
    client: Client, group: TaskGroup, name: str, description: str, endpoints: list[Endpoint], metadata: dict[str, str],
    tally: Tally | None = None, *, listed: bool = True,
) -> Service:  # fmt: skip
    """Start a micro service. Concurrent endpoints answer from tasks of `group`, the others in turn. `tally` counts.

    One that is not `listed` does not answer those that ask who is there.
    """
    tally = tally or Tally()
    about = {"kvplane": package_version(), "format": str(FORMAT), **metadata}
    service = _Service(
        client, ServiceConfig(name=name, version=package_version(), description=description, metadata=about)
    )
    for endpoint in endpoints:
        tally.expect(endpoint.name, waits=endpoint.concurrent)
        handler = (_concurrent if endpoint.concurrent else _in_turn)(endpoint, tally, group)
        await service.add_endpoint(name=endpoint.name, subject=endpoint.subject, handler=handler)
    # Last, so that whoever is listed can be asked. A connection that is replaced just now subscribes again by itself.
    with suppress(FlushTimeoutError):
        await (service.start() if listed else client.flush())
    return service


async def stop(service: Service) -> None:
    """Take no more requests; those that arrived are answered."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(STOP_SECONDS), suppress(NatsError, OSError):
        await service.stop()


def _code(error: Exception) -> str:
    return error.code if isinstance(error, KvplaneError) else "internal"


def _traced(endpoint: Endpoint, tally: Tally, header: str, field: str) -> str:
    """The traceparent that goes with a request: of its headers, else of its field."""
    traceparent = parse(header) or parse(field)
    if not traceparent and (header or field):
        tally.bad_traceparents += 1
        _log.debug("bad_traceparent", endpoint=endpoint.name, received=(header or field)[:80])
    return traceparent


def _genuine(endpoint: Endpoint, message: Msg) -> bool:
    """Whether the message is of someone who can be answered. A consumer's delivery has a reply subject of the server."""
    if (message.reply or endpoint.unasked) and answerable(message.reply):
        return True
    # Both are as long as a stranger likes.
    subject, reply = message.subject[:LOGGED_CHARACTERS], message.reply[:LOGGED_CHARACTERS]
    _log.warning("request_dropped", endpoint=endpoint.subject, subject=subject, reply=reply)
    return False


def _owned(endpoint: Endpoint, message: Msg, request: Any) -> Any:  # noqa: ANN401 - one of the endpoint's form
    """The request, if it may be made on this subject. Raises `NotYours`."""
    if endpoint.subject.endswith(".*"):
        token = message.subject.rpartition(".")[2]
        try:
            name = name_of(token)
        except BadName as error:
            raise NotYours(str(error)) from None
        if request.node != name:
            raise NotYours(f"the subject is of node {name[:80]!r}, the request of {request.node[:80]!r}")
    return request


class _Soon:
    """Has something called when those who were scheduled before have run; once, however often it is asked for until then."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._scheduled = False

    def schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        self._call()


async def _too_large(body: bytes) -> NoReturn:
    raise BadRequest(f"the request has {len(body)} bytes, more than {LARGE_BYTES}; nothing here takes as many")


def _in_turn(endpoint: Endpoint, tally: Tally, group: TaskGroup) -> Callable[[Request], Awaitable[None]]:
    name, answer, form, after, traced = endpoint.name, endpoint.answer, endpoint.form, endpoint.after, endpoint.traced
    large = endpoint.large
    clock = time.perf_counter
    afterwards = _Soon(after) if after is not None else None

    async def handle(request: Request) -> None:
        if not _genuine(endpoint, request._msg):  # noqa: SLF001 - nothing public has the reply subject
            return
        if len(request.data) > LARGE_BYTES:
            group.start_soon(work, request, large or _too_large)
        else:
            await work(request)

    async def work(request: Request, decode: Callable[[bytes], Awaitable[Any]] | None = None) -> None:
        begin = clock()
        traceparent = ""
        REPLY.set(request._msg.reply)  # noqa: SLF001 - as above
        try:
            body = request.data
            asked: Any = decode_request(body, form) if decode is None else await decode(body)
            if traced:
                headers = request.headers
                header = in_headers(headers) if headers else ""
                if header or asked.traceparent:
                    traceparent = _traced(endpoint, tally, header, asked.traceparent)
                with bound_contextvars(trace=traceparent) if traceparent else _NOTHING:
                    found = answer(asked, traceparent)
            else:
                found = answer(asked)
            reply = encode_answer(found, as_json=is_json(body))
        except Exception as error:  # noqa: BLE001 - every error is answered
            tally.add(name, _code(error), clock() - begin)
            await _refuse(request, error, traceparent)
        else:
            tally.add(name, OK, clock() - begin)
            await _respond(request, reply, traceparent)
            if afterwards is not None:
                # The client's flusher was scheduled by the answer and comes first.
                afterwards.schedule()

    return handle


_NOTHING = nullcontext()


def _concurrent(endpoint: Endpoint, tally: Tally, group: TaskGroup) -> Callable[[Request], Awaitable[None]]:
    name, answer, form, traced = endpoint.name, endpoint.answer, endpoint.form, endpoint.traced
    clock = time.perf_counter

    async def work(request: Request) -> None:
        begin = clock()
        traceparent = ""
        REPLY.set(request._msg.reply)  # noqa: SLF001 - as below
        try:
            body = request.data
            asked = _owned(endpoint, request._msg, decode_request(body, form))  # noqa: SLF001 - as below
            if traced:
                header = in_headers(request.headers or {})
                traceparent = _traced(endpoint, tally, header, asked.traceparent)
                with bound_contextvars(trace=traceparent) if traceparent else _NOTHING:
                    result = await answer(asked, traceparent)
            else:
                with _signing(request, group) if signs.WANTED in (request.headers or {}) else _NOTHING:
                    result = await answer(asked)
            reply = encode_answer(result, as_json=is_json(body))
        except Exception as error:  # noqa: BLE001 - every error is answered
            tally.add(name, _code(error), clock() - begin)
            await _refuse(request, error, traceparent)
        else:
            tally.add(name, OK, clock() - begin)
            await _respond(request, reply, traceparent)

    async def handle(request: Request) -> None:
        if _genuine(endpoint, request._msg):  # noqa: SLF001 - nothing public has the reply subject
            group.start_soon(work, request)

    return handle


@contextmanager
def _signing(request: Request, group: TaskGroup) -> Iterator[None]:
    """Signs of life for the one who asked, at once and then again and again, for the length of a block."""
    scope = anyio.CancelScope()

    async def sign() -> None:
        with scope, suppress(NatsError, ValueError, OSError):
            while True:
                await request.respond(b"", {signs.SIGN: "1"})
                await anyio.sleep(signs.SIGN_SECONDS)

    group.start_soon(sign)
    try:
        yield
    finally:
        scope.cancel()


async def _respond(request: Request, reply: bytes, traceparent: str = "") -> None:
    try:
        await request.respond(reply, {HEADER: traceparent} if traceparent else None)
    except MaxPayloadError as error:
        await _refuse(
            request,
            AnswerTooLarge(f"the answer has {len(reply)} bytes, more than a message may; ask for less"),
            traceparent,
        )
        _log.warning("answer_too_large", bytes=len(reply), error=repr(error))
    except (NatsError, ValueError, OSError) as error:
        # Nobody waits for the answer, or the connection is gone: the one who asked will ask again.
        _log.debug("answer_not_sent", error=repr(error))


async def _refuse(request: Request, error: Exception, traceparent: str) -> None:
    with bound_contextvars(trace=traceparent) if traceparent else _NOTHING:
        status, sentence, body = fault(error)
    try:
        await request.respond_error(status, sentence, data=body, headers={HEADER: traceparent} if traceparent else None)
    except (NatsError, ValueError, OSError) as failed:
        _log.debug("answer_not_sent", error=repr(failed))
