"""Asking the services, as any NATS client can: one request, one answer or an error with a code."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import anyio
import msgspec
import structlog
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

from kvplane.events.errors import ConnectionLost
from kvplane.events.log.servers import request as ask_once
from kvplane.services.protocol import signs
from kvplane.services.protocol.endpoints import of_subject
from kvplane.services.protocol.errors import BadRequest, NoAnswer, Refused
from kvplane.services.protocol.messages import RouteAnswer, RouteRequest, StatusRequest
from kvplane.services.rpc.hashed import hashed, probe

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

T = TypeVar("T")

ASK_SECONDS = 15.0
AGAIN_SECONDS = 0.5
"""What is answered from memory is answered in milliseconds or never: it is asked again after so long, then after twice as
long, and so on."""
PAUSE_SECONDS = 0.02
MOST_INSTANCES = 1000
"""So many instances of a service are listed at the most."""
NOBODY_SECONDS = 2.0
"""So long a route is asked again when no router is there: one that changes servers is back soon."""
_log = structlog.get_logger("kvplane.rpc")
_encode = msgspec.msgpack.Encoder().encode


async def ask(
    client: Client, subject: str, request: msgspec.Struct, form: type[T] | None = None, *, seconds: float = ASK_SECONDS
) -> T:
    """Send a request in MessagePack and return the answer, as `form` or as plain data.

    What is read from memory is asked again when its answer does not come; so is a route, under one id, so that it counts
    once. Anything else is asked once; where it may take longer than `ASK_SECONDS`, the service gives signs of life. Raises
    `Refused` with the service's own code and sentence, `BadRequest` for more than the server takes, or `NoAnswer`. The tokens
    of a route that are more than that are hashed here.
    """
    if isinstance(request, RouteRequest) and not request.request:
        request = msgspec.structs.replace(request, request=uuid4().hex)
    asked = _encode(request)
    if len(asked) > client.max_payload and isinstance(request, RouteRequest) and request.hashes is None:
        how = await ask(client, subject, probe(request), RouteAnswer, seconds=seconds)
        request = await hashed(request, how.hashing, client.max_payload)
        asked = _encode(request)
    if len(asked) > client.max_payload:
        raise BadRequest(
            f"the request takes {len(asked):,} bytes, and the server allows {client.max_payload:,}: send hashes instead of "
            "tokens, or raise its max_payload"
        )
    try:
        if isinstance(request, RouteRequest):
            answer = await _ask_until_answered(client, subject, asked, seconds, min(NOBODY_SECONDS, seconds))
        elif _again(subject, request):
            answer = await _ask_until_answered(client, subject, asked, seconds, 0)
        elif seconds > ASK_SECONDS:
            answer = await _ask_watching(client, subject, asked, seconds)
        else:
            answer = await client.request(subject, asked, timeout=seconds)
    except NoRespondersError:
        raise NoAnswer(f"no service answers on {subject}; {_who(subject)}") from None
    except (NatsError, TimeoutError, OSError, ConnectionLost) as error:
        raise NoAnswer(f"no answer on {subject} in {seconds:g} s ({type(error).__name__})") from None
    headers = answer.headers or {}
    status = headers.get("Nats-Service-Error-Code")
    if status is not None:
        code, sentence = "error", headers.get("Nats-Service-Error", "")
        try:
            body: Any = msgspec.json.decode(answer.data)
            code, sentence = body["code"], body["error"]
        except (msgspec.DecodeError, KeyError, TypeError):
            pass
        raise Refused(int(status) if status.isdigit() else 500, code, sentence)
    try:
        found: T = (
            msgspec.msgpack.decode(answer.data) if form is None else msgspec.msgpack.decode(answer.data, type=form)
        )
    except (msgspec.DecodeError, UnicodeError) as error:
        stream = _acknowledged_by(answer.data)
        if stream:
            raise NoAnswer(f"what answered on {subject} is no kvplane: {captured(stream, subject)}") from None
        raise NoAnswer(
            f"the answer on {subject} can't be read ({error}); is that service of another version, or another program?"
        ) from None
    return found


def captured(stream: str, subject: str) -> str:
    """What to do about a stream that stores questions, and acknowledges them as if that were an answer."""
    words = subject.split(".")
    taken = ".".join([*words[:3], ">"] if len(words) > 3 else words)
    return (
        f"stream {stream!r} captures {subject}, and acknowledges questions as messages; take {taken} "
        f"out of its subjects (`nats stream edit {stream}`): kvplane keeps its log by itself"
    )


def _acknowledged_by(answer: bytes) -> str:
    """The stream that acknowledged a message; empty for what is no acknowledgement."""
    try:
        return msgspec.json.decode(answer, type=_Acknowledged).stream
    except (msgspec.DecodeError, UnicodeError):
        return ""


def _again(subject: str, request: msgspec.Struct) -> bool:
    """Whether the answer changes nothing and takes no time to make, so that it may be asked for again; a digest takes some."""
    spec = of_subject(subject)
    return spec is not None and spec.again and not (isinstance(request, StatusRequest) and request.digest)


async def _ask_watching(client: Client, subject: str, body: bytes, seconds: float) -> Msg:
    """Ask for what takes long, and wait for no service that has died meanwhile. Raises `NoAnswer` and errors of NATS."""
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    try:
        await client.publish(subject, body, reply=inbox, headers={signs.WANTED: "1"})
        give_up = anyio.current_time() + seconds
        patience = seconds
        while True:
            left = give_up - anyio.current_time()
            try:
                message = await subscription.next_msg(timeout=max(0.001, min(patience, left)))
            except NatsTimeoutError:
                if left <= patience:
                    raise
                raise NoAnswer(
                    f"what worked on {subject} gave no sign of life for {patience:g} s: it was stopped, or can't be reached; "
                    "ask again"
                ) from None
            headers = message.headers or {}
            if signs.SIGN in headers:
                patience = signs.SILENT_SECONDS
            elif headers.get("Status") == "503" and not message.data:
                raise NoRespondersError
            else:
                return message
    finally:
        with suppress(NatsError, OSError):
            await subscription.unsubscribe()


async def _ask_until_answered(client: Client, subject: str, body: bytes, seconds: float, nobody: float) -> Msg:
    begin = anyio.current_time()
    patience = AGAIN_SECONDS
    while True:
        left = begin + seconds - anyio.current_time()
        try:
            return await ask_once(client, subject, body, seconds=max(0.001, min(patience, left)))
        except NoRespondersError:
            if anyio.current_time() - begin >= nobody:
                raise
        except (NatsError, OSError, TimeoutError, ConnectionLost):
            if anyio.current_time() - begin >= seconds:
                raise
            patience *= 2
        await anyio.sleep(PAUSE_SECONDS)


class _Acknowledged(msgspec.Struct):
    """What a server says of a message that a stream has stored."""

    stream: str
    seq: int


class _Listed(msgspec.Struct):
    """What an instance says of itself, as far as it is read."""

    metadata: dict[str, str]


async def instances(
    client: Client, service: str, *, seconds: float, enough: int | None = None, quiet: float | None = None
) -> list[dict[str, str]]:  # fmt: skip
    """Metadata of all instances of a micro service that answer in so many seconds, or of the first few that are `enough`.

    With `quiet` no more is waited for when that many seconds have passed since the last answer, or when the server says that
    nobody listens. Asks as `nats micro info` does. Raises errors of NATS.
    """
    found: list[dict[str, str]] = []
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    try:
        await client.publish(f"$SRV.INFO.{service}", reply=inbox)
        with anyio.move_on_after(seconds) as scope:
            last = scope.deadline
            while len(found) < (MOST_INSTANCES if enough is None else enough):
                message = await subscription.next_msg(timeout=2 * seconds)
                if message.data:
                    try:
                        found.append(msgspec.json.decode(message.data, type=_Listed).metadata)
                    except (msgspec.DecodeError, UnicodeDecodeError) as error:
                        # Whoever may be listed can say anything.
                        _log.debug("not_listed", service=service, error=str(error))
                        continue
                    if quiet is not None:
                        scope.deadline = min(last, anyio.current_time() + quiet)
                elif quiet is not None and (message.headers or {}).get("Status") == "503":
                    break
    finally:
        await subscription.unsubscribe()
    return found


async def of_fleet(client: Client, service: str, fleet: str, *, seconds: float) -> list[dict[str, str]]:
    """Metadata of all instances of a micro service that answer for a fleet. Raises errors of NATS."""
    return [
        metadata for metadata in await instances(client, service, seconds=seconds) if metadata.get("fleet") == fleet
    ]


def _who(subject: str) -> str:
    """Who would answer, and how it is started."""
    words = subject.split(".")
    if len(words) > 2 and words[2] in {"sql", "explain", "history"}:
        return "`kvplane historian` keeps a history and answers, and so does `kvplane up`"
    return "`kvplane up` starts a coordinator and a router"
