"""Where the text of a conversation ended, so that only its new messages are rendered. Pure.

Most templates write a message as it is, whatever comes before it but for some: the system's, the last of a user, the last
answer with its tools' results. Those few are the *kept* messages. What the template makes of the new messages is then
what it makes of the kept ones and the new ones, less what it makes of the kept ones alone. It is not so for every template
(some leave earlier reasoning out when a user speaks again), so each is tried with many conversations first (`proof.tried`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from xxhash import xxh3_128

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_REST = 1 << 16
"""Longest end of a text after its last cut that is remembered, in bytes."""
TURN_BYTES = 400
_SYSTEM = frozenset(("system", "developer"))


class _Role(msgspec.Struct, frozen=True, gc=False):
    role: str = ""


_role = msgspec.json.Decoder(_Role).decode


def role(raw: msgspec.Raw) -> str:
    """Whose message it is."""
    return _role(raw).role


class Shape(NamedTuple):
    """Which messages are kept of a conversation of so many `messages`."""

    messages: int
    systems: int
    """So many at the beginning are of the system."""
    user: int
    """Place of the last message of a user, -1 if there is none."""
    answer: int
    """Place of the last answer, -1 if there is none."""
    last: str
    """Role of the last message."""

    def kept(self) -> list[int]:
        """Their places."""
        begin = max(self.user, self.answer)
        if begin < 0:
            begin = self.systems
        user = [self.user] if self.systems <= self.user < begin else []
        return [*range(self.systems), *user, *range(max(begin, self.systems), self.messages)]


EMPTY = Shape(0, 0, -1, -1, "")


def grown(shape: Shape, roles: Sequence[str]) -> Shape | None:
    """The shape with further messages; none if the system speaks in between, where templates do as they like."""
    count, systems, user, answer = shape.messages, shape.systems, shape.user, shape.answer
    for name in roles:
        if name in _SYSTEM:
            if systems != count:
                return None
            systems += 1
        elif name == "user":
            user = count
        elif name == "assistant":
            answer = count
        count += 1
    return Shape(count, systems, user, answer, roles[-1] if roles else shape.last)


class Turn(NamedTuple):
    """A conversation up to some message: its text is the prefix `key` and `rest`, without what asks the model to answer."""

    key: bytes
    rest: bytes
    shape: Shape


def digests(begin: bytes, messages: Sequence[msgspec.Raw]) -> list[bytes]:
    """Keys of a conversation after each of its messages; `begin` stands for all else that its text depends on."""
    running = xxh3_128(begin)
    found = []
    for message in messages:
        raw = bytes(message)
        running.update(b"%d:" % len(raw))
        running.update(raw)
        found.append(running.digest())
    return found


class Turns:
    """Those that are remembered, in the order of their use."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[bytes, Turn] = OrderedDict()
        self.held_bytes = 0

    def longest(self, keys: Sequence[bytes]) -> Turn | None:
        """The turn that has most of a conversation's messages, but not all of them."""
        for key in reversed(keys[:-1]):
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                return found
        return None

    def keep(self, key: bytes, turn: Turn) -> None:
        """Remember it."""
        before = self._known.pop(key, None)
        if before is not None:
            self.held_bytes -= TURN_BYTES + len(before.rest)
        self._known[key] = turn
        self.held_bytes += TURN_BYTES + len(turn.rest)
        while self.held_bytes > self._most and self._known:
            _, gone = self._known.popitem(last=False)
            self.held_bytes -= TURN_BYTES + len(gone.rest)
