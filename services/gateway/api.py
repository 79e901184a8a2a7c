"""A request's body as far as routing needs it, and the few changes that are made to one. Pure.

Bodies are forwarded as they came. One is changed only when a stream's usage must be asked for: then a field is put in front of
its others, and the answer's extra chunk is taken out again (`usage`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from kvplane.services.dataplane.openai import truncated
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.tokens.conversation import Chat, split

if TYPE_CHECKING:
    from kvplane.services.protocol.messages import RouteAnswer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, COUNT_TOKENS = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
GENERATING = frozenset((CHAT, COMPLETIONS, RESPONSES, MESSAGES))
"""Endpoints whose requests fill an engine's cache, are recorded and have usage."""
_MOST_TOKEN = (1 << 32) - 1
_NOTHING = msgspec.Raw()


class Fields(Chat, frozen=True, gc=False):
    """What is read of a body; everything else is the engine's business. Large parts stay bytes."""

    model: Any = None
    stream: Any = None
    stream_options: Any = None
    prompt: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    system: msgspec.Raw = _NOTHING
    user: Any = None
    metadata: Any = None
    prompt_cache_key: Any = None
    conversation: Any = None
    cache_salt: Any = None
    truncation_side: Any = None
    service_tier: Any = None
    priority: Any = None


_decode = msgspec.json.Decoder(Fields).decode
_tokens = msgspec.json.Decoder(list[Annotated[int, Meta(ge=0, le=_MOST_TOKEN)]]).decode
_numbers = msgspec.json.Decoder(list[int]).decode


class Asked(NamedTuple):
    """What a client asks for."""

    path: str
    model: str
    fields: Fields
    body: bytes
    """As it goes to the engine."""
    adds_usage: bool
    """The engine is asked for usage that the client did not ask for."""
    messages: list[msgspec.Raw]
    """Of a conversation, each as it came; none where they are no list."""


def read(path: str, body: bytes) -> Asked:
    """Read a request's body. Raises `BadRequest`."""
    try:
        fields = _decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest(f"the body is not a JSON object: {error}") from None
    if not isinstance(fields.model, str) or not fields.model:
        raise BadRequest("the request names no model; `GET /v1/models` lists those that are served")
    stream = fields.stream is True
    adds_usage = stream and path in {CHAT, COMPLETIONS} and not _wants_usage(fields.stream_options)
    body = _with_usage(fields, body) if adds_usage else body
    return Asked(path, fields.model, fields, body, adds_usage, _messages(fields))


def _messages(fields: Fields) -> list[msgspec.Raw]:
    raw = bytes(fields.messages) or bytes(fields.input)
    if not raw.startswith(b"["):
        return []
    try:
        return split(raw)
    except (msgspec.MsgspecError, RecursionError):
        return []


def _wants_usage(options: object) -> bool:
    return isinstance(options, dict) and options.get("include_usage") is True


def _with_usage(fields: Fields, body: bytes) -> bytes:
    if fields.stream_options is None:
        begin = body.index(b"{") + 1
        # A later `"stream_options": null` would undo it; then all is written anew.
        if b'"stream_options"' not in body:
            comma = b"" if body[begin:].lstrip().startswith(b"}") else b","
            return b'{"stream_options":{"include_usage":true}' + comma + body[begin:]
    whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    options = fields.stream_options if isinstance(fields.stream_options, dict) else {}
    whole["stream_options"] = msgspec.Raw(msgspec.json.encode({**options, "include_usage": True}))
    return msgspec.json.encode(whole)


def token_ids(asked: Asked) -> list[int] | None:
    """Token ids of a prompt that is given as such; none for any other prompt. Raises `BadRequest` for ids that can't be."""
    raw = bytes(asked.fields.prompt)
    if not raw.startswith(b"["):
        return None
    try:
        ids = _tokens(raw)
    except (msgspec.MsgspecError, RecursionError):
        # Several prompts in one request, or texts: the engine answers them all, from wherever they lie.
        if _are_numbers(raw):
            raise BadRequest(f"a prompt's token ids are from 0 to {_MOST_TOKEN}") from None
        return None
    return kept(asked.fields, ids) if ids else None


def _are_numbers(raw: bytes) -> bool:
    try:
        return bool(_numbers(raw))
    except msgspec.MsgspecError:
        return False


def kept(fields: Fields, ids: list[int]) -> list[int] | None:
    """The ids that the engine keeps of a prompt that it truncates as the request says; none when that can't be known."""
    return truncated(ids, fields.truncate_prompt_tokens, fields.truncation_side)


def salt(fields: Fields) -> str:
    """What separates this request's cache from others'."""
    return fields.cache_salt if isinstance(fields.cache_salt, str) else ""


_TIERS = {"priority": -1, "flex": 1}
_MOST_PRIORITY = 1 << 31


def priority(fields: Fields) -> int:
    """How urgent a request is, a lower number before a higher one: OpenAI's `service_tier` first, then vLLM's `priority`."""
    tier = _TIERS.get(fields.service_tier, 0) if isinstance(fields.service_tier, str) else 0
    given = fields.priority if type(fields.priority) is int else 0
    return tier * 2 * _MOST_PRIORITY + max(1 - _MOST_PRIORITY, min(given, _MOST_PRIORITY - 1))


def length(asked: Asked) -> int:
    """Bytes of what the model reads, roughly."""
    fields = asked.fields
    return sum(len(bytes(part)) for part in (fields.prompt, fields.messages, fields.input, fields.system))


def shown(decision: RouteAnswer) -> bytes:
    """A decision for a header: JSON in ASCII."""
    fields = msgspec.to_builtins(decision)
    return json.dumps(fields, separators=(",", ":")).encode()
