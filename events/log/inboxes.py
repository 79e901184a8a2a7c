"""Where a client gets what is for it alone, named by who may write there; credentials hold everyone to it.

    _INBOX.<key>.>            answers of services and of the server
    _SERVED.<node>.<key>.>    answers of that node, which may write to no other inbox
    _DELIVER.<key>.>          what its consumers deliver: the server's word, and nobody may write there

A consumer of one who logged in is named after its key and a number, and no other name is allowed: so nobody can make one in
another's name, and all those that one key leaves behind are known by their names. Without credentials nothing of this is held.
"""

from __future__ import annotations

import re
from uuid import uuid4

CONSUMERS = 32
"""Consumers of one stream that all processes with one key may have at the same time."""

_CONSUMER = re.compile(r"(U[A-Z2-7]{55})-(\d{1,3})")


def answers_inbox(key: str) -> str:
    """Prefix of a client's inboxes. A permission binds whole tokens, so the key is one; the rest is not to be guessed."""
    return f"_INBOX.{key}.{uuid4().hex}" if key else f"_INBOX_{uuid4().hex[:12]}"


def served_inbox(node: str, key: str, life: str, token: str) -> str:
    """Inbox for the answer of a node, whose name is a subject token."""
    return f"_SERVED.{node}.{key}.{life}.{token}"


def delivery_inbox(key: str) -> str:
    """Inbox for one consumer of a client that logged in."""
    return f"_DELIVER.{key}.{uuid4().hex}"


def delivers_to(key: str, subject: str) -> bool:
    """Whether a subject is one of a key's inboxes for deliveries."""
    return subject.startswith(f"_DELIVER.{key}.")


def consumer_names(key: str) -> list[str]:
    """Names that a key's consumers may have."""
    return [f"{key}-{number}" for number in range(CONSUMERS)]


def owner_of(consumer: str) -> str:
    """Key of whose consumer this must be, by its name; empty when it has no such name."""
    found = _CONSUMER.fullmatch(consumer)
    return found[1] if found else ""
