"""A model whose prompts' tokens are found here: `begin` a request, find the tokens of its pieces, `finish` it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from xxhash import xxh3_128_digest

from kvplane.services.tokens import conversation, turns
from kvplane.services.tokens.errors import Elsewhere
from kvplane.services.tokens.prefixes import Hasher, Prefix, Prefixes, keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.tokens.conversation import Chat
    from kvplane.services.tokens.template import Template
    from kvplane.services.tokens.tokenizer import Tokenizer
    from kvplane.services.tokens.turns import Shape, Turn

MEMORY_BYTES = 256 << 20
"""What a model's known texts may take. 1,000 conversations of 100,000 tokens in blocks of 16 take some 185 MB."""
_TURNS_PART = 8
_MOST_TOOLS = 64
_MOST_ENDS = 1_000
CHECKED = 64
"""One in so many requests that are rendered from their new messages is rendered whole as well."""


class Known(NamedTuple):
    """A prompt: packed hashes of its full blocks, and how many tokens it has."""

    hashes: bytes
    tokens: int


class Work(NamedTuple):
    """A request that waits for the tokens of its new pieces."""

    hasher: Hasher
    before: Prefix | None
    keys: list[bytes]
    """Of the pieces but the last one, which ends where the text ends."""
    pieces: list[str]
    turn: tuple[bytes, Turn] | None
    """What is remembered of the conversation when it is done."""

    @property
    def size(self) -> int:
        """Characters whose tokens are to be found."""
        return sum(map(len, self.pieces))


class Text(NamedTuple):
    """What a prompt's text ends with, after the prefix `before`; and what it is remembered by."""

    before: Prefix | None
    end: bytes
    turn: tuple[bytes, Shape, str] | None
    """Key and shape of the conversation, and what its text ends with only because the model is asked to answer."""


class Model:
    """One model's template and tokenizer, and the texts of it that are known."""

    def __init__(self, template: Template | None, tokenizer: Tokenizer, memory: int = MEMORY_BYTES) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.prefixes = Prefixes(memory - memory // _TURNS_PART)
        self.turns = turns.Turns(memory // _TURNS_PART)
        self.by_new_messages: frozenset[str] = frozenset()
        """Roles of new messages that may be rendered without those before them; found out by `proof.tried`."""
        self.grown = self.whole = self.differed = 0
        """Texts rendered from new messages, rendered whole, and those that came out differently by the two ways."""
        self._tools: dict[bytes, list[conversation.Tool] | None] = {}
        self._ends: dict[tuple[bytes, str], str] = {}

    @property
    def held_bytes(self) -> int:
        """What the known texts take."""
        return self.prefixes.held_bytes + self.turns.held_bytes

    def begin_chat(self, asked: Chat, hasher: Hasher, messages: list[msgspec.Raw] | None = None) -> Work:
        """A chat; `messages` are its own, if they are apart already. Raises `Elsewhere`."""
        template = self.template
        if template is None:
            raise Elsewhere("the model has no chat template")
        if template.by_date:
            raise Elsewhere("the chat template writes the engine's date")
        conversation.check(asked)
        given = conversation.variables(asked)
        raw_tools = bytes(asked.tools)
        about = xxh3_128_digest(
            b"\0".join(
                (hasher.seed, raw_tools, bytes(asked.chat_template_kwargs), repr(asked.reasoning_effort).encode())
            )
        )
        try:
            if messages is None:
                messages = conversation.split(asked.messages)
            if not messages:
                raise Elsewhere("the request has no messages")
            rendered = self._text(messages, self._read_tools(raw_tools), given, about, hasher.seed)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Elsewhere(f"the request is not read here: {error}") from None
        return self._work(hasher, rendered)

    def begin_text(self, prompt: str, hasher: Hasher) -> Work:
        """A completion's prompt. Raises `Elsewhere`."""
        if self.tokenizer.begin is None:
            raise Elsewhere("the tokenizer adds more than a beginning to prompts")
        before = None
        if self.tokenizer.begin:
            key = xxh3_128_digest(hasher.seed + b"begin")
            before = self.prefixes.find(key)
            if before is None:
                before = hasher.extended(None, key, self.tokenizer.begin)
                self.prefixes.keep(before)
        return self._work(hasher, Text(before, _encoded(prompt), None))

    def finish(self, work: Work, ids: Sequence[Sequence[int]]) -> Known:
        """The prompt, when the ids of its pieces are there."""
        at = work.before
        for key, piece in zip(work.keys, ids, strict=False):
            at = work.hasher.extended(at, key, piece)
            self.prefixes.keep(at)
        end = work.hasher.extended(at, b"", ids[-1])
        if work.turn is not None:
            self.turns.keep(*work.turn)
        return Known(end.all_hashes(), end.tokens)

    def now(self, work: Work) -> Known:
        """The prompt, at once."""
        return self.finish(work, self.tokenizer.ids(work.pieces))

    def whole_text(self, messages: Sequence[msgspec.Raw], tools: object, given: dict[str, Any]) -> str:
        """The text of a conversation, rendered whole."""
        assert self.template is not None  # noqa: S101 - callers have looked
        made = [conversation.message(each, parts=self.template.parts) for each in messages]
        return self.template.text(conversation.arranged(made, self.template), tools, given, prompt=True)

    def parts_of(self, asked: Chat) -> tuple[str, set[str]]:
        """The text of a chat, and the roles whose new messages do not come out as in it, at any cut. Raises `Elsewhere`."""
        messages, given = conversation.split(asked.messages), conversation.variables(asked)
        tools = conversation.tools(bytes(asked.tools))
        roles = [turns.role(each) for each in messages]
        text = self.whole_text(messages, tools, given)
        broken: set[str] = set()
        for cut in range(1, len(messages)):
            shape = turns.grown(turns.EMPTY, roles[:cut])
            if roles[cut] != "assistant" or shape is None:
                continue
            kept = [messages[at] for at in shape.kept()]
            try:
                before = self.whole_text(messages[:cut], tools, given)
                added, asks = self._added(kept, messages[cut:], tools, given), self._added(kept, [], tools, given)
            except Elsewhere:
                added = asks = None
            right = (
                added is not None
                and asks is not None
                and before.endswith(asks)
                and (before[: len(before) - len(asks)] + added == text)
            )
            if not right:
                # With a user's message among the new ones it is that which changes what came before.
                broken |= {"user"} if "user" in roles[cut:] else {"assistant"}
        return text, broken

    def _read_tools(self, raw: bytes) -> list[conversation.Tool] | None:
        found = self._tools.get(raw)
        if found is None and raw not in self._tools:
            found = conversation.tools(raw)
            if len(self._tools) >= _MOST_TOOLS:
                del self._tools[next(iter(self._tools))]
            self._tools[raw] = found
        return found

    def _text(
        self, messages: list[msgspec.Raw], tools: object, given: dict[str, Any], about: bytes, seed: bytes
    ) -> Text:
        digests = turns.digests(about, messages) if self.by_new_messages else []
        found = self._from_turn(messages, tools, given, about, digests) if digests else None
        if found is not None:
            self.grown += 1
            if self.grown % CHECKED:
                return found
        self.whole += 1
        text = self.whole_text(messages, tools, given)
        encoded = _encoded(text)
        if found is not None:
            if self._same(found, encoded, seed):
                return found
            self.differed += 1
            self.by_new_messages = frozenset()
            digests = []
        shape = turns.grown(turns.EMPTY, [turns.role(each) for each in messages]) if digests else None
        return Text(None, encoded, self._remembered(shape, digests, messages, tools, given, about, text))

    def _same(self, found: Text, whole: bytes, seed: bytes) -> bool:
        """Whether a text that was rendered from its new messages is the one that was rendered whole."""
        if not whole.endswith(found.end):
            return False
        begin = len(whole) - len(found.end)
        if found.before is None:
            return begin == 0
        ends = self.tokenizer.pieces(whole)
        return begin in ends[:-1] and keys(seed, whole, ends)[ends.index(begin)] == found.before.key

    def _from_turn(
        self, messages: list[msgspec.Raw], tools: object, given: dict[str, Any], about: bytes, digests: list[bytes]
    ) -> Text | None:
        turn = self.turns.longest(digests)
        if turn is None or self.template is None:
            return None
        new = messages[turn.shape.messages :]
        roles = [turns.role(each) for each in new]
        if roles[0] != "assistant" or not self.by_new_messages.issuperset(roles):
            return None
        before = self.prefixes.find(turn.key) if turn.key else None
        shape = turns.grown(turn.shape, roles)
        if (before is None and turn.key) or shape is None:
            return None
        added = self._added([messages[at] for at in turn.shape.kept()], new, tools, given)
        if added is None:
            return None
        return Text(
            before, turn.rest + _encoded(added), self._remembered(shape, digests, messages, tools, given, about, added)
        )

    def _added(
        self, kept: list[msgspec.Raw], new: list[msgspec.Raw], tools: object, given: dict[str, Any]
    ) -> str | None:
        """What the new messages add to the text of a conversation of which these are kept."""
        template = self.template
        assert template is not None  # noqa: S101 - callers have looked
        known = [conversation.message(each, parts=template.parts) for each in kept]
        more = [conversation.message(each, parts=template.parts) for each in new]
        alone = template.text(conversation.arranged(known, template), tools, given, prompt=False)
        both = template.text(conversation.arranged([*known, *more], template), tools, given, prompt=True)
        return both[len(alone) :] if both.startswith(alone) else None

    def _remembered(
        self,
        shape: Shape | None,
        digests: list[bytes],
        messages: list[msgspec.Raw],
        tools: object,
        given: dict[str, Any],
        about: bytes,
        text: str,
    ) -> tuple[bytes, Shape, str] | None:
        """What a conversation is remembered by; none if it is not known where its text ends before the model's answer."""
        if shape is None:
            return None
        end = self._ends.get((about, shape.last))
        if end is None:
            added = self._added([messages[at] for at in shape.kept()], [], tools, given)
            if added is None:
                return None
            if len(self._ends) >= _MOST_ENDS:
                self._ends.clear()
            end = self._ends[about, shape.last] = added
        return (digests[-1], shape, end) if text.endswith(end) else None

    def _work(self, hasher: Hasher, text: Text) -> Work:
        ends = self.tokenizer.pieces(text.end)
        first = text.before.key if text.before is not None else hasher.seed
        names = keys(first, text.end, ends)
        known, before = self.prefixes.longest(names)
        if before is None:
            before = text.before
        begins = [0, *ends[:-1]]
        turn = None
        if text.turn is not None:
            turn = _turn(text, names, ends)
        return Work(
            hasher, before, names[known:],
            [text.end[begin:end].decode() for begin, end in zip(begins[known:], ends[known:], strict=True)], turn,
        )  # fmt: skip


def _turn(text: Text, names: list[bytes], ends: list[int]) -> tuple[bytes, Turn] | None:
    """The turn: its text is cut before what only asks the model to answer."""
    assert text.turn is not None  # noqa: S101 - the caller has looked
    key, shape, asks = text.turn
    length = len(text.end) - len(asks.encode())
    cuts = [0, *ends[:-1]]
    at = max((place for place, cut in enumerate(cuts) if cut <= length), default=0)
    rest = text.end[cuts[at] : length]
    if length < 0 or len(rest) > turns.MOST_REST:
        return None
    before = names[at - 1] if at else (text.before.key if text.before is not None else b"")
    return key, turns.Turn(before, rest, shape)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Elsewhere("the prompt has lone surrogates") from None
