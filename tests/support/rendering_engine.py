"""An engine that renders prompts by a model's folder, counts them, and answers with one word."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

from kvplane.services.protocol.messages import RegisterRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.fleet import Fleet
    from tests.support.reference_tokens import Reference

MODEL = "m"
BLOCK = 4


class RenderingEngine:
    """One engine. `files` may be changed while it runs, as if it had been started anew with others."""

    def __init__(self, files: Reference) -> None:
        self.files = files
        self.renders = True
        self.fails = False
        """Its rendering ends in an error."""
        self.models = [MODEL]
        self.counts = True
        """It says how many tokens a prompt has."""
        self.rendered: list[dict[str, Any]] = []
        self.port = 0

    async def _render(self, request: web.Request) -> web.Response:
        if not self.renders or self.fails:
            return web.Response(status=500 if self.fails else 404)
        body = await request.json()
        self.rendered.append(body)
        answer = {"token_ids": self.files.ids(body)}
        return web.json_response(answer if "messages" in body else [answer])

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        answer: dict[str, Any] = {
            "id": "x", "object": "chat.completion", "created": 1, "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "so"}, "finish_reason": "stop"}],
        }  # fmt: skip
        if self.counts:
            answer["usage"] = {"prompt_tokens": len(self.files.ids(body)), "completion_tokens": 1}
        return web.json_response(text=json.dumps(answer))

    async def register(self, fleet: Fleet, *, replace: bool = False) -> None:
        await fleet.ask(
            "coordinator.node.register",
            RegisterRequest(
                node="a", address=f"http://127.0.0.1:{self.port}", models=self.models, block_size=BLOCK,
                capacity_blocks={"gpu": 100_000}, replace=replace,
            ),
        )  # fmt: skip

    @asynccontextmanager
    async def running(self, fleet: Fleet) -> AsyncIterator[None]:
        app = web.Application(client_max_size=64 << 20)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._complete)
            app.router.add_post(f"{path}/render", self._render)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = runner.addresses[0][1]
            await self.register(fleet)
            yield
        finally:
            await runner.cleanup()
