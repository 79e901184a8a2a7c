"""Keys of gateways, made as `kvplane key add` makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.projections.tenants import Limits
from kvplane.services.tenancy.keys import changing

if TYPE_CHECKING:
    from pathlib import Path


def make_key(path: Path, name: str, models: tuple[str, ...] = (), **limits: int) -> str:
    """Make a key, or another of its name; its secret."""
    with changing(path) as held:
        secret = held.add(name, Limits(**limits), list(models), replace=True)
        held.save()
    return secret


def bearer(secret: str) -> dict[str, str]:
    """What a client sends."""
    return {"authorization": f"Bearer {secret}"}
