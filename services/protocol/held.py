"""What is answered to who has to wait for room."""

from __future__ import annotations

from msgspec import Struct


class Held(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request has to wait. Times in seconds."""

    reason: str
    place: int
    """Its place in the queue, from 1."""
    expected: float
    """How long it will wait, about."""
    ask_again: float
    """After so long the request is to be asked for again, with the `request` of this answer; it loses its place otherwise."""
