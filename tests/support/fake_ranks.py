"""An engine of several data-parallel ranks: each publishes by itself, and the first one answers HTTP for all."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from aiohttp import web

from tests.support.fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


class Rank(FakeEngine):
    """One rank."""

    def __init__(self, others: list[Rank], **options: Any) -> None:
        super().__init__(rank=len(others), **options)
        self.all = others
        others.append(self)

    def _pages(self) -> web.Application:
        app = super()._pages()

        @web.middleware
        async def sources(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            if request.path != "/kv_event_sources":
                return await handler(request)
            endpoints = {
                str(number): {"publisher": "zmq", "endpoint": rank.endpoint, "replay_endpoint": rank.replay_endpoint}
                for number, rank in enumerate(self.all)
            }
            return web.Response(text=json.dumps(endpoints))

        app.middlewares.append(sources)
        return app


@asynccontextmanager
async def ranks(count: int, **options: Any) -> AsyncIterator[list[Rank]]:
    """So many ranks of one engine, running."""
    made: list[Rank] = []
    for _ in range(count):
        Rank(made, **options)
    async with anyio.create_task_group() as tasks:
        for rank in made:
            await rank.start(tasks)
        yield made
        tasks.cancel_scope.cancel()
