"""Events of a stream that the gateway itself writes, in the shapes of OpenAI's and Anthropic's APIs. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvplane.services.gateway.api import CHAT

if TYPE_CHECKING:
    from kvplane.services.gateway.usage import Usage

_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class Head(NamedTuple):
    """What every chunk of a stream repeats."""

    id: str
    created: int
    model: str

    @property
    def fields(self) -> dict[str, Any]:
        """The same as fields of a chunk."""
        return self._asdict()


def _data(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"event: %b\n" % body["type"].encode() + _data(body)


def choice_of_chat(choice: dict[str, Any]) -> dict[str, Any]:
    """A completion's choice as one of a chat."""
    text = choice.pop("text", None)
    choice.pop("prompt_logprobs", None)
    choice.pop("prompt_token_ids", None)
    return {"index": 0, "delta": {"content": text} if text else {}, **choice}


def counts(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's words; of what was cached only where it is known."""
    prompt, output = max(0, usage.prompt), max(0, usage.output)
    said: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    if usage.cached >= 0:
        said["prompt_tokens_details"] = {"cached_tokens": usage.cached}
    return said


def last_chunk(path: str, head: Head, finish: str) -> bytes:
    """The chunk with the finish reason."""
    chat = path == CHAT
    said: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
    return _data({**head.fields, "object": "chat.completion.chunk" if chat else "text_completion", "choices": [choice]})


def usage_chunk(path: str, head: Head, usage: Usage) -> bytes:
    """The chunk with the usage."""
    kind = "chat.completion.chunk" if path == CHAT else "text_completion"
    return _data({**head.fields, "object": kind, "choices": [], "usage": counts(usage)})


def block_start() -> bytes:
    """The beginning of Anthropic's block of text."""
    return _event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})


def text_delta(block: int, text: str) -> bytes:
    """A piece of text of Anthropic's."""
    return _event({"type": "content_block_delta", "index": block, "delta": {"type": "text_delta", "text": text}})


def message_end(block: int, finish: str, usage: Usage) -> bytes:
    """The end of Anthropic's message."""
    parts = _event({"type": "content_block_stop", "index": block}) if block >= 0 else b""
    said: dict[str, Any] = {"output_tokens": max(0, usage.output)}
    if usage.prompt >= 0:
        cached = max(0, usage.cached)
        said |= {"input_tokens": usage.prompt - cached, "cache_read_input_tokens": cached}
    delta = {"stop_reason": _STOP_REASONS.get(finish, finish), "stop_sequence": None}
    return parts + _event({"type": "message_delta", "delta": delta, "usage": said}) + _event({"type": "message_stop"})
