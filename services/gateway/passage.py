"""What is known of a request while it passes, and what is read of one beside what its API says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvplane.services.gateway import api
from kvplane.services.protocol.errors import BadRequest, Forbidden

if TYPE_CHECKING:
    from kvplane.services.gateway.forward import Way
    from kvplane.services.tenancy.doors import Visit
    from kvplane.services.tenancy.keys import Key

_LONGEST_NAME = 128


class Passage:
    """What is known of a request while it passes."""

    __slots__ = ("key", "model", "request", "source", "tokens", "traceparent", "visit", "way")

    def __init__(self, request: str, traceparent: str, key: Key | None) -> None:
        self.request = request
        self.traceparent = traceparent
        self.key = key
        self.visit: Visit | None = None
        self.model = self.source = ""
        self.tokens = 0
        self.way: Way | None = None


_FOR_TENANTS = frozenset((
    api.COUNT_TOKENS, "/v1/embeddings", "/v1/pooling", "/v1/score", "/v1/rerank", "/v1/classify", "/v1/moderations",
    "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations", "/tokenize",
    "/detokenize", *(f"{path}/render" for path in api.GENERATING),
))  # fmt: skip
"""What else of an engine's is for tenants. Not what changes it, such as loading LoRAs, nor what it keeps of others."""


def check_passing(path: str, key: Key, model: str) -> None:
    """Raise `Forbidden` unless a key is for an endpoint of engines that is only passed on; `model` is the one that is named."""
    if path not in _FOR_TENANTS:
        raise Forbidden(f"{path[:200]} is not for those who come with a key")
    if key.models and not model:
        raise Forbidden(f"the key {key.name!r} is for some models, and the request names none that can be read")


def usable(name: str) -> bool:
    """Whether a request may be called so."""
    return bool(name) and len(name) <= _LONGEST_NAME and name.isascii() and name.isprintable()


def seconds_of(header: bytes) -> float:
    """The time that a client gives its request. Raises `BadRequest`."""
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise BadRequest(f"x-request-timeout is {header[:40]!r}; it must be seconds, more than 0")
    return seconds


class _Model(msgspec.Struct, gc=False):
    model: str = ""


def model_of(body: bytes) -> str:
    """The model that a body names, if it is one that does."""
    try:
        return msgspec.json.decode(body, type=_Model).model
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ""
