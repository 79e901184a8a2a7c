"""Counts of requests by tenant, for metrics: of so many tenants at the most, and of all others together."""

from __future__ import annotations

from typing import NamedTuple

SHOWN_LIMIT = 100
"""Most tenants with counts of their own; those who come later are counted together."""
OTHERS = "(others)"
ENDINGS = ("ok", "cancelled", "refused", "failed")


class Counted:
    """What one tenant has had since the start: requests by how they ended, refusals by limit, tokens by kind."""

    __slots__ = ("limited", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = dict.fromkeys(ENDINGS, 0)
        self.limited: dict[str, int] = {}
        self.tokens = {"prompt": 0, "cached": 0, "output": 0}


class Tokens(NamedTuple):
    """Tokens that an engine has counted."""

    prompt: int
    cached: int
    output: int


class ByTenant:
    """All of them."""

    def __init__(self) -> None:
        self.all: dict[str, Counted] = {}

    def _of(self, tenant: str) -> Counted:
        found = self.all.get(tenant)
        if found is None:
            name = tenant if len(self.all) < SHOWN_LIMIT else OTHERS
            found = self.all.setdefault(name, Counted())
        return found

    def ended(self, tenant: str, ending: str, tokens: Tokens | None) -> None:
        """A request has ended."""
        counted = self._of(tenant)
        if ending in counted.requests:
            counted.requests[ending] += 1
        if tokens is not None:
            for kind, count in tokens._asdict().items():
                counted.tokens[kind] += max(0, count)

    def limited(self, tenant: str, limit: str) -> None:
        """A request was refused for a limit."""
        counted = self._of(tenant)
        counted.limited[limit] = counted.limited.get(limit, 0) + 1
