"""Sending requests as a gateway does: ask a router, send to the node, and go elsewhere when that fails."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
from msgspec import Struct

from kvplane.events.subjects import token
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoAnswer, Refused, StepFailed
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

    from kvplane.services.simulation.trace import Work

PATIENCE_SECONDS = 60.0
"""After this long without success a request counts as failed."""
SERVE_SECONDS = 4.0
"""How long a node may take before the request goes elsewhere."""
PAUSE_SECONDS = 0.05


class Totals(Struct):
    """What came of the requests."""

    requests: int = 0
    exact: int = 0
    prefix: int = 0
    miss: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    retries: int = 0
    failed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that nodes found cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Traffic:
    """Requests to one fleet and model."""

    def __init__(self, client: Client, fleet: str, model: str) -> None:
        self.client = client
        self.fleet = fleet
        self.model = model
        self.totals = Totals()

    async def route(self, work: Work, **options: object) -> messages.RouteAnswer:
        """Ask a router once."""
        request = messages.RouteRequest(
            model=self.model, hashes=work.hashes, tokens_count=work.tokens, session=work.session,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        return await ask(self.client, f"kv.{self.fleet}.route", request, messages.RouteAnswer, seconds=2)

    async def serve(self, answer: messages.RouteAnswer, work: Work) -> messages.ServeAnswer:
        """Send a request to the node that was chosen."""
        request = messages.ServeRequest(
            request=answer.request, hashes=work.hashes, tokens=work.tokens, output_tokens=work.output_tokens
        )
        serve = f"kv.{self.fleet}.serve.{token(answer.node)}"
        return await ask(self.client, serve, request, messages.ServeAnswer, seconds=SERVE_SECONDS)

    async def send(self, work: Work) -> tuple[messages.RouteAnswer, messages.ServeAnswer]:
        """Route and serve one request, again and elsewhere until it succeeds. Raises `StepFailed` when it never does."""
        identity = uuid4().hex
        exclude: list[str] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                answer = await self.route(work, request=identity, exclude=exclude)
            except (NoAnswer, Refused):
                # No router, or no node with room: neither lasts.
                exclude.clear()
                self.totals.retries += 1
                await anyio.sleep(PAUSE_SECONDS)
                continue
            try:
                served = await self.serve(answer, work)
            except (NoAnswer, Refused):
                exclude.append(answer.node)
                self.totals.retries += 1
            else:
                self._count(answer, served, work)
                return answer, served
        self.totals.failed += 1
        raise StepFailed(f"a request of {work.tokens} tokens did not succeed in {PATIENCE_SECONDS:g} s")

    def _count(self, answer: messages.RouteAnswer, served: messages.ServeAnswer, work: Work) -> None:
        totals = self.totals
        totals.requests += 1
        setattr(totals, answer.kind, getattr(totals, answer.kind) + 1)
        totals.prompt_tokens += work.tokens
        totals.cached_tokens += served.cached_tokens
        totals.predicted_tokens += answer.matched_tokens

    async def run(self, work: list[Work], *, concurrency: int, progress: Callable[[], None]) -> None:
        """Send all, in order, a bounded number at once. The turns of a session never overlap."""
        room = anyio.Semaphore(concurrency)
        turns: dict[str, anyio.Lock] = {}

        async def one(request: Work) -> None:
            try:
                if request.session:
                    async with turns.setdefault(request.session, anyio.Lock()):
                        await self.send(request)
                else:
                    await self.send(request)
            finally:
                room.release()
            progress()

        async with anyio.create_task_group() as group:
            for request in work:
                await room.acquire()
                group.start_soon(one, request)
