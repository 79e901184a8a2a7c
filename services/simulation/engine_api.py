"""A simulated node as an engine over HTTP: OpenAI's and Anthropic's endpoints, streams, usage, `/tokenize`.

A token is a byte of the prompt. A chat becomes one by the plainest of templates (`rendered`). What it answers is a sentence of
as many words as tokens were asked for; how long it takes, and what is cached, is the node's (`simnode`).
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from kvplane.events.hashing import block_hashes
from kvplane.services.http.server import Server
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadHttp, BadRequest, ServiceFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplane.services.http.server import Exchange

WORDS = [
    "The",
    "answer",
    "of",
    "a",
    "simulated",
    "node",
    "says",
    "nothing",
    ",",
    "but",
    "it",
    "takes",
    "as",
    "long",
    "as",
    "one",
    "that",
    "does",
    ".",
]
_ANSWERS = "<|assistant|>"
_MOST_SAID = 4_096
DEFAULT_TOKENS = 32
MOST_TOKENS = 100_000
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

Body = dict[str, Any]


def text_of(content: object) -> str:
    """The text of a message's content: a string, or parts of which those with text count."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def rendered(chat: object, system: object = None, tools: object = None) -> str:
    """A chat as one text."""
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise BadRequest("messages must be a list of objects")
    parts = [f"<|tools|>{json.dumps(tools, sort_keys=True)}"] if tools else []
    parts += [f"<|system|>{text_of(system)}"] if system else []
    for message in chat:
        content = text_of(message.get("content")) + (
            json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        )
        parts.append(f"<|{message.get('role', 'user')}|>{message.get('reasoning_content') or ''}{content}")
    return "".join(parts) + _ANSWERS


def prompt_tokens(body: Body) -> list[int]:
    """Token ids of a request's prompt. Raises `BadRequest`."""
    if "messages" in body:
        text = rendered(body["messages"], body.get("system"), body.get("tools"))
        return list((text.removesuffix(_ANSWERS) if body.get("continue_final_message") else text).encode())
    if "input" in body:
        content = body["input"]
        chat = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return list(rendered(chat, body.get("instructions"), body.get("tools")).encode())
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise BadRequest("a prompt is text or a list of token ids; a simulated node answers one at a time")
    return list(prompt.encode())


def said(tokens: list[int]) -> int:
    """How many words of an answer a prompt ends with: one that goes on with an answer has the further ones."""
    text = bytes(token for token in tokens if token < 256) if tokens[-1:] == [32] else b""
    expected, found = b"", 0
    for at in range(_MOST_SAID):
        expected += WORDS[at % len(WORDS)].encode() + b" "
        if len(expected) > len(text):
            break
        if text.endswith(expected):
            found = at + 1
    return found


class Node(Protocol):
    """What is asked of a node."""

    active: int
    waiting: int
    reporting: bool

    @property
    def model(self) -> str:
        """Model that it serves."""

    @property
    def block_size(self) -> int:
        """Tokens a block."""

    async def run_request(
        self, request: messages.ServeRequest, on_token: Callable[[int], None] | None = None
    ) -> messages.ServeAnswer:
        """Run a request."""


class EngineApi:
    """The endpoints of one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.server = Server(self._handle, lambda error: _error(error.status, str(error)))
        self.requests = 0
        self._posts: dict[str, Callable[[Exchange, Body], Any]] = {
            "/v1/chat/completions": self._chat, "/v1/completions": self._completion, "/v1/messages": self._message,
            "/v1/responses": self._response,
        }  # fmt: skip
        self._asks: dict[str, Callable[[Body], object]] = {
            "/tokenize": self._tokenize, "/v1/chat/completions/render": self._render,
            "/v1/completions/render": lambda body: [self._render(body)], "/v1/embeddings": self._embeddings,
            "/v1/messages/render": self._render, "/v1/responses/render": self._render,
            "/v1/messages/count_tokens": lambda body: {"input_tokens": len(prompt_tokens(body))},
            "/detokenize": lambda body: {"prompt": bytes(body.get("tokens", [])).decode("utf-8", "replace")},
        }  # fmt: skip

    async def _handle(self, exchange: Exchange) -> None:
        request = exchange.request
        path = request.path.decode("latin-1")
        try:
            if request.method == b"GET":
                self._get(exchange, path)
            elif path in self._posts or path in self._asks:
                body = json.loads(request.body or b"{}")
                if not isinstance(body, dict):
                    raise BadRequest("the body must be an object")
                self._check_model(body)
                if path in self._asks:
                    exchange.send(200, _JSON, _encoded(self._asks[path](body)))
                else:
                    self.requests += 1
                    await self._posts[path](exchange, body)
            else:
                exchange.send(404, _JSON, _error(404, f"a simulated node has no {path[:100]}"))
        except (ServiceFault, ValueError, TypeError, AttributeError, RecursionError) as error:
            status = error.status if isinstance(error, ServiceFault) else 400
            if not exchange.begun:
                exchange.send(status, _JSON, _error(status, str(error)))
            elif not exchange.answered:
                exchange.abort()

    def _get(self, exchange: Exchange, path: str) -> None:
        if path == "/health":
            exchange.send(200 if self.node.reporting else 503, [], b"")
        elif path == "/v1/models":
            model = {"id": self.node.model, "object": "model", "created": 0, "owned_by": "kvplane"}
            exchange.send(200, _JSON, _encoded({"object": "list", "data": [model]}))
        elif path == "/metrics":
            running, waiting = self.node.active - self.node.waiting, self.node.waiting
            lines = f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n"
            exchange.send(200, [(b"content-type", b"text/plain; version=0.0.4")], lines.encode())
        else:
            exchange.send(404, _JSON, _error(404, f"a simulated node has no {path[:100]}"))

    def _check_model(self, body: Body) -> None:
        model = body.get("model", self.node.model)
        if model != self.node.model:
            raise BadHttp(404, f"the model {str(model)[:100]!r} does not exist; this node serves {self.node.model!r}")

    def _tokenize(self, body: Body) -> object:
        tokens = prompt_tokens(body)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": 1 << 20}

    def _render(self, body: Body) -> Body:
        return {"token_ids": prompt_tokens(body)}

    def _embeddings(self, body: Body) -> object:
        given = body.get("input", "")
        texts = given if isinstance(given, list) and not all(type(each) is int for each in given) else [given]
        data = [
            {"object": "embedding", "index": at, "embedding": [float(len(str(each)))] * 4}
            for at, each in enumerate(texts)
        ]
        return {
            "object": "list",
            "data": data,
            "model": self.node.model,
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }

    async def _run(self, exchange: Exchange, body: Body, on_word: Callable[[str], None] | None) -> tuple[str, Body]:
        """Run a request on the node; its text and its usage in OpenAI's words. `on_word` gets each word."""
        tokens = prompt_tokens(body)
        most = (
            body.get("max_completion_tokens")
            or body.get("max_tokens")
            or body.get("max_output_tokens")
            or DEFAULT_TOKENS
        )
        if type(most) is not int or not 0 < most <= MOST_TOKENS:
            raise BadRequest(f"max_tokens is {most!r}; a simulated node takes 1 to {MOST_TOKENS}")
        salt = body.get("cache_salt")
        hashes = block_hashes(tokens, self.node.block_size, salt=salt if isinstance(salt, str) else "")
        request = messages.ServeRequest(
            request=exchange.request.header(b"x-request-id").decode("latin-1") or uuid4().hex, hashes=hashes,
            tokens=len(tokens), output_tokens=most,
        )  # fmt: skip
        begin = said(tokens)
        words = [WORDS[(begin + at) % len(WORDS)] + " " for at in range(most)]
        served = await self.node.run_request(request, None if on_word is None else lambda at: on_word(words[at]))
        usage = {
            "prompt_tokens": len(tokens), "completion_tokens": most, "total_tokens": len(tokens) + most,
            "prompt_tokens_details": {"cached_tokens": served.cached_tokens},
        }  # fmt: skip
        return "".join(words), usage

    async def _chat(self, exchange: Exchange, body: Body) -> None:
        about = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": self.node.model}

        def chunk(delta: Body, finish: str | None = None) -> Body:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return {**about, "object": "chat.completion.chunk", "choices": [choice]}

        if body.get("stream"):
            await self._streamed(exchange, body, about, "chat.completion.chunk", chunk({"role": "assistant", "content": ""}),
                                 lambda word: chunk({"content": word}), chunk({}, "stop"))  # fmt: skip
            return
        text, usage = await self._run(exchange, body, None)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        exchange.send(200, _JSON, _encoded({**about, "object": "chat.completion", "choices": [choice], "usage": usage}))

    async def _completion(self, exchange: Exchange, body: Body) -> None:
        about = {"id": f"cmpl-{uuid4().hex}", "created": int(time.time()), "model": self.node.model}

        def chunk(text: str, finish: str | None = None) -> Body:
            choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
            return {**about, "object": "text_completion", "choices": [choice]}

        if body.get("stream"):
            await self._streamed(exchange, body, about, "text_completion", None, chunk, chunk("", "stop"))
            return
        text, usage = await self._run(exchange, body, None)
        exchange.send(200, _JSON, _encoded({**chunk(text, "stop"), "usage": usage}))

    async def _streamed(
        self,
        exchange: Exchange,
        body: Body,
        about: Body,
        kind: str,
        first: Body | None,
        word: Callable[[str], Body],
        last: Body,
    ) -> None:
        begun = False

        def on_word(text: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                exchange.begin(200, _EVENTS)
                if first is not None:
                    exchange.write(_event(first))
            exchange.write(_event(word(text)))

        _, usage = await self._run(exchange, body, on_word)
        exchange.write(_event(last))
        if (body.get("stream_options") or {}).get("include_usage"):
            exchange.write(_event({**about, "object": kind, "choices": [], "usage": usage}))
        exchange.write(b"data: [DONE]\n\n")
        exchange.end()

    async def _message(self, exchange: Exchange, body: Body) -> None:
        about = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": self.node.model}
        begun = False

        def send(kind: str, **fields: Any) -> None:  # noqa: ANN401 - fields of an event
            exchange.write(b"event: %b\n" % kind.encode() + _event({"type": kind, **fields}))

        def on_word(piece: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                exchange.begin(200, _EVENTS)
                start = {"input_tokens": len(prompt_tokens(body)), "output_tokens": 0}
                send(
                    "message_start",
                    message={**about, "content": [], "stop_reason": None, "stop_sequence": None, "usage": start},
                )
                send("content_block_start", index=0, content_block={"type": "text", "text": ""})
            send("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})

        streams = bool(body.get("stream"))
        text, usage = await self._run(exchange, body, on_word if streams else None)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counted = {
            "input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0, "output_tokens": usage["completion_tokens"],
        }  # fmt: skip
        if streams:
            send("content_block_stop", index=0)
            send("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=counted)
            send("message_stop")
            exchange.end()
            return
        content = [{"type": "text", "text": text}]
        exchange.send(
            200,
            _JSON,
            _encoded({**about, "content": content, "stop_reason": "end_turn", "stop_sequence": None, "usage": counted}),
        )

    async def _response(self, exchange: Exchange, body: Body) -> None:
        if body.get("stream"):
            raise BadRequest("a simulated node streams no responses; ask without stream, or /v1/chat/completions")
        text, usage = await self._run(exchange, body, None)
        content = {"type": "output_text", "text": text, "annotations": []}
        output = {
            "type": "message",
            "id": f"msg_{uuid4().hex}",
            "role": "assistant",
            "status": "completed",
            "content": [content],
        }
        counted = {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }  # fmt: skip
        answer = {
            "id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()), "status": "completed",
            "model": self.node.model, "output": [output], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
            "usage": counted,
        }  # fmt: skip
        exchange.send(200, _JSON, _encoded(answer))


def _encoded(answer: object) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def _event(data: object) -> bytes:
    return b"data: " + _encoded(data) + b"\n\n"


def _error(status: int, sentence: str) -> bytes:
    return _encoded(
        {
            "error": {
                "message": sentence,
                "type": "invalid_request_error" if status < 500 else "api_error",
                "param": None,
                "code": status,
            }
        }
    )
