"""The block size of a trace: what its lines say, or what their lengths allow.

A line with `tokens` tokens and `ids` block ids bounds the size. The last block may be full or partial, and a partial one may
have an id or not, so `ids` is `tokens / size` rounded down or up: `tokens / (ids + 1) < size < tokens / (ids - 1)`. Each
line narrows what the lines before it allow. When several sizes are left, the one that engines use is taken.
"""

from __future__ import annotations

from msgspec import Struct

from kvplane.services.protocol.errors import BadTrace

MOST_BLOCK_SIZE = 65536


class Bound(Struct, frozen=True):
    """A limit of the size, and the line that sets it; line 0 is whoever named the size with an option."""

    size: int
    line: int = 0
    tokens: int = 0
    ids: int = 0

    def __str__(self) -> str:
        if not self.line:
            return f"--block-size is {self.size:,}"
        if not self.tokens and not self.ids:
            return f"line {self.line:,} says block_size {self.size:,}"
        return f"line {self.line:,} has {self.ids:,} hash_ids for {self.tokens:,} tokens"


def allowed(tokens: int, ids: int) -> tuple[int, int]:
    """Least and most block size with which so many tokens have so many ids; the least is more than the most when none does."""
    if not tokens and ids:
        return 1, 0
    least = tokens // (ids + 1) + 1 if tokens else 1
    most = -(-tokens // (ids - 1)) - 1 if ids > 1 else MOST_BLOCK_SIZE
    return least, min(most, MOST_BLOCK_SIZE)


class BlockSize:
    """What is known of a trace's block size, line by line. `given` is what the one who asks says it is."""

    def __init__(self, given: int | None = None) -> None:
        self._stated = None if given is None else Bound(given)
        self._least = Bound(1)
        self._most = Bound(MOST_BLOCK_SIZE)

    def line(self, number: int, tokens: int, ids: int, stated: int | None = None) -> None:
        """Take a line into account. Raises `BadTrace` with both figures when it contradicts what is known."""
        if stated is not None:
            self._take_stated(Bound(stated, number))
        least, most = allowed(tokens, ids)
        here = Bound(0, number, tokens, ids)
        if least > most:
            raise BadTrace(f"{here}, which no block size from 1 to {MOST_BLOCK_SIZE:,} gives")
        if self._stated is not None:
            if not least <= self._stated.size <= most:
                raise BadTrace(f"{here}, which takes blocks of {_range(least, most)} tokens, but {self._stated}")
            return
        if least > self._most.size or most < self._least.size:
            other = self._most if least > self._most.size else self._least
            before = allowed(other.tokens, other.ids)
            raise BadTrace(
                f"{here}, which takes blocks of {_range(least, most)} tokens, but {other}, which takes "
                f"{_range(*before)}; is it one trace?"
            )
        if least > self._least.size:
            self._least = Bound(least, number, tokens, ids)
        if most < self._most.size:
            self._most = Bound(most, number, tokens, ids)

    def _take_stated(self, stated: Bound) -> None:
        if self._stated is None:
            if not self._least.size <= stated.size <= self._most.size:
                other = self._least if stated.size < self._least.size else self._most
                takes = _range(*allowed(other.tokens, other.ids))
                raise BadTrace(f"{stated}, but {other}, which takes blocks of {takes} tokens")
            self._stated = stated
        elif self._stated.size != stated.size:
            raise BadTrace(f"{stated}, but {self._stated}")

    @property
    def inferred(self) -> bool:
        """Whether nobody says the size."""
        return self._stated is None

    def size(self) -> int:
        """The block size. Raises `BadTrace` when the lines allow several sizes, of which none is the only usual one."""
        if self._stated is not None:
            return self._stated.size
        least, most = self._least.size, self._most.size
        if least == most:
            return least
        # Engines and traces use powers of two; some engines' sizes are other multiples of 16.
        powers = [1 << power for power in range(17) if least <= 1 << power <= most]
        sixteens = range(-(-least // 16) * 16, most + 1, 16)
        for usual in (powers, sixteens):
            if len(usual) == 1:
                return usual[0]
        raise BadTrace(
            f"it doesn't say its block size, and its lines allow {_range(least, most)} tokens; name the size with --block-size"
        )


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
