"""Which conversation a request belongs to. Pure.

What the client says comes first: headers that agents and proxies send, then fields of the body. A client that says nothing is
recognised by how its conversation began: the messages up to the first answer of the model, that included. Before there is an
answer there is no session: many conversations begin alike, and where one lives must not be decided by a common beginning.
Sources of the names: Claude Code's and Codex' own requests, OpenCode, and what other proxies take (LiteLLM, CLIProxyAPI).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_128_hexdigest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.gateway.api import Fields
    from kvplane.services.http.reader import Headers

HEADERS = (
    b"x-session-id", b"x-claude-code-session-id", b"session-id", b"session_id", b"x-session-affinity",
    b"x-opencode-session", b"x-litellm-session-id", b"conversation-id", b"conversation_id",
)  # fmt: skip
"""Headers that name a conversation, the first that is there counts."""
_NAMING = frozenset(HEADERS)
LONGEST = 128
_OF_USER = re.compile(r"_session_([0-9a-fA-F-]{8,64})$")
_ANSWERS = (b"assistant", b"function_call", b"reasoning", b"message")


class _Message(msgspec.Struct, frozen=True, gc=False):
    role: str = ""
    type: str = ""


_message = msgspec.json.Decoder(_Message).decode


def session(headers: Headers, fields: Fields, messages: Sequence[msgspec.Raw]) -> str:
    """Name of the request's conversation, or empty. `messages` are those of the body."""
    given = _named(headers) or _in_body(fields)
    if given:
        return (
            given
            if len(given) <= LONGEST and given.isprintable()
            else xxh3_128_hexdigest(given.encode("utf-8", "replace"))
        )
    return _begun(fields, messages)


def of_tenant(name: str, tenant: str) -> str:
    """A conversation's name among those of all tenants."""
    if not name:
        return ""
    whole = f"{tenant}/{name}"
    return whole if len(whole) <= LONGEST else xxh3_128_hexdigest(whole.encode("utf-8", "replace"))


def _named(headers: Headers) -> str:
    found = {name: value for name, value in reversed(headers) if name in _NAMING and value}
    if not found:
        return ""
    return next((found[name].decode("utf-8", "replace").strip() for name in HEADERS if name in found), "")


def _in_body(fields: Fields) -> str:
    metadata = fields.metadata if isinstance(fields.metadata, dict) else {}
    conversation = fields.conversation
    for given in (
        fields.prompt_cache_key, metadata.get("session_id"), _of_user(metadata.get("user_id")),
        conversation.get("id") if isinstance(conversation, dict) else conversation, fields.user,
    ):  # fmt: skip
        if isinstance(given, str) and given:
            return given
    return ""


def _of_user(given: object) -> str:
    """Claude Code's `metadata.user_id`: JSON with a `session_id`, before that text that ends with one."""
    if not isinstance(given, str):
        return ""
    found = _OF_USER.search(given)
    if found is not None:
        return found.group(1)
    try:
        decoded = msgspec.json.decode(given)
    except (msgspec.MsgspecError, RecursionError):
        return ""
    session = decoded.get("session_id") if isinstance(decoded, dict) else None
    return session if isinstance(session, str) else ""


def _begun(fields: Fields, items: Sequence[msgspec.Raw]) -> str:
    try:
        for count, item in enumerate(items, 1):
            if _message(item).role == "assistant":
                begun = [bytes(fields.system), *(bytes(each) for each in items[:count])]
                return "~" + xxh3_128_hexdigest(b"\0".join(begun))
    except (msgspec.MsgspecError, RecursionError):
        pass
    return ""
