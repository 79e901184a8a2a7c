"""Limits of options."""

from __future__ import annotations

from kvplane.services.protocol.errors import BadRequest


def within(value: float | None, option: str, least: float, most: float) -> None:
    """Raise `BadRequest` unless an option that is given lies in its limits."""
    if value is not None and not least <= value <= most:
        raise BadRequest(f"--{option} is {value:g}; it must be from {least:g} to {most:g}")
