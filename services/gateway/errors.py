"""Errors in the shapes that clients of OpenAI's and Anthropic's APIs know. Pure."""

from __future__ import annotations

import msgspec

from kvplane.events.errors import KvplaneError
from kvplane.services.gateway.api import COUNT_TOKENS, MESSAGES
from kvplane.services.protocol.errors import ServiceFault

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_ANTHROPIC = frozenset((MESSAGES, COUNT_TOKENS))


def status_of(error: Exception) -> int:
    """Status of the answer to an error."""
    if isinstance(error, ServiceFault):
        return error.status
    return 503 if isinstance(error, KvplaneError) else 500


def body_of(path: str, status: int, code: str, sentence: str) -> bytes:
    """An error's body, in the shape of the API that the path belongs to."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if path in _ANTHROPIC:
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": sentence}})
    return msgspec.json.encode({"error": {"message": sentence, "type": kind, "param": None, "code": code}})


def event_of(path: str, status: int, code: str, sentence: str) -> bytes:
    """The same as an event of a stream that has begun."""
    body = body_of(path, status, code, sentence)
    return (b"event: error\n" if path in _ANTHROPIC else b"") + b"data: " + body + b"\n\n"
