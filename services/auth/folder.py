"""The folder that holds a fleet's credentials.

    ca.pem, ca.key            the fleet's own CA                  users.json    who there is: role, name, public key
    seeds/<fleet>/*.seed      one a user: give it to that user and, if you like, delete it here
    servers/<name>/           all that a server needs, and nothing else

Whoever has the folder is admin: keep it where the admin works, not on servers.

One command at a time changes it (`changing`). `users.json` is what counts, and it is replaced in one step: new seeds are drafts
before that, and get their names after; what a killed command left is put right by the next.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path, PurePosixPath
from secrets import token_urlsafe
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from kvplane.events.errors import BadCredentials
from kvplane.events.log.credentials import public_key
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
from kvplane.services.process.private import locked, make_folder, write_private

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvplane.events.log.credentials import Seed

DEFAULT = Path("kvplane-auth")
ALONE = "server"
"""Name of the one server when none was named."""
SEEN = PurePosixPath("/etc/nats/auth")
"""Where named servers see their folder, as in the compose file."""
FIRST: tuple[Role, ...] = ("admin", "coordinator", "router", "historian", "client")
"""Roles that `init` makes a user of."""
SOON = timedelta(days=30)

_DRAFT = ".next"
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
        self._new: dict[Path, Seed] = {}
        """Seeds that are written with the next `save`."""
        self._gone: set[Path] = set()
        """Seeds that are deleted with it."""
        self._load()

    def _load(self) -> None:
        self._known = (self.path / _USERS).exists()
        if self._known:
            try:
                self._book = msgspec.json.decode(_read(self.path / _USERS), type=_Book)
            except msgspec.DecodeError as error:
                raise BadCredentials(
                    f"{self.path / _USERS} can't be read ({error}); restore it from a backup"
                ) from None

    @classmethod
    def existing(cls, path: Path) -> AuthFolder:
        """A folder that `kvplane auth init` made."""
        if not (path / _USERS).exists():
            raise BadCredentials(f"{path} holds no credentials; make them with `kvplane auth init {path}`")
        return cls(path)

    @classmethod
    @contextmanager
    def changing(cls, path: Path, *, create: bool = False) -> Iterator[AuthFolder]:
        """A folder that nobody else changes meanwhile; whoever changes it calls `save`."""
        if not create:
            cls.existing(path)
        with locked(path):
            held = cls(path)
            held.mend()
            yield held

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
        # Never one that lies there: it may be that of somebody who was taken out.
        seed = self._new[path] = new_seed()
        self._gone.discard(path)
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
        path = self.seed_file(fleet, role, name)
        self._new.pop(path, None)
        self._gone.add(path)

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
        make_folder(self.path)
        self._write_ca()
        made = [server.name for server in self._book.servers if self._write_certificate(server, renew=renew)]
        for path, seed in self._new.items():
            write_private(_draft(path), seed.text.encode() + b"\n")
        # From here on the change is made.
        write_private(self.path / _USERS, msgspec.json.format(msgspec.json.encode(self._book), indent=2) + b"\n")
        for path in self._new:
            _draft(path).replace(path)
        for path in self._gone:
            path.unlink(missing_ok=True)
        self._new, self._gone = {}, set()
        for server in self._book.servers:
            self.write_configuration(server)
        return made

    def mend(self) -> None:
        """Put right what a command left that was killed: seeds without a name or a user, configurations of other users."""
        for draft in (self.path / "seeds").glob(f"*/*{_DRAFT}"):
            path = draft.with_name(draft.name.removesuffix(_DRAFT))
            if _key_of(draft) in {user.key for user in self._book.users}:
                draft.replace(path)
            else:
                draft.unlink()
        seeds = {self.seed_file(user.fleet, user.role, user.name) for user in self._book.users}
        for path in (self.path / "seeds").glob("*/*.seed"):
            if path not in seeds:
                path.unlink()
        for server in self._book.servers:
            if self._outdated(server):
                self.write_configuration(server)

    def problems(self) -> list[str]:
        """What is not as it must be, a sentence each: seeds of other keys, seeds of nobody, configurations of other users."""
        found = []
        known = {self.seed_file(user.fleet, user.role, user.name): user for user in self._book.users}
        for path in sorted((self.path / "seeds").glob("*/*.seed")):
            user = known.get(path)
            if user is None:
                found.append(f"{path} is the seed of nobody who may log in; delete it")
            elif _key_of(path) != user.key:
                words = " ".join(filter(None, ("kvplane auth add", user.role, user.name, "--replace")))
                found.append(f"{path} is not the seed of the key that servers know; make a new one with `{words}`")
        found += [f"{draft} was left by a command that was killed" for draft in self.path.glob(f"seeds/*/*{_DRAFT}")]
        found += [
            f"the configuration of server {server.name} is not that of the users; `kvplane auth init {self.path}` writes it "
            "again, then SIGHUP"
            for server in self._book.servers
            if self._outdated(server)
        ]
        return found

    def _outdated(self, server: Server) -> bool:
        """Whether what a server includes is of other users."""
        path = self.server_folder(server.name) / CLIENT
        here = self.server_folder(server.name).absolute()
        # `up` has it written as it sees it.
        good = {client_configuration(self.users, seen).encode() for seen in (self._seen(server), PurePosixPath(here))}
        return path.exists() and path.read_bytes() not in good

    def _seen(self, server: Server) -> PurePosixPath:
        """Where the server sees its folder."""
        return PurePosixPath(server.seen or self.server_folder(server.name).absolute())

    def write_configuration(self, server: Server) -> None:
        """Write what a server includes."""
        folder = self.server_folder(server.name)
        seen = self._seen(server)
        write_private(folder / CLIENT, client_configuration(self.users, seen).encode())
        write_private(folder / CLUSTER, cluster_configuration(seen).encode())
        # Of a folder that an older kvplane made it is not there until `auth init`; a server reads it at its start only.
        if server.monitor:
            write_private(folder / MONITOR, monitor_configuration(server.monitor).encode())

    def place_alone(self) -> Path:
        """Write the configuration of the one server on this machine, as it sees the folder now; what it includes."""
        if [server.name for server in self._book.servers] != [ALONE]:
            names = ", ".join(server.name for server in self._book.servers)
            raise BadCredentials(
                f"{self.path} is for the servers {names}; make another with `kvplane auth init FOLDER`"
            )
        with locked(self.path):
            self._load()
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
        write_private(self.path / _CA_KEY, made.key)
        write_private(self.ca, made.certificate)

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
        write_private(folder / KEY, made.key)
        write_private(path, made.certificate)
        write_private(folder / CA, authority)
        return True


def _draft(path: Path) -> Path:
    return path.with_name(path.name + _DRAFT)


def _key_of(path: Path) -> str:
    """Public key of a seed; empty when it holds none."""
    try:
        return public_key(path.read_text().strip())
    except (BadCredentials, OSError, UnicodeDecodeError):
        return ""


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
