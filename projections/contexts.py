"""Contexts: what the conversations that go on will need of each node's cache.

A prompt that was served is likely to be asked for again, longer: the conversation that it belongs to goes on. Until it has
been silent for `LIVE_SECONDS`, its last prompt is its context, and counts where that was sent. The sum of contexts is what a
node has to keep. It is known before the cache is full, and differs from what lies there: mostly of conversations that are over.

A request that names its session belongs to that, once there is one. Any other one belongs to the conversation whose last
prompt it goes on from, if that had no name; it is found by the last full block of that prompt, so a beginning that many share
makes no conversation.

Kept only in a log of `CONTEXTS_FORMAT` or a later one: earlier logs fold as they always did.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from kvplane.events.hashing import unpack_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvplane.events.types import RequestRouted

CONTEXTS_FORMAT = 3
"""From this format of the log on, contexts are kept."""
LIVE_SECONDS = 600
"""So long after its last request a conversation is expected to go on, in seconds of log time."""
CONTEXTS_LIMIT = 200_000
"""Most contexts remembered; the ones silent for longest are forgotten."""
LOOKED_AT_BLOCKS = 32
"""So many blocks before the end of what is known of a prompt its conversation is looked for: an answer's length and more."""

FOREVER = 1 << 63
_NS = 1_000_000_000
_HASH = 8


class Context(Struct, frozen=True, gc=False):
    """The last prompt of a conversation: where it was sent, its tokens, and the log's time in unix nanoseconds."""

    node: str
    tokens: int
    turns: int
    """How many requests the conversation has had, this one included."""
    time: int


def session_key(model: str, session: str) -> bytes:
    """The key of a named conversation; that of one without a name is the last full block of its last prompt."""
    return f"{model}\0{session}".encode()


class Talk(Struct, gc=False):
    """What goes on in a conversation: requests that run, and the log's time of the last answer in unix nanoseconds."""

    running: list[str] = []
    answered: int = 0


class Contexts(OrderedDict[bytes | int, Context]):
    """Live contexts, those silent for longest first, and their tokens by the nodes' ordinals."""

    def __init__(self) -> None:
        super().__init__()
        self.listening = False
        """Whether answers are listened for, as they are while the policy holds (`projections.held`)."""
        self.talks: dict[bytes | int, Talk] = {}
        """Of conversations that asked since then."""
        self.asked: dict[str, Talk] = {}
        """The same by requests that run."""
        self.kept = False
        """Whether the log is in a format in which they are."""
        self.tokens = array("d")
        """Tokens of the contexts of each node; they follow from the contexts, as does the next."""
        self.turns = 0
        """Requests of all live conversations."""

    def fit(self, count: int) -> None:
        """Have a place for so many nodes."""
        missing = count - len(self.tokens)
        if missing > 0:
            # A new array, since decisions may look at the old one, which can't grow then.
            self.tokens = self.tokens + array("d", [0] * missing)

    def key(self, model: str, session: str, hashes: bytes, known: int) -> bytes | int | None:
        """The key of the conversation that a request goes on with; none when it isn't known.

        `known` is how many leading blocks of the prompt any node holds: where it went on last time can't be behind.
        """
        if session and (key := session_key(model, session)) in self:
            return key
        # One that is named only now may have begun without a name.
        blocks = unpack_hashes(hashes[max(known - LOOKED_AT_BLOCKS, 0) * _HASH : known * _HASH])
        if self.keys().isdisjoint(blocks):
            return None
        return next(block for block in reversed(blocks) if block in self)

    def routed(self, event: RequestRouted, ordinals: Mapping[str, int], time: int) -> None:
        """A request goes to a node that is known here."""
        self._expire(ordinals, time)
        before = self.key(event.model, event.session, event.hashes, max(event.best, event.match))
        turns = 1
        talk = None
        if before is not None:
            turns += self[before].turns
            talk = self.talks.get(before)
            self._forget(before, ordinals)
        key: bytes | int
        if event.session:
            key = session_key(event.model, event.session)
        elif event.hashes:
            (key,) = unpack_hashes(event.hashes[-_HASH:])
        else:
            return
        if key in self:
            self._forget(key, ordinals)
        if self.listening:
            talk = self.talks[key] = self.asked[event.request] = talk or Talk()
            talk.running.append(event.request)
        self[key] = Context(event.node, event.tokens, turns, time)
        self.turns += turns
        self.tokens[ordinals[event.node]] += event.tokens
        if len(self) > CONTEXTS_LIMIT:
            self._forget(next(iter(self)), ordinals)

    def _expire(self, ordinals: Mapping[str, int], time: int) -> None:
        before = time - LIVE_SECONDS * _NS
        while self:
            oldest = next(iter(self))
            if self[oldest].time >= before:
                break
            self._forget(oldest, ordinals)

    def over(self, request: str, time: int) -> None:
        """A request is over."""
        talk = self.asked.pop(request, None)
        if talk is not None:
            talk.running.remove(request)
            talk.answered = time

    def gone(self, request: str) -> None:
        """A request is over together with its node."""
        talk = self.asked.pop(request, None)
        if talk is not None:
            talk.running.remove(request)

    def heard(self, key: bytes | int) -> int:
        """When something was asked or answered last in a conversation; one that waits for an answer is never silent."""
        talk = self.talks.get(key)
        if talk is None:
            return self[key].time
        return FOREVER if talk.running else max(talk.answered, self[key].time)

    def listen(self, *, listening: bool) -> None:
        """Listen for answers from now on, or no more."""
        self.listening = listening
        if not listening:
            self.talks, self.asked = {}, {}

    def _forget(self, key: bytes | int, ordinals: Mapping[str, int]) -> None:
        context = self.pop(key)
        if self.talks:
            self.talks.pop(key, None)
        self.tokens[ordinals[context.node]] -= context.tokens
        self.turns -= context.turns

    def ended(self, model: str, session: str, ordinals: Mapping[str, int]) -> None:
        """A session has ended."""
        key = session_key(model, session)
        if key in self:
            self._forget(key, ordinals)

    def node_gone(self, node: str, at: int) -> None:
        """A node keeps nothing any more."""
        for key in [key for key, context in self.items() if context.node == node]:
            self.turns -= self.pop(key).turns
            self.talks.pop(key, None)
        self.tokens[at] = 0

    def adopt(self, live: Iterable[tuple[bytes | int, Context]], ordinals: Mapping[str, int]) -> None:
        """Take over contexts. Raises `KeyError` for a node that is not there."""
        self.update(live)
        for context in self.values():
            self.tokens[ordinals[context.node]] += context.tokens
            self.turns += context.turns

    def set_back(self, by: int) -> None:
        """The log's clock was ahead by so many nanoseconds and is right again."""
        self.update([(key, replace(each, time=each.time - by)) for key, each in self.items()])
        for talk in self.talks.values():
            talk.answered -= by
