"""The part of a fake engine that completes: tokens are bytes, the answer is made of the prompt, hits are the cache's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
from aiohttp import web

if TYPE_CHECKING:
    from tests.support.fake_engine import FakeEngine


class FakeApi:
    """`/tokenize` and the completions of one engine, and what goes wrong with them."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.tokenizes = True
        self.renders = False
        """It has `/render`, which knows of messages' reasoning, as its own completions do and `/tokenize` does not."""
        self.without_render = 404
        self.rendered = 0
        self.reports_cached = True
        self.reports_zero_cached = True
        """It says so when it found nothing."""
        self.answers_tokens: Any = None
        """What `/tokenize` answers instead of tokens."""
        self.says: list[Any] = []
        """Chunks that come before all others."""
        self.status = 200
        self.breaks_after: int | None = None
        """Chunks after which the connection ends."""
        self.lingers = 0.0
        """Seconds for which an answer stays open after its last chunk."""
        self.moved_to = ""
        """Where it sends its clients."""
        self.streams = True
        """Completions come in chunks."""
        self.truncates = False
        """It leaves out the beginning of a prompt, when the request says so."""
        self.hangs = False
        """It takes requests and never answers."""
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        """Bodies and headers that came."""

    def route(self, app: web.Application) -> None:
        app.router.add_post("/tokenize", self._tokenize)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(f"{path}/render", self._render)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)

    def _tokens(self, body: dict[str, Any], settings: dict[str, Any], *, reasons: bool = True) -> list[int]:
        prompt = body.get("prompt")
        messages = body.get("messages") or []
        reasoning = {at: each.get("reasoning_content") or "" for at, each in enumerate(messages) if reasons}
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return list(b"^" * body.get("add_special_tokens", True) + prompt.encode())
        conversation = "".join(
            f"<{message['role']}>{reasoning.get(number, '')}{message['content']}"
            for number, message in enumerate(body["messages"])
        )
        tail = "<assistant>" if body.get("add_generation_prompt", True) else ""
        given = {name: value for name, value in settings.items() if value is not None}
        return list(f"{json.dumps(body.get('tools'))}{json.dumps(given, sort_keys=True)}{conversation}{tail}".encode())

    async def _tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            return web.Response(status=404)
        if self.answers_tokens == "never":
            await anyio.sleep_forever()
        if self.answers_tokens is not None:
            return web.json_response(self.answers_tokens)
        body = await request.json()
        return web.json_response({"tokens": self._tokens(body, body.get("chat_template_kwargs") or {}, reasons=False)})

    async def _render(self, request: web.Request) -> web.Response:
        if not self.renders:
            return web.Response(status=self.without_render)
        self.rendered += 1
        body = await request.json()
        answer = {"token_ids": self._tokens(body, self._settings(body))}
        return web.json_response(answer if "messages" in body else [answer])

    @staticmethod
    def _settings(body: dict[str, Any]) -> dict[str, Any]:
        settings = {name: body.get(name) for name in ("reasoning_effort", "documents")}
        if body.get("reasoning_effort") is not None:
            settings["enable_thinking"] = body["reasoning_effort"] != "none"
        return {**settings, **(body.get("chat_template_kwargs") or {})}

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((body, dict(request.headers)))
        if self.hangs:
            await anyio.sleep_forever()
        if self.moved_to:
            return web.Response(status=307, headers={"Location": self.moved_to})
        if not self.streams:
            return web.json_response({"choices": [{"text": "one two three"}]})
        if self.status != 200:
            return web.json_response({"error": {"message": f"no, {self.status}"}}, status=self.status)
        tokens = self._tokens(body, self._settings(body))
        most = body.get("truncate_prompt_tokens") or 0
        if self.truncates and most > 0:
            tokens = tokens[-most:]
        adapter = (
            body["model"] if any(one["id"] == body["model"] and one["parent"] for one in self.engine.models) else ""
        )
        cached = self.engine.cache.request(tokens, adapter, body.get("cache_salt") or "")
        await self.engine.publish()
        words = ["one ", "two ", "three"][: body.get("max_tokens") or 3]
        usage: dict[str, Any] = {"prompt_tokens": len(tokens), "completion_tokens": len(words)}
        if self.reports_cached and (cached or self.reports_zero_cached):
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        chat = "messages" in body
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        ] * chat
        chunks += [
            {"choices": [{"index": 0, **({"delta": {"content": word}} if chat else {"text": word})}]} for word in words
        ]
        chunks = [*self.says, *chunks, {"choices": [], "usage": usage}]
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for number, chunk in enumerate(chunks):
            if number == self.breaks_after and request.transport is not None:
                request.transport.close()
                return answer
            await answer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        await anyio.sleep(self.lingers)
        return answer
