"""Block hashes of texts that are known, by digest. Pure.

A *prefix* is a text up to a cut (`tokenizer`): how many tokens it has, the hashes of its full blocks, and the tokens that fill
no block yet. It holds only what it adds to the prefix before it. Prefixes that are used least go first, when all of them
take more than `most` bytes; the ones below a used one are used with it, so a known prefix is known from its beginning.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from kvplane.events.hashing import block_hashes

if TYPE_CHECKING:
    from collections.abc import Sequence

_HASH = 8
PREFIX_BYTES = 320
"""What one takes beside its hashes and tokens, with its key and its places in tables (CPython, 64 bits)."""


class Prefix:
    """A known text up to a cut."""

    __slots__ = ("before", "hashes", "key", "rest", "tokens")

    def __init__(self, key: bytes, before: Prefix | None, tokens: int, hashes: bytes, rest: array[int]) -> None:
        self.key = key
        self.before = before
        self.tokens = tokens
        self.hashes = hashes
        """Packed, of the blocks that the prefix before does not have."""
        self.rest = rest
        """Tokens after the last full block."""

    @property
    def last(self) -> int | None:
        """The last hash."""
        at: Prefix | None = self
        while at is not None and not at.hashes:
            at = at.before
        return None if at is None else int.from_bytes(at.hashes[-_HASH:], "little")

    def all_hashes(self) -> bytes:
        """Packed hashes of all full blocks."""
        parts = []
        at: Prefix | None = self
        while at is not None:
            parts.append(at.hashes)
            at = at.before
        parts.reverse()
        return b"".join(parts)


def keys(begin: bytes, text: bytes, ends: Sequence[int]) -> list[bytes]:
    """Keys of a text that follows the prefix of the key `begin`, at each of its cuts but its end."""
    found, at = [], 0
    for end in ends[:-1]:
        begin = xxh3_128_digest(begin + text[at:end])
        found.append(begin)
        at = end
    return found


class Hasher:
    """How the blocks of a chain are hashed."""

    __slots__ = ("block_size", "lora", "salt", "seed")

    def __init__(self, block_size: int, lora: str = "", salt: str = "") -> None:
        self.block_size = block_size
        self.lora, self.salt = lora, salt
        self.seed = xxh3_128_digest(b"\0".join((b"%d" % block_size, lora.encode(), salt.encode("utf-8", "replace"))))
        """The key before its texts: what is hashed in another way has other keys."""

    def hashes(self, ids: Sequence[int]) -> bytes:
        """Packed hashes of the full blocks of a whole prompt."""
        return block_hashes(ids, self.block_size, lora=self.lora, salt=self.salt)

    def extended(self, before: Prefix | None, key: bytes, ids: Sequence[int]) -> Prefix:
        """The prefix, or the empty text, with more tokens."""
        before = before or _EMPTY
        tokens = before.rest + array("I", ids)
        parent = before.last if before.tokens >= self.block_size else None
        full = len(tokens) - len(tokens) % self.block_size
        hashes = (
            block_hashes(tokens[:full], self.block_size, lora=self.lora, salt=self.salt, parent=parent) if full else b""
        )
        return Prefix(key, before, before.tokens + len(ids), hashes, tokens[full:])


_EMPTY = Prefix(b"", None, 0, b"", array("I"))


class Prefixes:
    """Those that are kept, in the order of their use."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()
        self.held_bytes = 0

    def find(self, key: bytes) -> Prefix | None:
        """The prefix of this key, which is then used."""
        found = self._known.get(key)
        if found is not None:
            self._used(found)
        return found

    def longest(self, names: Sequence[bytes]) -> tuple[int, Prefix | None]:
        """The longest known prefix of a text whose cuts have these keys, and how many of the keys it has."""
        for at in range(len(names) - 1, -1, -1):
            if names[at] in self._known:
                return at + 1, self.find(names[at])
        return 0, None

    def _used(self, prefix: Prefix) -> None:
        """It was asked for: it and those before it go last, the longest of them first."""
        chain = []
        at: Prefix | None = prefix
        while at is not None and at.key:
            chain.append(at)
            at = at.before
        # The longest one is the oldest then: a chain goes from its end, so that what stays can be used.
        for each in chain:
            if each.key in self._known:
                self._known.move_to_end(each.key)

    def keep(self, prefix: Prefix) -> None:
        """Remember it."""
        if prefix.key in self._known:
            return
        self._known[prefix.key] = prefix
        self.held_bytes += _size(prefix)
        while self.held_bytes > self._most and self._known:
            _, gone = self._known.popitem(last=False)
            self.held_bytes -= _size(gone)


def _size(prefix: Prefix) -> int:
    return PREFIX_BYTES + len(prefix.hashes) + 4 * len(prefix.rest)
