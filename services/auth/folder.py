"""The folder that holds a fleet's credentials.

    ca.pem, ca.key            the fleet's own CA                  users.json    who there is: role, name, public key
    seeds/<fleet>/*.seed      one a user: give it to that user and, if you like, delete it here
    servers/<name>/           all that a server needs, and nothing else

Whoever has the folder is admin: keep it where the admin works, not on servers.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path, PurePosixPath
from secrets import token_urlsafe
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from kvplane.events.errors import BadCredentials
from kvplane.events.log.credentials import read_seed
from kvplane.events.subjects import check_fleet, check_name, token
from kvplane.services.auth import certificates
from kvplane.services.auth.certificates import Pair
from kvplane.services.auth.configuration import (
    CA,
    CERTIFICATE,
    CLIENT,
    CLUSTER,
    KEY,
    MONITOR,
    client_configuration,
    cluster_configuration,
    monitor_configuration,
)
from kvplane.services.auth.keys import new_seed
from kvplane.services.auth.roles import ROLES, Role
from kvplane.services.auth.users import User

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT = Path("kvplane-auth")
ALONE = "server"
"""Name of the one server when none was named."""
SEEN = PurePosixPath("/etc/nats/auth")
"""Where named servers see their folder, as in the compose file."""
FIRST: tuple[Role, ...] = ("admin", "coordinator", "router", "historian", "client")
"""Roles that `init` makes a user of."""
SOON = timedelta(days=30)

_CA_KEY = "ca.key"
_USERS = "users.json"
_LONGEST_FILE = 150


class Server(Struct, frozen=True, kw_only=True):
    """One NATS server: its name, and where it sees its own folder."""

    name: str
    seen: str
    names: list[str]
    """Host names and addresses of its certificate."""
    monitor: str = ""
    """What stands before the paths of its monitoring port."""


class _Book(Struct, kw_only=True):
    """What `users.json` holds."""

    users: list[User] = []
    servers: list[Server] = []


class AuthFolder:
    """A folder of credentials. Methods raise `BadCredentials`; `save` writes what changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._book = _Book()
        self._known = (path / _USERS).exists()
        if self._known:
            try:
                self._book = msgspec.json.decode(_read(path / _USERS), type=_Book)
            except msgspec.DecodeError as error:
                raise BadCredentials(f"{path / _USERS} can't be read ({error}); restore it from a backup") from None

    @classmethod
    def existing(cls, path: Path) -> AuthFolder:
        """A folder that `kvplane auth init` made."""
        if not (path / _USERS).exists():
            raise BadCredentials(f"{path} holds no credentials; make them with `kvplane auth init {path}`")
        return cls(path)

    @property
    def users(self) -> list[User]:
        """Everyone who may log in."""
        return sorted(self._book.users, key=lambda user: (user.fleet, ROLES.index(user.role), user.name))

    @property
    def servers(self) -> list[Server]:
        """The servers."""
        return list(self._book.servers)

    @property
    def ca(self) -> Path:
        """Certificate of the CA, which every client may know."""
        return self.path / CA

    def find(self, fleet: str, role: Role, name: str = "") -> User | None:
        """A user, if there is one."""
        return next((u for u in self._book.users if (u.fleet, u.role, u.name) == (fleet, role, name)), None)

    def seed_file(self, fleet: str, role: Role, name: str = "") -> Path:
        """Where a user's seed lies, if it was not moved away."""
        ending = token(name) if name else ""
        if len(ending) > _LONGEST_FILE:
            ending = sha256(name.encode()).hexdigest()
        return self.path / "seeds" / fleet / (f"{role}-{ending}.seed" if ending else f"{role}.seed")

    def server_folder(self, name: str) -> Path:
        """What is to be given to a server."""
        return self.path / "servers" / name

    def add(self, fleet: str, role: Role, name: str = "", *, replace: bool = False) -> bool:
        """Let a user in; false when there is one already, whose seed is kept unless it is to be replaced."""
        check_fleet(fleet)
        if name:
            check_name(name)
        elif role == "node":
            raise BadCredentials("a node's credentials are bound to its name; give it: kvplane auth add node NAME")
        known = self.find(fleet, role, name)
        if known is not None and not replace:
            return False
        path = self.seed_file(fleet, role, name)
        # A seed that nobody knows of is left over from an interruption.
        seed = read_seed(path) if path.exists() and not replace else new_seed()
        _private(path, seed.text.encode() + b"\n")
        made = datetime.now(UTC).isoformat(timespec="seconds")
        self._book.users = [user for user in self._book.users if user != known]
        self._book.users.append(User(fleet=fleet, role=role, name=name, key=seed.public, made=made))
        return True

    def remove(self, fleet: str, role: Role, name: str = "") -> None:
        """Let a user in no more, and delete the seed if it is here."""
        known = self.find(fleet, role, name)
        if known is None:
            who = f"{role}/{name}" if name else role
            raise BadCredentials(f"there is no {who} in fleet {fleet!r}; `kvplane auth list` shows who there is")
        self._book.users.remove(known)
        self.seed_file(fleet, role, name).unlink(missing_ok=True)

    def set_servers(self, names: Sequence[str], *, also: Sequence[str] = (), seen: str | None = None) -> None:
        """Name the servers; without names there is one, on this machine. Those that are there stay as they are."""
        wanted = list(names) or ([] if self._book.servers else [ALONE])
        for name in wanted:
            if not name or name in {".", ".."} or len(name) > _LONGEST_FILE or "/" in name or not name.isprintable():
                raise BadCredentials(f"server name {name[:80]!r} can't be a folder's name; use its host name")
        known = {server.name: server for server in self._book.servers}
        everyone = list(dict.fromkeys([*known, *wanted]))
        local = ["localhost", "127.0.0.1", "::1"]
        # Clients learn of further servers by address and look for the first one's name: so each has all names.
        shared = [name for name in everyone if name != ALONE] if everyone != [ALONE] else [socket.gethostname()]
        made = []
        for name in everyone:
            before = known.get(name)
            place = seen or (before.seen if before else "" if name == ALONE else str(SEEN))
            kept = before.names if before else []
            everything = list(dict.fromkeys([*local, *shared, *also, *kept]))
            monitor = (before.monitor if before else "") or token_urlsafe(16)
            made.append(Server(name=name, seen=place, names=everything, monitor=monitor))
        self._book.servers = made

    def save(self, *, renew: bool = False) -> list[str]:
        """Write the list of users and what servers read; the names of servers whose certificate was made anew."""
        _folder(self.path)
        self._write_ca()
        made = [server.name for server in self._book.servers if self._write_certificate(server, renew=renew)]
        for server in self._book.servers:
            self.write_configuration(server)
        _private(self.path / _USERS, msgspec.json.format(msgspec.json.encode(self._book), indent=2) + b"\n")
        return made

    def write_configuration(self, server: Server) -> None:
        """Write what a server includes."""
        folder = self.server_folder(server.name)
        seen = PurePosixPath(server.seen or folder.absolute())
        _private(folder / CLIENT, client_configuration(self.users, seen).encode())
        _private(folder / CLUSTER, cluster_configuration(seen).encode())
        # Of a folder that an older kvplane made it is not there until `auth init`; a server reads it at its start only.
        if server.monitor:
            _private(folder / MONITOR, monitor_configuration(server.monitor).encode())

    def place_alone(self) -> Path:
        """Write the configuration of the one server on this machine, as it sees the folder now; what it includes."""
        if [server.name for server in self._book.servers] != [ALONE]:
            names = ", ".join(server.name for server in self._book.servers)
            raise BadCredentials(
                f"{self.path} is for the servers {names}; make another with `kvplane auth init FOLDER`"
            )
        self.write_configuration(msgspec.structs.replace(self._book.servers[0], seen=""))
        return (self.server_folder(ALONE) / CLIENT).absolute()

    def ends(self) -> dict[str, datetime]:
        """When certificates end, by server; the CA's is under its file's name."""
        files = {CA: self.ca} | {s.name: self.server_folder(s.name) / CERTIFICATE for s in self._book.servers}
        return {name: certificates.until(_read(path)) for name, path in files.items()}

    def _write_ca(self) -> None:
        if self.ca.exists():
            return
        if self._known:
            raise BadCredentials(f"{self.ca} is gone, and clients trust it; restore it from a backup")
        made = certificates.new_ca(f"kvplane {datetime.now(UTC):%Y-%m-%d}")
        _private(self.path / _CA_KEY, made.key)
        _private(self.ca, made.certificate)

    def _write_certificate(self, server: Server, *, renew: bool) -> bool:
        folder = self.server_folder(server.name)
        path, authority = folder / CERTIFICATE, _read(self.ca)
        if path.exists() and not renew:
            held = _read(path)
            # The names are in the order of the certificate only when it is new.
            same = set(certificates.names_of(held)) == set(server.names)
            if same and (folder / KEY).exists() and certificates.signed_by(held, authority):
                return False
        made = certificates.new_server(Pair(authority, _read(self.path / _CA_KEY)), server.name, server.names)
        _private(folder / KEY, made.key)
        _private(path, made.certificate)
        _private(folder / CA, authority)
        return True


def role_of(text: str) -> Role:
    """A role by its name. Raises `BadCredentials`."""
    if text not in ROLES:
        raise BadCredentials(f"role {text[:40]!r} is not one of {', '.join(ROLES)}")
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCredentials(f"{path} can't be read ({error.strerror}); restore it from a backup") from None


def _folder(path: Path) -> None:
    if not path.exists():
        _folder(path.parent) if not path.parent.exists() else None
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)


def _private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    try:
        _folder(path.parent)
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise BadCredentials(f"{path} can't be written ({error.strerror}); choose another folder") from None
