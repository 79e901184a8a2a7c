"""The file of keys: who may use the gateways that are started with it, which models, and how much.

A key's secret is 256 random bits. It is shown once, when it is made; the file has its SHA-256 only. A slow hash protects what
people think of; nobody guesses 256 bits, and each request would pay for it. A request's secret is looked up by its hash: how
long that takes could only tell of a hash that nobody can steer, and the last comparison takes the same time whatever it finds.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from hmac import compare_digest
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from kvplane.events.errors import BadCredentials
from kvplane.events.subjects import check_name
from kvplane.projections.tenants import Limits
from kvplane.services.process.private import locked, write_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEYS_LIMIT = 10_000
"""Most keys of a file."""
FILE_BYTES = 16 << 20
"""Longest file that is read."""
LONGEST_SECRET = 512
"""What is longer is no secret of ours, and is not hashed."""
_BEGINNING = "kvp-"
_SECRET_BYTES = 32

_Natural = Annotated[int, Meta(ge=0, le=1 << 53)]


class Key(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key, as it is in the file. A limit of 0 is none."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    """The tenant's name, under which its requests are on the log."""
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """Of the secret, in hex."""
    made: str = ""
    models: list[str] = []
    """Models that it is for; empty is all."""
    requests_per_minute: _Natural = 0
    tokens_per_minute: _Natural = 0
    concurrent: _Natural = 0

    @property
    def limits(self) -> Limits:
        """What the tenant may."""
        return Limits(self.requests_per_minute, self.tokens_per_minute, self.concurrent)

    def may(self, model: str) -> bool:
        """Whether it is for a model."""
        return not self.models or model in self.models


class _File(Struct, kw_only=True, forbid_unknown_fields=True):
    keys: Annotated[list[Key], Meta(max_length=KEYS_LIMIT)] = []


class Keys:
    """Keys as a gateway knows them."""

    def __init__(self, keys: list[Key]) -> None:
        self.all = keys
        self._by_hash = {bytes.fromhex(key.sha256): key for key in keys}

    def find(self, secret: bytes) -> Key | None:
        """The key of a secret."""
        if not 0 < len(secret) <= LONGEST_SECRET:
            return None
        digest = sha256(secret).digest()
        key = self._by_hash.get(digest)
        # Compared in any case, and in constant time.
        same = compare_digest(digest, bytes(32) if key is None else bytes.fromhex(key.sha256))
        return key if same else None


def read_keys(path: Path) -> Keys:
    """The keys of a file. Raises `BadCredentials`, which says what is wrong with it and what to do."""
    return Keys(_read(path).keys)


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        hint = (
            "make one with `kvplane key add NAME`" if isinstance(error, FileNotFoundError) else "let this user read it"
        )
        raise BadCredentials(f"the keys in {path} can't be read ({error.strerror}); {hint}") from None
    if len(data) > FILE_BYTES:
        raise BadCredentials(f"the keys in {path} are more than {FILE_BYTES:,} bytes; is this the right file?")
    try:
        held = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadCredentials(f"{path} is no file of keys ({error}); restore it, or make another") from None
    names, hashes = {key.name for key in held.keys}, {key.sha256 for key in held.keys}
    if len(names) != len(held.keys) or len(hashes) != len(held.keys):
        raise BadCredentials(f"{path} has a name or a secret twice; remove one of them")
    return held


class KeyFile:
    """A file of keys that is being changed; nobody else changes it meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = _read(path) if path.exists() else _File()

    @property
    def keys(self) -> list[Key]:
        """All keys."""
        return list(self._held.keys)

    def add(self, name: str, limits: Limits, models: list[str], *, replace: bool = False) -> str:
        """Make a key, or with `replace` a new secret and new limits for one that is there; its secret.

        Raises `BadCredentials`.
        """
        check_name(name, "key")
        for model in models:
            check_name(model, "model")
        before = next((at for at, key in enumerate(self._held.keys) if key.name == name), None)
        if before is not None and not replace:
            raise BadCredentials(
                f"there is a key {name!r} already; --replace makes a new secret for it, or choose another name"
            )
        if before is None and len(self._held.keys) >= KEYS_LIMIT:
            raise BadCredentials(f"{self._path} has {KEYS_LIMIT:,} keys, the most of a file; remove some")
        secret = _BEGINNING + token_urlsafe(_SECRET_BYTES)
        key = Key(
            name=name, sha256=sha256(secret.encode()).hexdigest(), made=datetime.now(UTC).isoformat(timespec="seconds"),
            models=models, requests_per_minute=limits.requests_per_minute, tokens_per_minute=limits.tokens_per_minute,
            concurrent=limits.concurrent,
        )  # fmt: skip
        if before is None:
            self._held.keys.append(key)
        else:
            self._held.keys[before] = key
        return secret

    def remove(self, name: str) -> None:
        """Take a key back. Raises `BadCredentials` when there is none of this name."""
        kept = [key for key in self._held.keys if key.name != name]
        if len(kept) == len(self._held.keys):
            raise BadCredentials(
                f"there is no key {name[:80]!r} in {self._path}; `kvplane key list` shows those that there are"
            )
        self._held.keys = kept

    def save(self) -> None:
        """Write it, in one step."""
        write_private(self._path, msgspec.json.format(msgspec.json.encode(self._held), indent=2) + b"\n")


@contextmanager
def changing(path: Path) -> Iterator[KeyFile]:
    """A file of keys that nobody else changes meanwhile; whoever changes it calls `save`. Raises `BadCredentials`."""
    path = path.absolute()
    with locked(path.parent, f".{path.name}.lock"):
        yield KeyFile(path)
