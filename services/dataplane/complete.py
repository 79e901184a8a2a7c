"""Sending a request where the router says, and telling the log what came of it.

The engine's own `usage` and the time to its first token go into `RequestCompleted`, beside what the decision had predicted.
An engine that can't be reached, or breaks down before its first token, is left out and the router asked again; each attempt
is a decision of its own, and ends with a completion of its own.
"""

from __future__ import annotations

import json
import time
from contextlib import closing, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

import aiohttp
import anyio
import msgspec
import structlog

from kvplane.services.dataplane import endings, openai, prompts
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest, EngineFailed, EngineRefused, ServiceFault
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.unanswered import why

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.client import Client

    from kvplane.services.dataplane.openai import Body

ATTEMPTS = 3
CONNECT_SECONDS = 2.0
TOKENIZE_SECONDS = 10.0
ROUTE_SECONDS = 15.0
SILENT_SECONDS = 600.0
"""How long an engine may say nothing, as while a request waits there, before it counts as broken."""
IDLE_SECONDS = 2.0
"""Connections are kept so long: engines close idle ones after 5 s, and a request that meets that is lost."""
END_SECONDS = 0.1
LOOK_SECONDS = 1.5
"""How long it may take to find out what answers instead of an engine, before another one is tried."""
RECORD_SECONDS = 2.0
COMPLAINT_BYTES = 1 << 16
CHARACTERS_A_TOKEN = 4
"""Guessed of a prompt whose tokens the engine can't give."""
_BUSY = {404, 408, 425, 429}
"""Statuses of an engine that another one need not share: it is full, or is not what it was."""

T = TypeVar("T")

_log = structlog.get_logger("kvplane.complete")


class Attempt(msgspec.Struct, frozen=True):
    """An engine that was tried in vain, and why."""

    node: str
    reason: str


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a request. Times in seconds from when it was sent to the engine."""

    decision: messages.RouteAnswer
    text: list[str]
    """What each choice says; empty for one that only calls tools. The chunks have all of it."""
    usage: openai.Usage
    ttft: float
    duration: float
    recorded: bool
    """Whether a router took the completion for the log."""
    failed: list[Attempt] = []


class Completer:
    """Completes OpenAI requests on a fleet's engines. Use as an asynchronous context manager, for many requests at once."""

    def __init__(
        self, client: Client, fleet: str, *, api_key: str = "", attempts: int = ATTEMPTS,
        tokenize_seconds: float = TOKENIZE_SECONDS, end_seconds: float = END_SECONDS,
    ) -> None:  # fmt: skip
        self.client = client
        self.fleet = fleet
        self.attempts = attempts
        self.tokenize_seconds = tokenize_seconds
        self.end_seconds = end_seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self.waits_for = ""
        """Whose answer is waited for, of the request that was sent last; for people who wonder."""
        self.telling: set[str] = set()
        """Nodes that have reported cached tokens; some engines leave the field out when there are none."""
        self._warned: set[tuple[str, str]] = set()
        self._lacking = prompts.Lacking()

    async def __aenter__(self) -> Self:
        """Open."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        if self._session is not None:
            await self._session.close()

    async def complete(
        self, body: Body, *, session: str = "", traceparent: str = "", on_chunk: Callable[[Body], None] | None = None
    ) -> Completion:
        """Complete a request, an OpenAI body with `messages` or `prompt`; `on_chunk` gets each chunk as it comes.

        Raises `BadRequest`, `EngineRefused` when an engine would not have it, `EngineFailed` when none did it, and what the
        router answers.
        """
        path = openai.path(body)
        asked = await self._question(body, session, traceparent)
        failed: list[Attempt] = []
        request = uuid4().hex
        while True:
            asked = msgspec.structs.replace(
                asked, request=f"{request}.{len(failed)}" if failed else request,
                exclude=[*asked.exclude, *(attempt.node for attempt in failed[-1:])],
            )  # fmt: skip
            decision = await self._routed(asked, failed)
            delivery = _Delivery(self, decision, traceparent, on_chunk)
            try:
                return await delivery.run(path, body, failed)
            except EngineFailed as error:
                failed = [*failed, Attempt(decision.node, str(error))]
                if delivery.begun or len(failed) >= self.attempts:
                    raise EngineFailed(_in_vain(failed)) from None
                _log.warning("engine_failed", node=decision.node, error=str(error))

    @property
    def http(self) -> aiohttp.ClientSession:
        """The open session."""
        if self._session is None:
            raise RuntimeError("not opened")
        return self._session

    async def _routed(self, asked: messages.RouteRequest, failed: list[Attempt]) -> messages.RouteAnswer:
        """Where the router would have it. What it says when nobody is left is not the cause."""
        while True:
            try:
                # Who gives up now must still learn where the request went, so that its load can be taken back.
                with anyio.CancelScope(shield=True):
                    answer: messages.RouteAnswer = await ask(
                        self.client, f"kv.{self.fleet}.route", asked, messages.RouteAnswer, seconds=ROUTE_SECONDS
                    )
            except ServiceFault:
                if failed:
                    raise EngineFailed(_in_vain(failed)) from None
                raise
            held = answer.held
            if held is None:
                return answer
            self.waits_for = (
                f"room, at place {held.place:,}, for {held.expected:,.0f} s at the most or so ({held.reason})"
            )
            asked = msgspec.structs.replace(asked, request=answer.request)
            await anyio.sleep(held.ask_again)

    async def _question(self, body: Body, session: str, traceparent: str) -> messages.RouteRequest:
        """What to ask the router."""
        salt = str(body.get("cache_salt") or "")
        given = openai.tokens(body)
        count = len(given) if given is not None else openai.length(body) // CHARACTERS_A_TOKEN
        known, failed = openai.kept(body, given) if given is not None else None, list[Attempt]()
        if given is None and not openai.has_media(body):
            anyone = prompts.query(body["model"], None, 1, session="", salt=salt, traceparent=traceparent)
            known, failed = await self._tokens(body, anyone)
        asked = prompts.query(body["model"], known, count, session=session, salt=salt, traceparent=traceparent)
        return msgspec.structs.replace(asked, exclude=[attempt.node for attempt in failed])

    async def _tokens(self, body: Body, anyone: messages.RouteRequest) -> tuple[list[int] | None, list[Attempt]]:
        """Token ids by any engine of the model, or none when it gives none; and those that were asked in vain."""
        failed: list[Attempt] = []
        while True:
            # Any of the least loaded; this is no decision about the request.
            exclude = [attempt.node for attempt in failed]
            found = await self._routed(msgspec.structs.replace(anyone, exclude=exclude, dry_run=True), failed)
            url = _url(found)
            try:
                return await self._told(found.node, url, body), failed
            except EngineFailed as error:
                reason = str(error)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                reason = f"does not answer at {url} ({await _reason(url, error)})"
            failed.append(Attempt(found.node, reason))
            if len(failed) >= self.attempts:
                raise EngineFailed(_in_vain(failed))

    async def _told(self, node: str, url: str, body: Body) -> list[int] | None:
        """Token ids that this engine would keep of a prompt; none when it won't tell. Raises `EngineFailed`."""
        now, status = anyio.current_time(), 404
        if self._lacking.may(node, prompts.RENDER, now):
            status, answer = await self._ask_engine(node, f"{url}{openai.path(body)}/render", body)
            ids = prompts.told(answer) if status == 200 else None
            if ids is not None:
                # It has truncated them already.
                return ids
            if status in prompts.NO_SUCH_ENDPOINT:
                self._lacking.note(node, prompts.RENDER, now)
                if "messages" in body:
                    self._warn("prompts_not_rendered", body["model"], prompts.RENDERS_NOT)
        endpoint = f"{openai.path(body)}/render"
        if status == 200 or status in prompts.NO_SUCH_ENDPOINT:
            endpoint = "/tokenize"
            status, answer = await self._ask_engine(node, url + endpoint, openai.question(body))
            if status == 200:
                return openai.kept(body, openai.answered(json.loads(answer)))
        reason = f"{endpoint} answers {status}"
        if status >= 500 or status in _BUSY - {404}:
            raise EngineFailed(reason)
        # What is wrong with the request, the engine says when it gets it.
        hint = f"{reason} ({openai.complaint(answer[:COMPLAINT_BYTES])}): routed by load and session, not by cache"
        self._warn("tokens_not_known", body["model"], hint)
        return None

    async def _ask_engine(self, node: str, url: str, question: Body) -> tuple[int, bytes]:
        self.waits_for = f"node {node} at {url}"
        patience = aiohttp.ClientTimeout(total=self.tokenize_seconds)
        async with self.http.post(url, timeout=patience, **_sent(question)) as answer:
            return answer.status, await answer.read()

    def _warn(self, event: str, name: str, hint: str) -> None:
        """Say it once a name."""
        if (event, name) not in self._warned:
            self._warned.add((event, name))
            _log.warning(event, name=name, hint=hint)

    async def record(self, done: messages.CompleteRequest, *, cached_known: bool) -> bool:
        """Hand a completion to a router; whether one took it."""
        if not cached_known:
            self._warn(
                "cached_tokens_not_told", done.node,
                "start vLLM with --enable-prompt-tokens-details, SGLang with --enable-cache-report: until then "
                "predictions can't be compared with what the engine found cached",
            )  # fmt: skip
        try:
            await ask(self.client, f"kv.{self.fleet}.complete", done, seconds=RECORD_SECONDS)
        except ServiceFault as error:
            _log.warning("completion_not_recorded", request=done.request, error=str(error))
            return False
        return True


class _Delivery:
    """One request on its way to one engine."""

    def __init__(
        self,
        completer: Completer,
        decision: messages.RouteAnswer,
        traceparent: str,
        on_chunk: Callable[[Body], None] | None,
    ) -> None:
        self.completer, self.decision, self.traceparent, self.on_chunk = completer, decision, traceparent, on_chunk
        self.begun = False
        """The engine has answered something, which was handed on."""
        self._usage = openai.Usage()
        self._chunks = openai.Chunks()
        self._texts: dict[int, str] = {}
        self._begin = time.perf_counter()
        self._end = 0.0
        self._ttft = 0.0

    async def run(self, path: str, body: Body, failed: list[Attempt]) -> Completion:
        status = endings.CANCELLED
        try:
            await self._deliver(_url(self.decision) + path, openai.streamed(body))
            status = "ok"
        except EngineFailed as error:
            status = f"{endings.FAILED}{error}"[: endings.LONGEST]
            raise
        except (EngineRefused, BadRequest) as error:
            status = f"{endings.REFUSED}{error}"[: endings.LONGEST]
            raise
        finally:
            duration = (self._end or time.perf_counter()) - self._begin
            recorded = await self._record(status, duration)
        texts = [self._texts.get(index, "") for index in range(max(self._texts, default=0) + 1)]
        return Completion(
            decision=self.decision, text=texts, usage=self._usage, ttft=self._ttft, duration=duration, recorded=recorded,
            failed=failed,
        )  # fmt: skip

    async def _deliver(self, url: str, body: Body) -> None:
        headers = {"X-data-parallel-rank": self.decision.rank} if self.decision.rank else {}
        if self.traceparent:
            headers["traceparent"] = self.traceparent
        self.completer.waits_for = f"node {self.decision.node} at {url}"
        self._begin = time.perf_counter()
        answer = await self._from_engine(self.completer.http.post(url, headers=headers, **_sent(body)))
        # Closes the connection of an answer that has not ended, upon which engines give up the request.
        with closing(answer):
            if answer.status != 200:
                complaint = openai.complaint(await self._from_engine(answer.content.read(COMPLAINT_BYTES)))
                message = f"answers {answer.status}{f' at {url}' * (answer.status == 404)}: {complaint}"
                if 400 <= answer.status < 500 and answer.status not in _BUSY:
                    raise EngineRefused(answer.status, f"the engine of node {self.decision.node} {message}")
                raise EngineFailed(message)
            while not self._chunks.ended:
                data = await self._from_engine(answer.content.readany())
                for chunk in self._chunks.feed(data):
                    self._take(chunk)
                if not data and not self._chunks.ended:
                    raise EngineFailed(
                        "broke off before the end of its answer"
                        if self._chunks.begun
                        else f"answers no stream of events ({answer.content_type})"
                    )
            self._end = time.perf_counter()
            # Until its very end, so that the connection can be used again.
            with anyio.move_on_after(self.completer.end_seconds), suppress(EngineFailed):
                await self._from_engine(answer.read())

    async def _from_engine(self, answer: Awaitable[T]) -> T:
        """What comes from the engine. Raises `EngineFailed` when nothing does."""
        try:
            return await answer
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if self._ttft:
                raise EngineFailed(f"broke off ({type(error).__name__})") from None
            where = self.decision.address
            raise EngineFailed(f"does not answer at {where} ({await _reason(where, error)})") from None

    def _take(self, chunk: Body) -> None:
        if chunk.get("choices") and not self._ttft:
            self._ttft = time.perf_counter() - self._begin
        for index, text in openai.text(chunk).items():
            self._texts[index] = self._texts.get(index, "") + text
        self._usage = openai.usage(chunk) or self._usage
        if self.on_chunk is not None:
            self.begun = True
            self.on_chunk(chunk)

    async def _record(self, status: str, duration: float) -> bool:
        node, usage = self.decision.node, self._usage
        if usage.cached_tokens is None and status == "ok" and node in self.completer.telling:
            usage = self._usage = openai.Usage(usage.prompt_tokens, 0, usage.output_tokens)
        counted = usage.cached_tokens is not None
        if counted:
            self.completer.telling.add(node)
        done = messages.CompleteRequest(
            request=self.decision.request, node=self.decision.node, status=status,
            # A prompt of which nobody knows how much was cached would count as one without any hit.
            prompt_tokens=usage.prompt_tokens if counted else 0, cached_tokens=usage.cached_tokens or 0,
            output_tokens=usage.output_tokens, ttft=self._ttft, duration=duration, traceparent=self.traceparent,
        )  # fmt: skip
        recorded = False
        # Also for a request that was given up: its load must not stay.
        with anyio.CancelScope(shield=True):
            recorded = await self.completer.record(
                done, cached_known=counted or status != "ok" or not self.decision.matched_tokens
            )
        return recorded  # noqa: RET504 - a scope may swallow, for all that types say


async def _reason(url: str, error: Exception) -> str:
    """Why an engine did not answer. One that takes long is not looked at: it is there."""
    if isinstance(error, aiohttp.ServerTimeoutError | TimeoutError):
        return type(error).__name__
    return (await why(url, error, seconds=LOOK_SECONDS)).reason


def _sent(body: Body) -> dict[str, Any]:
    """A request's body, and that it goes to the engine that was chosen or nowhere. Long ones are sent in parts."""
    return {"data": BytesIO(json.dumps(body).encode()), "allow_redirects": False}


def _url(decision: messages.RouteAnswer) -> str:
    """Where a node's engine is. Raises `BadRequest` for nodes that have none."""
    if not decision.address.lower().startswith(("http://", "https://")):
        raise BadRequest(
            f"node {decision.node!r} is at {decision.address[:80]!r}, which is no engine's URL: it is simulated, or was "
            "registered by hand; engines come with `kvplane attach`"
        )
    return decision.address.rstrip("/")


def _in_vain(failed: list[Attempt]) -> str:
    tried = "; ".join(f"{attempt.node}: {attempt.reason}" for attempt in failed)
    return f"no engine completed the request ({tried})"
