"""Who asks: what tells one asker from another, for shares of what is scarce.

With credentials that is the key, which the server lets nobody else have an inbox of; without, it is the connection. It is no
proof of anything where nobody logs in: there, who opens more connections counts as more askers.
"""

from __future__ import annotations

from contextvars import ContextVar

REPLY: ContextVar[str] = ContextVar("reply", default="")
"""Reply subject of the request that is being answered."""
_INBOX = "_INBOX"


def asker() -> str:
    """Who asked what is being answered; empty when that is this process itself."""
    words = REPLY.get().split(".", 2)
    return words[1] if words[0] == _INBOX and len(words) > 1 else words[0]
