"""Decisions about one chain of blocks."""

from __future__ import annotations

from kvplane.events import types
from kvplane.events.hashing import pack_hashes

CHAIN = [*range(1, 9)]


def routed(request: str, node: str = "a", *, match: int = 0, length: int = 8, tokens: int = 128) -> types.RequestRouted:
    return types.RequestRouted(request, "m", node, match, length, tokens, pack_hashes(CHAIN[:length]))
