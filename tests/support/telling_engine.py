"""An engine whose answer follows from its prompt, so that it can be told whether another one goes on where it died.

The next token is a hash of all tokens before it. Tokens are pieces of text, some of which are the beginning of others, so that
a text made of them may be cut into tokens in another way than it came about.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio

from tests.support.scripted_engine import EVENTS, MODEL, ScriptedEngine, chunk, read_request, whole

if TYPE_CHECKING:
    from anyio.abc import SocketStream

ROLES = ["<system>", "<user>", "<assistant>", "<end>"]
CLEAR = [*ROLES, *(f"w{number} " for number in range(40)), "ä ", "\n", "€ ", "\U0001f600 "]
"""A text of these is cut into tokens in one way only."""
SINGLE = [*ROLES, *"abcdefgh \n€", *"ijklmnop0123456789w"]
"""Each character is a token."""
UNCLEAR = [*ROLES, *"abcdefgh", "ab", "cd", "efg", "abc", "ä", "\n", " ", "€"]
END = 3


class Vocabulary:
    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self._cut = re.compile(
            "|".join(map(re.escape, sorted(pieces, key=len, reverse=True))) + "|.", re.DOTALL
        ).findall

    def tokens(self, text: str) -> list[int]:
        known = {piece: number for number, piece in enumerate(self.pieces)}
        return [known.get(piece, 1000 + ord(piece[0])) for piece in self._cut(text)]

    def next(self, tokens: list[int], salt: str) -> int:
        drawn = zlib.crc32(repr((tokens, salt)).encode())
        # An end now and then, and never a role.
        return END if drawn % 61 == 0 else len(ROLES) + drawn // 61 % (len(self.pieces) - len(ROLES))


class TellingEngine(ScriptedEngine):
    """`deaths` are shared by all engines of a test: after so many tokens of its answer the next request's engine dies."""

    def __init__(
        self, name: str, vocabulary: Vocabulary, deaths: list[int | None], *, gives_ids: bool, renders: bool
    ) -> None:
        super().__init__(name)
        self.vocabulary, self.deaths, self.renders = vocabulary, deaths, renders
        self.kind = "vllm 0.32.0" if gives_ids else ""
        self.how = "eof"
        """`eof`, `reset`, `silent`, `half` (an event), `error` (an event of its own), or `bare` (without its last event)."""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.interval = 1
        """Tokens a chunk."""
        self.lag = 0
        """Characters by which its text is behind its tokens."""
        self.calls_after: int | None = None
        """Chunks after which it begins to call a tool."""
        self.reasons = 0
        """So many tokens of a chat's answer are its reasoning."""
        self.aliases = ["lora"]

    async def serve(self, stream: SocketStream) -> None:
        async with stream:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                while True:
                    request = await read_request(stream)
                    path = request.split(b" ", 2)[1].decode()
                    body = json.loads(request.partition(b"\r\n\r\n")[2])
                    if path.endswith("/render") or path == "/tokenize":
                        ids = {"token_ids": self.prompt(body)}
                        found = [ids] if path == "/v1/completions/render" else ids
                        await stream.send(
                            whole(json.dumps(found).encode()) if self.renders else whole(b"{}", b"404 No")
                        )
                        continue
                    self.asked.append((path, body))
                    if not await self._stream(stream, path, body):
                        return

    def prompt(self, body: dict[str, Any]) -> list[int]:
        if "prompt" in body:
            return body["prompt"] if isinstance(body["prompt"], list) else self.vocabulary.tokens(body["prompt"])
        text = f"<system>{body['system']}" if body.get("system") else ""
        goes_on = bool(body.get("continue_final_message"))
        told = [f"<{message['role']}>{message['content']}" for message in body["messages"]]
        text += "<end>".join(told) + ("" if goes_on else "<end><assistant>")
        assert goes_on != body.get("add_generation_prompt", True)
        return self.vocabulary.tokens(text)

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[list[tuple[list[int], str]], str, int]:
        """Pieces, each tokens and the text that came with them, the finish reason, and the prompt's length."""
        tokens, stops = self.prompt(body), body.get("stop") or body.get("stop_sequences") or []
        most = body.get("max_completion_tokens") or body.get("max_tokens") or (16 if path == "/v1/completions" else 400)
        hold = max([len(stop) - 1 for stop in stops], default=self.lag)
        begin, text, shown, finish = len(tokens), "", 0, "length"
        pieces: list[tuple[list[int], str]] = []
        new: list[int] = []
        while len(tokens) - begin < most:
            token = self.vocabulary.next(tokens, body["model"])
            tokens.append(token)
            new.append(token)
            least = body.get("min_tokens") or 0
            if token == END and len(tokens) - begin > least:
                finish = "stop"
                break
            text += self.vocabulary.pieces[token] if token != END else ""
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                text, finish = text[: min(found)], "stop"
                break
            if len(new) >= self.interval:
                pieces.append((new, text[shown : max(shown, len(text) - hold)]))
                new, shown = [], max(shown, len(text) - hold)
        pieces.append((new, text[shown:]))
        return pieces, finish, begin

    async def _stream(self, stream: SocketStream, path: str, body: dict[str, Any]) -> bool:
        death = self.deaths.pop(0) if self.deaths else None
        pieces, finish, begin = self._answer(path, body)
        shapes = {"/v1/messages": _Messages, "/v1/chat/completions": _Chat}.get(path, _Shapes)(
            f"{self.name}{len(self.asked)}"
        )
        said = [shapes.head(begin)] if path != "/v1/completions" else []
        made = 0
        for number, (ids, text) in enumerate(pieces):
            made += len(ids)
            last = finish if number == len(pieces) - 1 else None
            shapes.field = "reasoning" if begin + made <= self._thinks_until(body, path) else "content"
            if self.calls_after == number:
                said.append(shapes.call())
            said.append(shapes.piece(text, ids if body.get("return_token_ids") else None, last))
        usage = {"prompt_tokens": begin, "completion_tokens": made, "total_tokens": begin + made}
        usage["prompt_tokens_details"] = {"cached_tokens": begin // 2}  # type: ignore[assignment]
        said.append(shapes.tail(finish, usage, (body.get("stream_options") or {}).get("include_usage")))
        await stream.send(EVENTS)
        if death is None or death >= len(said):
            await stream.send(b"".join(map(chunk, said)) + b"0\r\n\r\n")
            return True
        await stream.send(b"".join(map(chunk, said[:death])))
        await self._die(stream, said[death], shapes)
        return False

    def _thinks_until(self, body: dict[str, Any], path: str) -> int:
        return len(self.prompt(body)) + self.reasons if path == "/v1/chat/completions" else 0

    async def _die(self, stream: SocketStream, would_say: bytes, shapes: _Shapes) -> None:
        match self.how:
            case "half":
                await stream.send(chunk(would_say[: len(would_say) // 2]))
            case "error":
                await stream.send(chunk(shapes.error()))
                await stream.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            case "bare":
                await stream.send(b"0\r\n\r\n")
            case "silent":
                await anyio.sleep_forever()
            case "reset":
                raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _data(body: object) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return f"event: {body['type']}\n".encode() + _data(body)


class _Shapes:
    kind = "text_completion"
    field = "content"

    def __init__(self, id: str) -> None:  # noqa: A002
        # Each engine has names of its own for what it answers.
        self.names = {"id": id, "object": self.kind, "created": zlib.crc32(id.encode()), "model": MODEL}

    def head(self, prompt: int) -> bytes:
        del prompt
        return self._chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, None)

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _chunk(self, choice: dict[str, Any], ids: list[int] | None) -> bytes:
        return _data({**self.names, "choices": [{"index": 0, **choice, "logprobs": None, "token_ids": ids}]})

    def piece(self, text: str, ids: list[int] | None, finish: str | None) -> bytes:
        return self._chunk({**self._said(text), "finish_reason": finish}, ids)

    def call(self) -> bytes:
        raise NotImplementedError

    def error(self) -> bytes:
        return _data({"error": {"message": "EngineCore is dead", "type": "InternalServerError", "code": 500}})

    def tail(self, finish: str, usage: dict[str, Any], wanted: object) -> bytes:
        del finish
        return (_data({**self.names, "choices": [], "usage": usage}) if wanted else b"") + b"data: [DONE]\n\n"


class _Chat(_Shapes):
    kind = "chat.completion.chunk"

    def _said(self, text: str) -> dict[str, Any]:
        return {"delta": {self.field: text}}

    def call(self) -> bytes:
        called = {"index": 0, "id": "c", "type": "function", "function": {"name": "at", "arguments": ""}}
        return self._chunk({"delta": {"tool_calls": [called]}, "finish_reason": None}, None)


class _Messages(_Shapes):
    def head(self, prompt: int) -> bytes:
        message = {"id": self.names["id"], "type": "message", "role": "assistant", "content": [], "model": MODEL}
        start = {"type": "message_start", "message": {**message, "usage": {"input_tokens": prompt, "output_tokens": 0}}}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event(start) + _event(block)

    def piece(self, text: str, ids: list[int] | None, finish: str | None) -> bytes:
        del ids, finish
        return _event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})

    def error(self) -> bytes:
        return _event({"type": "error", "error": {"type": "internal_error", "message": "EngineCore is dead"}})

    def tail(self, finish: str, usage: dict[str, Any], wanted: object) -> bytes:
        del wanted
        why = {"stop_reason": {"stop": "end_turn", "length": "max_tokens"}[finish], "stop_sequence": None}
        counts = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        ends = _event({"type": "message_delta", "delta": why, "usage": counts}) + _event({"type": "message_stop"})
        return _event({"type": "content_block_stop", "index": 0}) + ends
