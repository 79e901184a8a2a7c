"""File descriptors: who listens to strangers takes so many that the rest of the process always has some, NATS first of all."""

from __future__ import annotations

import resource
from contextlib import suppress

KEPT_BACK = 64
"""Descriptors that no connection of others' may take: for NATS, files, and processes that are started."""
WANTED = 65_536
"""As many as a service would like to have."""


def raise_limit() -> None:
    """Have as many descriptors as the system allows, if that is not too many. The usual limit is low for old programs' sake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def spared(most: int, each: int = 1) -> int:
    """How many connections may be open, `most` at the most, when each takes `each` descriptors and `KEPT_BACK` are left."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return most
    return max(1, min(most, max(soft - KEPT_BACK, soft // 4) // each))
