"""Which headers go on: a client's to an engine, an engine's to a client. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvplane.services.http.reader import Headers

_DROPPED = frozenset((
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"transfer-encoding",
    b"upgrade", b"host", b"content-length", b"accept-encoding", b"expect", b"proxy-connection", b"http2-settings",
    b"x-data-parallel-rank", b"x-request-id", b"traceparent", b"x-kvplane-explain", b"x-request-timeout",
    b"x-kvplane-continue",
))  # fmt: skip
"""Headers that are of one connection only, or that the gateway writes itself."""
_GUARDED = _DROPPED | {b"authorization", b"x-api-key", b"api-key"}
_CONTROLS = (
    b"x-kvplane-", b"x-gateway-", b"x-smg-", b"x-dynamo-", b"x-worker-instance-id", b"x-prefill-instance-id",
    b"x-decode-instance-id", b"x-prefiller-host-port", b"x-decoder-host-port", b"x-disaggregated-", b"x-vllm-",
)  # fmt: skip
"""Beginnings of headers by which this gateway, others and engines are told where a request goes; clients don't."""

_ALONE = (b"keep-alive", b"close")
_NOTHING: frozenset[bytes] = frozenset()
_NAME_BYTES = 64
"""So much of a header's name says whether it goes on."""


def answered(headers: Headers) -> Headers:
    """An engine's headers as they go to the client."""
    dropped = _of_one_connection(headers, _DROPPED)
    return [pair for pair in headers if pair[0] not in dropped]


def _of_one_connection(headers: Headers, dropped: frozenset[bytes]) -> frozenset[bytes]:
    for name, value in headers:
        if name == b"connection" and value.lower() not in _ALONE:
            dropped = dropped | {part.strip().lower() for part in value.split(b",")}
    return dropped


def forwarded(headers: Headers, credentials: bytes | None = None) -> bytes:
    """The client's headers as they go to the engine; with `credentials`, those lines instead of the client's own."""
    guarded = credentials is not None
    kept = [b"%b: %b\r\n" % pair for pair in headers if _goes_on(pair[0][:_NAME_BYTES], guarded)]
    named = _of_one_connection(headers, _NOTHING)
    if named:
        kept = [line for line in kept if line.partition(b":")[0] not in named]
    return b"".join(kept) + (credentials or b"")


@lru_cache(maxsize=1024)
def _goes_on(name: bytes, guarded: bool) -> bool:  # noqa: FBT001 - the cache is quicker by place
    # Some servers take one for the other.
    name = name.replace(b"_", b"-")
    return name not in (_GUARDED if guarded else _DROPPED) and not name.startswith(_CONTROLS)
