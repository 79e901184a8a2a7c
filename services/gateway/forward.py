"""A request's way through the gateway: decide, send, pass the answer on, record.

Each attempt is a decision of its own and ends with a completion of its own. Until the client has seen a byte, the next
candidate is tried; after that a stream is gone on with elsewhere (`legs`) where that is exact, else it ends with an error
event, and any other answer with a broken connection: never silently. When the client leaves, its handler is cancelled, which
closes the engine's connection, and the attempt is recorded as `cancelled`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import structlog
from msgspec.structs import replace

from kvplane.events.errors import KvplaneError
from kvplane.services.dataplane import prompts
from kvplane.services.dataplane.endings import CANCELLED, FAILED, LONGEST, REFUSED
from kvplane.services.gateway import api, errors
from kvplane.services.gateway.headers import answered, forwarded
from kvplane.services.gateway.legs import Ending, Leg
from kvplane.services.gateway.outcome import Outcome
from kvplane.services.gateway.usage import ANSWER_BYTES, Events, Usage, in_answer
from kvplane.services.http.pool import origin, request_head
from kvplane.services.protocol.errors import EngineFailed, NoNode, Overloaded
from kvplane.services.protocol.messages import CompleteRequest, RouteAnswer, RouteRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvplane.services.dataplane.measured import Measured
    from kvplane.services.gateway.api import Asked
    from kvplane.services.gateway.legs import Legs
    from kvplane.services.gateway.prompt import Prompt
    from kvplane.services.gateway.transcript import Transcript
    from kvplane.services.http.pool import Call, Pool
    from kvplane.services.http.reader import Headers
    from kvplane.services.http.server import Exchange
    from kvplane.services.roles.places import Places

ATTEMPTS = 3
SILENT_SECONDS = 30.0
"""So long a request that is held says nothing to its client: what stands between waits a minute for the head of an answer."""
ALIVE_SECONDS = 10.0
"""So often a stream says then that it is alive, by a comment, which clients of such streams ignore."""
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
PLACE_SECONDS = 10.0
"""So long a request waits for a place on a node before it is refused; one that would have to wait longer is refused at once."""
FIRST_BYTE_SECONDS = 600.0
"""How long an engine may be silent before its answer: requests wait there for their turn."""
IDLE_SECONDS = 120.0
"""How long it may be silent inside an answer."""
_BUSY = {408, 425, 429}
"""Statuses of an engine that another one need not share."""
_log = structlog.get_logger("kvplane.gateway")


class _LegRefused(EngineFailed):
    """An engine would not go on with a stream, which is no fault of it."""


class Way:
    """One request on its way. `route` decides and `record` writes to the log."""

    def __init__(
        self, exchange: Exchange, asked: Asked, question: RouteRequest, *, pool: Pool,
        route: Callable[[RouteRequest], RouteAnswer], record: Callable[[CompleteRequest], None],
        record_pending: Callable[[], None], left_out: Callable[[], list[str]], epoch: Callable[[str], int],
        places: Places, room: Callable[[str, str, float], Awaitable[None]],
        leave_room: Callable[[str], None], measured: Measured, attempts: int = ATTEMPTS, explain: bool = False,
        credentials: bytes | None = None, limits: Headers | None = None,
        legs: Legs | None = None, gives_ids: Callable[[str], bool] = lambda _: False,
    ) -> None:  # fmt: skip
        self.exchange = exchange
        self.asked = asked
        self.question = question
        self._pool = pool
        self._route, self._record, self._record_pending, self._left_out = route, record, record_pending, left_out
        self._epoch = epoch
        self._places = places
        self._wait_for_room, self._leave_room = room, leave_room
        self._legs, self._gives_ids = legs, gives_ids
        self._target, self._body = exchange.request.target, asked.body
        self._passed = False
        """The client has something of an engine's answer."""
        self._first_ttft = 0.0
        self.held = 0.0
        """Seconds that it waited for room."""
        self.kept_alive = False
        """Whether its stream began before there was an answer."""
        self._spoke = -ALIVE_SECONDS
        self._measured = measured
        self._queued = False
        self._attempts = attempts
        self._explain = explain
        self._usage = Usage()
        self._first = 0.0
        self._pieces = 0
        self._begin = 0.0
        self._headers = forwarded(exchange.request.headers, credentials)
        self._limits = limits
        """Headers of the answer that say what the tenant has left."""
        self.tries = 0
        self.decision: RouteAnswer | None = None
        self.ttft = 0.0
        self.ending = "refused"

    async def run(self) -> None:
        """Go until the answer is sent. Raises what is answered to the client as an error: nothing has been sent then."""
        try:
            await self._run()
        finally:
            if self._legs is not None:
                self._legs.transcript.forget()

    async def _run(self) -> None:
        tried: dict[str, int] = {}
        failed: list[str] = []
        while True:
            try:
                # One that has come back meanwhile is another one.
                left_out = [node for node, epoch in tried.items() if self._epoch(node) == epoch]
                decision = await self._place(left_out, failed)
            except KvplaneError as error:
                if not self._passed:
                    raise
                self._measured.leg("no_node")
                self.ending = f"{FAILED}{error}"[:LONGEST]
                self._give_up(f"its engine broke off, and no other goes on with the stream: {error}")
                return
            epoch = self._epoch(decision.node)
            self.decision = decision
            self.tries += 1
            try:
                await self._attempt(decision)
            except EngineFailed as error:
                failed.append(f"{decision.node}: {error}")
                tried[decision.node] = epoch
                if self.exchange.begun and (self._passed or not self.kept_alive):
                    if not await self._next_leg(error):
                        return
                    continue
                if self.tries >= self._attempts:
                    raise EngineFailed(f"no engine answered the request ({'; '.join(failed)})") from None
                _log.warning("engine_failed", node=decision.node, request=self.question.request, error=str(error))
            else:
                return

    async def _next_leg(self, error: EngineFailed) -> bool:
        """Make the next attempt one that goes on with the stream; else end it, and say so."""
        step = None
        legs, self._passed = self._legs, True
        if legs is not None:
            if legs.number:
                self._measured.leg("failed")
            # Until there is another engine, it is the client's leaving that can end it.
            broke, self.ending = self.ending, CANCELLED
            step = await legs.next(self.question)
            self.ending = broke
        if isinstance(step, Leg):
            self.ending = CANCELLED
            self._target, self._body, self.question = step
            _log.warning("stream_continued", request=self.question.request, leg=self.question.leg, error=str(error))
            return True
        if isinstance(step, Ending):
            self._measured.leg("ended")
            self.ending = "ok"
            self.exchange.write(step.events)
            self.exchange.end()
            return False
        self._measured.leg("not_continued")
        self._give_up(f"the engine broke off: {error}" + (f"; the stream is not continued: {step.why}" if step else ""))
        return False

    def _give_up(self, sentence: str) -> None:
        words = self._legs.transcript.last_words if self._legs is not None else b""
        if words:
            # It is the engine that says so.
            self.exchange.write(words)
            self.exchange.end()
        else:
            self.break_off(502, "engine_failed", sentence)

    async def _place(self, exclude: list[str], failed: list[str]) -> RouteAnswer:
        """Decide. That all places are taken is believed after a while only.

        Who asks again at once had its answer just now, and the log says a little later that its place is free.
        """
        places, model = self._places, self.question.model
        while True:
            # Who comes has no place before those who wait.
            if not places.waits_for(model):
                with suppress(Overloaded):
                    return await self._room(exclude, failed)
            decision = await self._in_turn(exclude, failed)
            if decision.held is None:
                return decision
            # It waits for room outside of the queue, and for a place once more if there is none then.
            with suppress(Overloaded):
                return await self._room(exclude, failed)

    async def _in_turn(self, exclude: list[str], failed: list[str]) -> RouteAnswer:
        """Decide when it is its turn. Raises `Overloaded` when that takes too long."""
        places, model, tenant = self._places, self.question.model, self.question.tenant
        if places.expected(model, tenant) <= PLACE_SECONDS:
            with anyio.move_on_after(PLACE_SECONDS):
                urgency, size = api.priority(self.asked.fields), len(self.asked.body)
                with places.turn(model, tenant, urgency, size) as turn:
                    while True:
                        await turn.mine()
                        with suppress(Overloaded):
                            return self._decide(exclude, failed)
        if not places.waits_for(model):
            return self._decide(exclude, failed)
        raise places.told(
            Overloaded(f"every node of model {model[:80]!r} runs as many requests as it may (max_active), and others wait"),
            model, tenant,
        )  # fmt: skip

    async def _room(self, exclude: list[str], failed: list[str]) -> RouteAnswer:
        """Decide, as soon as the fleet has room for the conversation."""
        decision = self._decide(exclude, failed)
        if decision.held is None:
            return decision
        begin = time.perf_counter()
        request, held = decision.request, decision.held
        try:
            while True:
                until = self._say_something(time.perf_counter() - begin)
                await self._wait_for_room(request, self.question.model, min(held.ask_again, until))
                decision = self._decide(exclude, failed)
                if decision.held is None:
                    return decision
                held = decision.held
        except BaseException:
            # The client has left, or is refused: others are next.
            self._leave_room(request)
            raise
        finally:
            self.held += time.perf_counter() - begin

    def _say_something(self, waited: float) -> float:
        """Keep the connection of a stream alive that says nothing yet; seconds until that is due again.

        A short wait says nothing: until then an error still has a status of its own.
        """
        if waited < SILENT_SECONDS:
            return SILENT_SECONDS - waited
        exchange = self.exchange
        if self.asked.fields.stream is True:
            if not exchange.begun:
                exchange.begin(200, [*_STREAM, (b"x-request-id", self.question.request.encode())])
                self.kept_alive = True
            if waited >= self._spoke + ALIVE_SECONDS:
                self._spoke = waited
                exchange.write(b": waiting for room\n\n")
        return ALIVE_SECONDS

    def _decide(self, exclude: list[str], failed: list[str]) -> RouteAnswer:
        question = self.question
        if failed:
            # Only the id, and who is left out, differ from try to try.
            origin = question.request
            question = replace(question, request=f"{origin}.{len(failed)}", exclude=exclude, origin=origin)
        left_out = self._left_out()
        if left_out:
            try:
                return self._route(replace(question, exclude=[*exclude, *left_out]))
            except (NoNode, Overloaded):
                # Better one that may fail than none.
                pass
        try:
            return self._route(question)
        except KvplaneError:
            if failed:
                raise EngineFailed(f"no engine answered the request ({'; '.join(failed)})") from None
            raise

    async def _attempt(self, decision: RouteAnswer) -> None:
        self._begin = time.perf_counter()
        self._first, self._pieces = 0.0, 0
        self._usage = Usage()
        status = CANCELLED
        call: Call | None = None
        self._queued = True
        self._measured.queued += 1
        try:
            where = origin(decision.address)
            own = self._headers + self._own(decision)
            body = self._body
            if self._legs is not None and body is self.asked.body:
                body = self._legs.first(gives_ids=self._gives_ids(decision.node))
            head = request_head(where, b"POST", self._target, len(body), own)
            call = await self._pool.send(where, head, body, patience=FIRST_BYTE_SECONDS, sent=self._record_pending)
            if call.status >= 500 or call.status in _BUSY:
                said = (await call.read(1 << 16))[:300].decode("utf-8", "replace")
                raise EngineFailed(f"it answers {call.status}: {said}")  # noqa: TRY301 - recorded below
            told = await self._answer(call, decision)
            status = "ok" if call.status < 400 else f"{REFUSED}{call.status}"
            if self._legs is not None and self._legs.number:
                self._measured.leg("ok")
            if told:
                status = f"{FAILED}its stream says: {told}"[:LONGEST]
        except EngineFailed as error:
            status = f"{REFUSED}{error}" if isinstance(error, _LegRefused) else f"{FAILED}{error}"
            status = status[:LONGEST]
            raise
        finally:
            self._leave_queue()
            if call is not None:
                call.release()
            self.ending = status
            self._complete(decision, status)

    def _leave_queue(self) -> None:
        if self._queued:
            self._queued = False
            self._measured.queued -= 1

    def _own(self, decision: RouteAnswer) -> bytes:
        own = b"x-request-id: %b\r\n" % self.question.request.encode()
        if decision.rank:
            own += b"x-data-parallel-rank: %b\r\n" % decision.rank.encode()
        if self.question.traceparent:
            own += b"traceparent: %b\r\n" % self.question.traceparent.encode()
        return own

    async def _answer(self, call: Call, decision: RouteAnswer) -> str:
        """Pass the answer on; what an event of its stream says that went wrong."""
        exchange = self.exchange
        headers, streams = self._answered(call.headers, decision)
        if self._passed and not (streams and call.status < 400):
            if self._legs is not None:
                self._legs.refused()
            body = await call.read(1 << 16)
            raise _LegRefused(f"it answers {call.status}: {body[:300].decode('utf-8', 'replace')}")
        if self.kept_alive and not streams:
            # The head has gone: an error comes as the stream's only event.
            body = await call.read(1 << 16)
            self._leave_queue()
            self.break_off(call.status, "engine_refused", body[:2000].decode("utf-8", "replace"))
            return ""
        if not streams:
            body = await call.read(ANSWER_BYTES)
            self._first = time.perf_counter()
            self._leave_queue()
            self._usage = in_answer(body)
            exchange.send(call.status, headers, body)
            return ""
        events: Events | Transcript = Events(strip=self.asked.adds_usage)
        if self._legs is not None and call.status < 400:
            events = self._legs.transcript
        call.patient(IDLE_SECONDS)
        exchange.on_slow, exchange.on_ready = call.pause, call.resume
        if exchange.slow:
            call.pause()
        if not exchange.begun:
            exchange.begin(call.status, headers)

        def passed(data: bytes) -> None:
            if not self._first:
                self._first = time.perf_counter()
                self._leave_queue()
            self._pieces += 1
            shown = events.feed(data)
            if shown:
                self._passed = True
                exchange.write(shown)

        try:
            call.relay(passed)
            await call.done()
            if events.broken:
                raise EngineFailed(f"its stream says: {events.broken}")
            exchange.write(events.close())
            if call.status < 400 and not events.whole and not events.error:
                raise EngineFailed("its stream ended without its last event")
        finally:
            self._usage = events.counted
        exchange.end()
        return events.error

    def _answered(self, headers: Headers, decision: RouteAnswer) -> tuple[Headers, bool]:
        """Headers of the client's answer, and whether it is a stream of events."""
        kept = answered(headers)
        streams = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in kept)
        kept += [
            (b"x-request-id", self.question.request.encode()), (b"x-kvplane-node", decision.node.encode()),
            (b"x-kvplane-match", b"%d/%d" % (decision.matched_tokens, decision.tokens)),
        ]  # fmt: skip
        if self._limits:
            kept += self._limits
        if self.question.traceparent:
            kept.append((b"traceparent", self.question.traceparent.encode()))
        if self._explain:
            kept.append((b"x-kvplane-decision", api.shown(decision)))
        return kept, streams

    def break_off(self, status: int, code: str, sentence: str) -> None:
        """End an answer that has begun with an event that says why."""
        if not self.exchange.gone and not self.exchange.answered:
            self.exchange.write(errors.event_of(self.asked.path, status, code, sentence))
            self.exchange.end()

    def _complete(self, decision: RouteAnswer, status: str) -> None:
        usage, now = self._usage, time.perf_counter()
        self.ttft = self._first - self._begin if self._first else 0.0
        self._first_ttft = self._first_ttft or self.ttft
        counted = usage.cached >= 0
        self._record(
            CompleteRequest(
                request=decision.request, node=decision.node, status=status,
                # A prompt of which nobody knows how much was cached would count as one without any hit.
                prompt_tokens=max(0, usage.prompt) if counted else 0, cached_tokens=max(0, usage.cached),
                output_tokens=max(0, usage.output), ttft=self.ttft, duration=now - self._begin,
                traceparent=self.question.traceparent,
            )
        )  # fmt: skip

    def _between(self) -> float:
        return (time.perf_counter() - self._first) / (self._pieces - 1) if self._pieces > 1 else 0.0

    def outcome(self, status: int) -> Outcome:
        """What became of it."""
        decision, usage = self.decision, self._usage
        if self._legs is not None and self._legs.number:
            usage = self._legs.transcript.overall()
        return Outcome(
            decision.node if decision else "", status, self.ending, decision.matched_blocks if decision else 0,
            decision.blocks if decision else 0, usage, self._first_ttft, self._between(),
            time.perf_counter() - self._begin if self._begin else 0.0, self.tries, self.held,
        )  # fmt: skip


def question(asked: Asked, prompt: Prompt, session: str, request: str, traceparent: str) -> RouteRequest:
    """What is asked of the router."""
    return prompts.query(
        asked.model, prompt.ids, prompt.tokens, session=session, salt=api.salt(asked.fields), request=request,
        traceparent=traceparent, hashes=prompt.hashes,
    )  # fmt: skip
