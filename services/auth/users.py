"""One who may log in."""

from __future__ import annotations

from msgspec import Struct

from kvplane.services.auth.roles import Role  # noqa: TC001 - read at run time


class User(Struct, frozen=True, kw_only=True):
    """One who may log in."""

    fleet: str
    role: Role
    key: str
    name: str = ""
    made: str = ""

    @property
    def label(self) -> str:
        """Role and name, as people write it: `node/node-a`."""
        return f"{self.role}/{self.name}" if self.name else self.role
