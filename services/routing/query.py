"""A request as decisions need it."""

from __future__ import annotations

from typing import NamedTuple

HASHES_RECORDED = 16_384
"""Longest request whose hashes are recorded, in blocks: DuckDB reads a history's rows by 2,048."""


class Query(NamedTuple):
    """A request as the decision needs it. `hashes` are packed; `blocks` bounds the match."""

    id: str
    model: str
    hashes: bytes
    tokens: int
    blocks: int
    block_size: int
    session: str = ""
    exclude: frozenset[str] = frozenset()
    traceparent: str = ""
    """W3C traceparent; no decision depends on it."""
    recorded: bool = True
    """Whether there is room for its hashes while it runs."""
    tenant: str = ""
    """Who asks, as far as that is known; only the order of those who wait depends on it."""
    key: str = ""
    """Name of the key by which a gateway let it in; it is recorded, and no decision depends on it."""
    origin: str = ""
    leg: int = 0
    """The request that it is a further attempt of, and which leg of a stream; no decision depends on them."""
