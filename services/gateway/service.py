"""The gateway as a service: HTTP in front, a router inside, engines behind.

The router is that of `kvplane router`: the same fold, overlay and writers, and it answers over NATS as well. So a
decision costs no hop, and any number of gateways and plain routers stand beside each other on one log.
"""

from __future__ import annotations

import gc
import math
import os
import time
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog
from msgspec.structs import replace

from kvplane.events.types import NodeRegistered, RequestCompleted
from kvplane.services.dataplane.measured import Measured
from kvplane.services.dataplane.prompts import LOCAL
from kvplane.services.gateway import api, errors, sessions
from kvplane.services.gateway.access import AccessLog
from kvplane.services.gateway.breaker import Breaker
from kvplane.services.gateway.continuation import unwanted
from kvplane.services.gateway.forward import Way, question
from kvplane.services.gateway.guard import Guard, Guarded
from kvplane.services.gateway.headers import answered, forwarded
from kvplane.services.gateway.legs import Legs, continued
from kvplane.services.gateway.local import LocalPrompts
from kvplane.services.gateway.passage import Passage, check_passing, model_of, seconds_of, usable
from kvplane.services.gateway.prompt import Anyone, Prompts
from kvplane.services.gateway.transcript import Kept
from kvplane.services.http.pool import Pool, origin, request_head
from kvplane.services.http.server import Server
from kvplane.services.protocol.errors import (
    BadHttp,
    BadRequest,
    EngineFailed,
    LimitExceeded,
    NoNode,
    Overloaded,
    Unauthorized,
)
from kvplane.services.protocol.messages import CompleteRequest, RouteAnswer, RouteRequest, decode_request, encode_answer
from kvplane.services.protocol.traceparent import parse
from kvplane.services.roles.router import Router
from kvplane.services.tenancy.measured import Tokens

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from anyio.abc import TaskStatus
    from nats.aio.client import Client

    from kvplane.events.codec import Commit
    from kvplane.services.gateway.api import Asked
    from kvplane.services.gateway.local import Rendered
    from kvplane.services.gateway.outcome import Outcome
    from kvplane.services.http.server import Exchange
    from kvplane.services.rpc.readiness import Readiness
    from kvplane.services.tenancy.doors import Visit
    from kvplane.services.tenancy.keys import Key

_JSON = [(b"content-type", b"application/json")]
_PASSING_SECONDS = 600.0
_NAMES = 256
_YOUNG_OBJECTS = 10_000
"""So many new objects before the collector looks for garbage: with Python's 700 it looks twice a request."""

_log = structlog.get_logger("kvplane.gateway")


class Gateway:
    """One gateway of a fleet, at a socket that is bound (`http.server.bound`).

    `tokenizers` are folders with the files of models, whose tokens are then found here; with `hub_cache` the Hugging Face hub's
    cache on this machine is looked through as well.
    """

    role = "gateway"

    def __init__(
        self, client: Client, fleet: str, where: socket.socket, *, guarded: Guarded = Guarded(),  # noqa: B008 - it is frozen
        tokenizers: Mapping[str, Path] | None = None, hub_cache: bool = False,
    ) -> None:  # fmt: skip
        self.client = client
        self.fleet = fleet
        observed = None if guarded.keys is None else self._observed
        self.router = Router(client, fleet, completed=self._completed, observed=observed)
        self.guard = Guard(guarded, client, fleet, self.router.writer)
        self.tally = self.router.tally
        self.breaker = Breaker()
        self.measured = Measured()
        self.access = AccessLog()
        self.continues = True
        """Streams that break off are gone on with at another engine."""
        self.kept = Kept()
        # A client's, an engine's that works for it, and one that is kept for the next.
        self.server = Server(self._handle, _refusal, descriptors=3)
        self.address = ("", 0)
        self._names: list[str] = []
        self._behind = anyio.CancelScope(shield=True)
        self._where = where
        self.local = LocalPrompts(
            tokenizers or {}, hub_cache=hub_cache, hashing=self.router.hashing, base=self.router.base, render=self._rendered
        )  # fmt: skip
        self._pool: Pool
        self._prompts: Prompts

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled; then take no more, and let what is on its way end."""
        self._pool = Pool(tls=self.guard.engine_tls)
        engine_key = self.guard.credentials or b""
        self._prompts = Prompts(self._pool, self._pool.clock, self.local, self._anyone, engine_key)
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
        async with anyio.create_task_group() as group:
            try:
                await group.start(self._run_behind)
                async with self.server.listening(self._where, tls=self.guard.tls) as self.address:
                    _log.info("gateway_ready", fleet=self.fleet, at="{}:{}".format(*self.address))
                    task_status.started()
                    await anyio.sleep_forever()
            finally:
                self._behind.cancel()

    async def _run_behind(self, *, task_status: TaskStatus[None]) -> None:
        """Router and connections, which end after the last answer: it is decided and recorded as any other."""
        with self._behind:
            async with anyio.create_task_group() as group:
                group.start_soon(self._pool.sweep)
                group.start_soon(self.local.run)
                group.start_soon(self.guard.run)
                await group.start(self.router.run)
                task_status.started()

    def _name(self) -> str:
        """A name for a request that came with none: 128 random bits."""
        if not self._names:
            # Each call of the system costs as much as reading a head.
            drawn = os.urandom(16 * _NAMES).hex()
            self._names = [drawn[at : at + 32] for at in range(0, len(drawn), 32)]
        return self._names.pop()

    def readiness(self) -> Readiness:
        """Whether it can answer: as its router."""
        return self.router.readiness()

    def _observed(self, commit: Commit, time: int) -> None:
        self.guard.observe(commit, time)

    def _completed(self, commit: Commit) -> None:
        """What the log says of requests that have ended, everybody's, and of nodes that are new."""
        now = time.monotonic()
        for event in commit.events:
            if type(event) is RequestCompleted:
                self.breaker.saw(event.node, event.status, now)
            elif type(event) is NodeRegistered:
                self.breaker.forget(event.node)
                self.local.registered(event.models)

    async def _handle(self, exchange: Exchange) -> None:
        request = exchange.request
        path = request.path.decode("latin-1")
        self.measured.open += 1
        try:
            if path in {"/health", "/healthz", "/ping"}:
                self._health(exchange)
                return
            key = None if self.guard.doors is None else self.guard.doors.key_of(request.headers)
            if request.method == b"POST" and path in api.GENERATING:
                await self._generate(exchange, path, key)
            elif request.method == b"POST" and path == "/route":
                self._decide(exchange, key)
            elif request.method == b"GET" and path == "/v1/models":
                exchange.send(200, _JSON, self._models(key))
            elif path.startswith("/v1/") or path in {"/tokenize", "/detokenize"}:
                await self._pass(exchange, path, key)
            else:
                self._fail(
                    exchange,
                    path,
                    404,
                    "not_found",
                    f"there is no {path[:200]} here; OpenAI's endpoints are below /v1/",
                )
        except Unauthorized as error:
            self.measured.unauthorized += 1
            self._refuse(exchange, path, error, "")
        finally:
            self.measured.open -= 1

    async def _generate(self, exchange: Exchange, path: str, key: Key | None) -> None:
        request = exchange.request
        begin = time.perf_counter()
        given = request.header(b"x-request-id").decode("latin-1")
        name = given if usable(given) and (key is None or self._is_free(given)) else self._name()
        header = request.header(b"traceparent")
        traceparent = parse(header.decode("latin-1")) if header else ""
        passage = Passage(name, traceparent, key)
        try:
            timeout = request.header(b"x-request-timeout")
            if not timeout:
                await self._go(exchange, path, passage)
                return
            seconds = seconds_of(timeout)
            with anyio.move_on_after(seconds) as deadline:
                await self._go(exchange, path, passage)
            if deadline.cancelled_caught:
                sentence = f"the request did not end within {seconds:g} s (x-request-timeout)"
                if not exchange.begun:
                    self._fail(exchange, path, 504, "timeout", sentence, name)
                elif passage.way is not None:
                    passage.way.break_off(504, "timeout", sentence)
        except Exception as error:  # noqa: BLE001 - every error is answered
            if passage.way is not None and exchange.begun and not exchange.answered:
                status = errors.status_of(error)
                passage.way.break_off(
                    status, getattr(error, "code", "internal"), str(error) if status != 500 else "a defect"
                )
            else:
                self._refuse(exchange, path, error, name)
        finally:
            seconds = time.perf_counter() - begin
            outcome = passage.way.outcome(exchange.status) if passage.way is not None else None
            self._measure(outcome, passage, seconds)
            if passage.source == LOCAL and outcome is not None:
                self.local.told(passage.model, passage.tokens, outcome.usage.prompt)
            self.access.write(
                exchange, name, passage.model, outcome, traceparent, seconds, tenant=key.name if key is not None else ""
            )

    async def _go(self, exchange: Exchange, path: str, passage: Passage) -> None:
        request = exchange.request
        asked = api.read(path, request.body)
        passage.model = asked.model
        session = sessions.session(request.headers, asked.fields, asked.messages)
        if passage.key is not None:
            # Another tenant's conversation of the same name is another one.
            session = sessions.of_tenant(session, passage.key.name)
            self._enter(passage, passage.key)
        credentials = self.guard.for_prompts(request.headers)
        prompt = await self._prompts.prompt(asked, credentials)
        passage.source, passage.tokens = prompt.source, prompt.tokens
        wanted = question(asked, prompt, session, passage.request, passage.traceparent)
        if passage.visit is not None:
            passage.visit.prompt(prompt.tokens)
            wanted = replace(wanted, tenant=passage.visit.key.name)
        legs = None
        if self.continues and continued(asked) and not unwanted(request.headers):
            legs = Legs(asked, prompt, self.kept, partial(self._prompts.prompt, credentials=credentials))
        way = passage.way = Way(
            exchange, asked, wanted, pool=self._pool,
            route=self._route, record=self._record, record_pending=self.router.record_pending, left_out=self._left_out,
            epoch=self._epoch, places=self.router.places, room=self.router.held.wait,
            leave_room=self.router.held.left, measured=self.measured,
            explain=request.header(b"x-kvplane-explain") == b"1", credentials=self.guard.credentials,
            limits=passage.visit.headers() if passage.visit is not None else None, legs=legs, gives_ids=self._gives_ids,
        )  # fmt: skip
        await way.run()

    def _gives_ids(self, node: str) -> bool:
        """Whether the node's engine tells the token ids of its answer when it is asked to."""
        known = self.router.state.nodes.get(node)
        return known is not None and known.registered.engine.startswith("vllm")

    def _is_free(self, name: str) -> bool:
        return self.guard.doors is None or self.guard.doors.is_free(name)

    def _enter(self, passage: Passage, key: Key) -> None:
        """Let a request in. Raises `Forbidden` or `LimitExceeded`."""
        doors = self.guard.doors
        if doors is None:
            return
        try:
            passage.visit = doors.enter(key, passage.model, passage.request)
        except LimitExceeded:
            self.guard.look_for(key)
            raise

    def _measure(self, outcome: Outcome | None, passage: Passage, seconds: float) -> None:
        ending = outcome.ending.partition(":")[0] if outcome is not None else "refused"
        self.measured.ended(ending, passage.source, seconds)
        doors, key = self.guard.doors, passage.key
        if doors is not None and key is not None:
            used = outcome.usage if outcome is not None else None
            doors.measured.ended(key.name, ending, Tokens(used.prompt, used.cached, used.output) if used else None)
            if passage.visit is not None:
                passage.visit.over(used.output if used else 0)
        if outcome is not None and outcome.node:
            usage = outcome.usage
            self.measured.answered(
                usage.prompt, usage.cached, usage.output, outcome.ttft, outcome.between, outcome.attempts
            )

    def _left_out(self) -> list[str]:
        return self.breaker.left_out(time.monotonic()) if self.breaker.known else []

    def _epoch(self, node: str) -> int:
        known = self.router.state.nodes.get(node)
        return known.epoch if known is not None else 0

    def _route(self, asked: RouteRequest) -> RouteAnswer:
        return self.router.route(asked, asked.traceparent)

    def _record(self, done: CompleteRequest) -> None:
        self.router.record_pending()
        self.router.complete(done, done.traceparent)

    async def _rendered(self, asked: Asked, credentials: bytes) -> Rendered | None:
        return await self._prompts.rendered(asked, credentials)

    def _anyone(self, model: str, tried: frozenset[str]) -> Anyone:
        """An engine of the model that can be asked something; no decision about a request. Raises `NoNode`, `Overloaded`."""
        asked = RouteRequest(model=model, hashes=b"", tokens_count=1, exclude=list(tried), dry_run=True)
        left_out = self._left_out()
        try:
            answer = self.router.route(replace(asked, exclude=[*tried, *left_out]))
        except (NoNode, Overloaded):
            if not left_out:
                raise
            # Better one that may fail than none.
            answer = self.router.route(asked)
        return Anyone(answer.node, answer.address)

    async def _pass(self, exchange: Exchange, path: str, key: Key | None) -> None:
        """An endpoint of the engines' that fills no cache: to one by model and load, without a record."""
        request = exchange.request
        visit: Visit | None = None
        try:
            named = model_of(request.body)
            model = named or self._only_model()
            if key is not None and self.guard.doors is not None:
                check_passing(path, key, named)
                visit = self.guard.doors.enter(key, model, self._name())
            answer = self.router.route(RouteRequest(model=model, hashes=b"", tokens_count=1, dry_run=True))
            where = origin(answer.address)
            lines = forwarded(request.headers, self.guard.credentials)
            head = request_head(where, request.method, request.target, len(request.body), lines)
            call = await self._pool.send(where, head, request.body, patience=_PASSING_SECONDS)
            try:
                headers = [*answered(call.headers), (b"x-kvplane-node", answer.node.encode())]
                exchange.begin(call.status, headers)
                exchange.on_slow, exchange.on_ready = call.pause, call.resume
                call.relay(exchange.write)
                await call.done()
                exchange.end()
            finally:
                call.release()
        except Exception as error:  # noqa: BLE001 - every error is answered
            self._refuse(exchange, path, error, "")
        finally:
            if visit is not None:
                visit.over(0)

    def _decide(self, exchange: Exchange, key: Key | None) -> None:
        """`POST /route`: a decision for those without NATS; as `kv.<fleet>.route`."""
        try:
            asked = decode_request(exchange.request.body, RouteRequest)
            if key is not None and self.guard.doors is not None:
                self.guard.doors.ask(key, asked.model, self._name(), dry_run=asked.dry_run)
                asked = replace(asked, tenant=key.name)
            exchange.send(200, _JSON, encode_answer(self._route(asked), as_json=True))
            self.router.record_pending()
        except Exception as error:  # noqa: BLE001 - every error is answered
            self._refuse(exchange, "/route", error, "")

    def _health(self, exchange: Exchange) -> None:
        ready = self.readiness()
        body = msgspec.json.encode({"ready": not ready.reason, "reason": ready.reason})
        exchange.send(
            200 if not ready.reason else 503,
            _JSON,
            body,
        )

    def _models(self, key: Key | None) -> bytes:
        served: dict[str, int] = {}
        for node in self.router.state.nodes.values():
            for model in node.registered.models:
                if key is not None and not key.may(model):
                    continue
                served[model] = served.get(model, 0) + node.available
        return msgspec.json.encode(
            {
                "object": "list",
                "data": [
                    {"id": model, "object": "model", "created": 0, "owned_by": "kvplane", "nodes": count}
                    for model, count in served.items()
                ],
            }
        )

    def _only_model(self) -> str:
        served = {node.registered.models[0] for node in self.router.state.nodes.values() if node.available}
        if len(served) == 1:
            return served.pop()
        if not served:
            raise NoNode("no node is available; `kvplane node list` shows why")
        raise BadRequest(f"the request names no model, and there are several: {', '.join(sorted(served))[:500]}")

    def _refuse(self, exchange: Exchange, path: str, error: Exception, name: str) -> None:
        status = errors.status_of(error)
        if status >= 500 and not isinstance(error, EngineFailed):
            _log.warning("request_failed", path=path, request=name, error=repr(error), exc_info=status == 500)
        code = getattr(error, "code", "internal")
        sentence = str(error) if status != 500 else f"this is a defect of kvplane: {type(error).__name__}; see its log"
        more = list(getattr(error, "headers", ()))
        if status in {429, 503}:
            more.append((b"retry-after", b"%d" % math.ceil(max(1.0, getattr(error, "retry_after", 0.0)))))
        elif status == 401:
            more.append((b"www-authenticate", b"Bearer"))
        self._fail(exchange, path, status, code, sentence, name, more)

    def _fail(
        self, exchange: Exchange, path: str, status: int, code: str, sentence: str, name: str = "",
        more: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:  # fmt: skip
        if exchange.begun:
            if not exchange.answered:
                exchange.abort()
            return
        headers = [
            *_JSON,
            *([(b"x-request-id", name.encode())] if name else []),
            *more,
        ]
        exchange.send(status, headers, errors.body_of(path, status, code, sentence))


def _refusal(error: BadHttp) -> bytes:
    return errors.body_of("", error.status, error.code, str(error))
