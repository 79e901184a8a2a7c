"""Lets requests in by their key, and refuses those that are more than their tenant may.

Credentials are taken as clients of OpenAI's (`Authorization: Bearer`) and Anthropic's APIs (`x-api-key`) send them. Answers say
in OpenAI's headers how much is left.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from kvplane.projections.tenants import Tenants
from kvplane.services.protocol.errors import Forbidden, LimitExceeded, TooLarge, Unauthorized
from kvplane.services.tenancy.measured import ByTenant

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplane.projections.tenants import Excess, Usage
    from kvplane.services.tenancy.keys import Key, Keys

Headers = list[tuple[bytes, bytes]]

_BEARER = b"bearer "
_SAYS = {
    "requests": "{name!r} may send {most:,} requests a minute, and has sent them",
    "tokens": "{name!r} may use {most:,} tokens a minute, and has used {used:,}; this prompt has {asked:,}",
    "concurrent": "{name!r} may have {most:,} requests running, and has",
}


class Visit:
    """One request that was let in. It ends with `over`, whatever becomes of it."""

    __slots__ = ("_doors", "_open", "key", "name")

    def __init__(self, doors: Doors, key: Key, name: str) -> None:
        self._doors = doors
        self._open = True
        self.key = key
        self.name = name

    def prompt(self, tokens: int) -> None:
        """Count the prompt's tokens. Raises `LimitExceeded` or `TooLarge`."""
        self._doors.prompt(self.key, tokens)

    def headers(self) -> Headers:
        """What an answer says of the limits."""
        return self._doors.headers(self.key)

    def over(self, output: int) -> None:
        """The request has ended, with so many tokens of its answer."""
        if self._open:
            self._open = False
            self._doors.left(self, max(0, output))


class Doors:
    """The doors of one gateway, whose name as a writer of the log is `writer`."""

    def __init__(self, keys: Keys, writer: str) -> None:
        self.keys = keys
        self.used = Tenants(writer)
        self.measured = ByTenant()
        self._names: set[str] = set()
        """Of requests that are inside."""

    def key_of(self, headers: Iterable[tuple[bytes, bytes]]) -> Key:
        """The key that a request came with. Raises `Unauthorized`."""
        given = b""
        for name, value in headers:
            if name == b"x-api-key":
                given = value
            elif name == b"authorization" and not given and value[: len(_BEARER)].lower() == _BEARER:
                given = value[len(_BEARER) :]
        given = given.strip()
        if not given:
            raise Unauthorized("this gateway asks for a key: send it as `Authorization: Bearer KEY`, or as `x-api-key`")
        key = self.keys.find(given)
        if key is None:
            raise Unauthorized("the key is not one of this gateway's; it was mistyped, or taken back")
        return key

    def check_model(self, key: Key, model: str) -> None:
        """Raise `Forbidden` unless a key is for a model."""
        if not key.may(model):
            raise Forbidden(
                f"the key {key.name!r} is not for model {model[:80]!r}; it is for {', '.join(key.models)[:500]}"
            )

    def is_free(self, name: str) -> bool:
        """Whether no request of this name is on its way, whoever's: one that ends must not end another."""
        return name not in self._names and not self.used.runs(name)

    def enter(self, key: Key, model: str, name: str) -> Visit:
        """Let a request in. Raises `Forbidden` or `LimitExceeded`."""
        self.check_model(key, model)
        now = time.time()
        excess = self.used.enter(key.name, key.limits, now)
        if excess is not None:
            raise self._refused(key, excess)
        self._names.add(name)
        return Visit(self, key, name)

    def ask(self, key: Key, model: str, name: str, *, dry_run: bool) -> None:
        """Let a question about a decision in. Raises `Forbidden` or `LimitExceeded`."""
        if not dry_run:
            # Nothing would end it, and it would count for all.
            raise Forbidden('with a key, /route is for asking only: add "dry_run": true, or send the request itself')
        self.enter(key, model, name).over(0)

    def prompt(self, key: Key, tokens: int) -> None:
        """Count a prompt's tokens. Raises `LimitExceeded` or `TooLarge`."""
        most = key.tokens_per_minute
        if most and tokens > most:
            self.measured.limited(key.name, "tokens")
            raise TooLarge(f"the prompt has {tokens:,} tokens, and {key.name!r} may use {most:,} a minute")
        excess = self.used.prompt(key.name, key.limits, tokens, time.time())
        if excess is not None:
            raise self._refused(key, excess, tokens)

    def left(self, visit: Visit, output: int) -> None:
        """A request has ended."""
        self._names.discard(visit.name)
        self.used.over(visit.key.name, time.time(), output=output)

    def headers(self, key: Key) -> Headers:
        """What an answer to a key's request says of its limits, as OpenAI's does."""
        if not (key.requests_per_minute or key.tokens_per_minute):
            return []
        now = time.time()
        used = self.used.of(key.name, now)
        found: Headers = []
        reset = used.reset(now)
        if key.requests_per_minute:
            found += _said(b"requests", key.requests_per_minute, used.requests, reset)
        if key.tokens_per_minute:
            found += _said(b"tokens", key.tokens_per_minute, used.tokens, reset)
        return found

    def _refused(self, key: Key, excess: Excess, tokens: int = 0) -> LimitExceeded:
        self.measured.limited(key.name, excess.limit)
        used: Usage = self.used.of(key.name, time.time())
        most = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute, "concurrent": key.concurrent}
        sentence = _SAYS[excess.limit].format(name=key.name, most=most[excess.limit], used=used.tokens, asked=tokens)
        return LimitExceeded(sentence, retry_after=max(1.0, excess.seconds), headers=self.headers(key))


def _said(what: bytes, most: int, used: int, reset: float) -> Headers:
    return [
        (b"x-ratelimit-limit-" + what, b"%d" % most),
        (b"x-ratelimit-remaining-" + what, b"%d" % max(0, most - used)),
        (b"x-ratelimit-reset-" + what, b"%ds" % math.ceil(reset if used else 0)),
    ]
