"""Requests and answers of engines as they travel over HTTP: OpenAI's completions and chat completions, always streamed.

What an engine makes of a prompt is asked of the engine itself (`/tokenize`, which applies the model's chat template), so that
the hashes of a request are those of the blocks that the engine will name.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from kvplane.services.protocol.errors import BadRequest, EngineFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

Body = dict[str, Any]
"""A request as it is sent to an engine, or a chunk of its answer."""

_MOST_TOKEN = (1 << 32) - 1
_MOST_COUNT = 1 << 53
_MOST_CHOICES = 1024
MOST_LINE_BYTES = 16 << 20
"""One event of an answer is not longer; an engine sends a token or a few in each."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_OF_TEMPLATE = (
    "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "add_special_tokens",
    "mm_processor_kwargs", "media_io_kwargs",
)  # fmt: skip


class Usage(Struct, frozen=True):
    """Tokens of a request as its engine counted them."""

    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt's, found cached; none where the engine does not say."""
    output_tokens: int = 0


def _is_token(token: object) -> bool:
    return type(token) is int and 0 <= token <= _MOST_TOKEN


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST_COUNT else None


def path(body: Body) -> str:
    """Endpoint that a request is for, by what it holds. Raises `BadRequest`."""
    if ("messages" in body) == ("prompt" in body):
        raise BadRequest("a request has either messages (for a chat) or prompt (text or token ids)")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise BadRequest("a request names its model")
    for name in ("stream_options", "chat_template_kwargs"):
        if not isinstance(body.get(name) or {}, dict):
            raise BadRequest(f"{name} of a request is an object")
    return CHAT if "messages" in body else COMPLETIONS


def tokens(body: Body) -> list[int] | None:
    """Token ids of a prompt that is given as such; none for text and messages. Raises `BadRequest`."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list):
        if "prompt" in body and not isinstance(prompt, str):
            raise BadRequest("a prompt is text or a list of token ids")
        return None
    if not prompt or not all(map(_is_token, prompt)):
        raise BadRequest(
            "a prompt of token ids is a list of numbers, and of one prompt: send each of several by itself"
        )
    return prompt


def question(body: Body) -> Body:
    """What to ask `/tokenize` for a request's token ids: what its tokens depend on, as vLLM 0.32 puts it together."""
    if "prompt" in body:
        return {name: body[name] for name in ("model", "prompt", "add_special_tokens") if name in body}
    asked = {name: body[name] for name in ("model", *_OF_TEMPLATE) if name in body}
    settings = {name: body[name] for name in ("documents", "reasoning_effort") if body.get(name) is not None}
    given = body.get("chat_template_kwargs") or {}
    if "reasoning_effort" in settings and "enable_thinking" not in given:
        settings["enable_thinking"] = settings["reasoning_effort"] != "none"
    if settings or given:
        asked["chat_template_kwargs"] = {**settings, **given}
    return asked


def answered(answer: object) -> list[int]:
    """Token ids by the answer of `/tokenize`. Raises `EngineFailed`."""
    found = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(map(_is_token, found)):
        raise EngineFailed("the engine's /tokenize answers no list of token ids")
    return found


def kept(body: Body, given: list[int]) -> list[int] | None:
    """Token ids of a prompt that the engine truncates as the request says; none when that can't be known."""
    return truncated(given, body.get("truncate_prompt_tokens"), body.get("truncation_side"))


def truncated(ids: list[int], most: object, side: object) -> list[int] | None:
    """What an engine keeps of token ids, by the request's `truncate_prompt_tokens` and `truncation_side`.

    None when that can't be known: vLLM's -1 is as many as the model takes.
    """
    if most is None:
        return ids
    if type(most) is not int or most < 1:
        return None
    # Language models lose the beginning unless the request says otherwise.
    return ids[:most] if side == "right" else ids[-most:]


def _parts(body: Body) -> Iterator[object]:
    """What a request says, piece by piece: texts, and objects with a type."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else [{"content": body.get("prompt")}]:
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else [content]


def has_media(body: Body) -> bool:
    """Whether a chat holds more than text: images and the like become tokens and keys that only the engine knows."""
    return any(isinstance(part, dict) and part.get("type", "text") not in {"text", "refusal"} for part in _parts(body))


def length(body: Body) -> int:
    """Characters of a request's text."""
    texts = (part.get("text") if isinstance(part, dict) else part for part in _parts(body))
    return sum(len(text) for text in texts if isinstance(text, str))


def streamed(body: Body) -> Body:
    """The request as it is sent: its answer comes in chunks, the last of them with the usage."""
    options = body.get("stream_options") or {}
    return {**body, "stream": True, "stream_options": {**options, "include_usage": True}}


class Chunks:
    """Decodes server-sent events: bytes in, chunks out."""

    def __init__(self) -> None:
        self.begun = False
        """There was an event, so that it is a stream."""
        self.ended = False
        """The engine has said that this was all."""
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Body]:
        """The chunks that are complete with these bytes; no bytes are the end of the answer.

        Raises `EngineFailed` for what the engine says went wrong, and for what is no stream of chunks.
        """
        *lines, self._rest = (self._rest + (data or b"\n")).split(b"\n")
        if len(self._rest) > MOST_LINE_BYTES:
            raise EngineFailed(f"the engine's answer has an event of more than {MOST_LINE_BYTES >> 20} MiB")
        for line in lines:
            payload = line[5:].strip()
            if not payload or not line.startswith(b"data:"):
                continue
            self.begun = True
            if payload == b"[DONE]":
                self.ended = True
                continue
            try:
                chunk = json.loads(payload)
            except (ValueError, RecursionError):
                raise EngineFailed(f"the engine's answer is no stream of JSON: {payload[:200]!r}") from None
            if not isinstance(chunk, dict):
                raise EngineFailed(f"the engine's answer is no stream of JSON objects: {payload[:200]!r}")
            if chunk.get("error") or chunk.get("object") == "error":
                raise EngineFailed(f"the engine broke off: {complaint(payload)}")
            yield chunk


def usage(chunk: Body) -> Usage | None:
    """The usage in a chunk, if there is one."""
    counts = chunk.get("usage")
    if not isinstance(counts, dict):
        return None
    details = counts.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(_count(counts.get("prompt_tokens")) or 0, _count(cached), _count(counts.get("completion_tokens")) or 0)


def text(chunk: Body) -> dict[int, str]:
    """What a chunk adds to the text of each choice."""
    added: dict[int, str] = {}
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        index = choice.get("index", 0) if isinstance(choice, dict) else None
        if type(index) is not int or not 0 <= index < _MOST_CHOICES:
            continue
        delta = choice.get("delta")
        piece = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        if piece:
            added[index] = added.get(index, "") + str(piece)
    return added


def complaint(body: bytes) -> str:
    """The sentence in an engine's answer that is an error: vLLM's and OpenAI's `error.message`, SGLang's `message`."""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return body[:500].decode(errors="replace") or "no reason given"
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    # A lone surrogate would be refused wherever the sentence goes.
    return str(found)[:500].encode(errors="replace").decode()
