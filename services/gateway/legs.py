"""The legs of one stream: what is sent to the next engine when one breaks off, and what the client is told when that can't be.

Token ids where the engine gives them: the prompt's, as an engine renders them, and the answer's, as it streamed them, go to
`/v1/completions`. Else the answer's text goes to the end of the prompt or the messages (`continue_final_message`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from kvplane.services.gateway import api, continuation
from kvplane.services.gateway.continuation import LEGS, Continuing
from kvplane.services.gateway.transcript import Kept, Transcript
from kvplane.services.protocol.errors import EngineFailed, NoNode, Overloaded

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from kvplane.services.gateway.api import Asked
    from kvplane.services.gateway.prompt import Prompt
    from kvplane.services.protocol.messages import RouteRequest


class _Find(Protocol):
    def __call__(self, asked: Asked, *, with_ids: bool = False) -> Awaitable[Prompt]: ...


class Leg(NamedTuple):
    """A request to the next engine, and what is asked of the router about it."""

    target: bytes
    body: bytes
    question: RouteRequest


class Ending(NamedTuple):
    """The stream was whole but for these events."""

    events: bytes


class NotContinued(NamedTuple):
    """Why there is no next leg."""

    why: str


def continued(asked: Asked) -> bool:
    """Whether a request is one for a stream of which notes are taken."""
    return (
        asked.fields.stream is True
        and asked.path in {api.CHAT, api.COMPLETIONS, api.MESSAGES}
        # Its client sees ids that a further leg might make anew.
        and b'"return_token_ids"' not in asked.body
    )


class Legs:
    """One stream. `find` finds a request's prompt; it raises what routers and engines raise."""

    def __init__(self, asked: Asked, known: Prompt, kept: Kept, find: _Find) -> None:
        self._asked = asked
        self._find = find
        self.transcript = Transcript(asked.path, kept, strip=asked.adds_usage)
        self._tokens = known.tokens if known.ids is not None or known.hashes else -1
        self._asks_ids = asked.path != api.MESSAGES and known.tokens <= continuation.IDS_PROMPT_TOKENS
        self._ids: list[int] | None = None
        self.number = 0
        """Of the leg that runs, from 0."""
        self._refused = False
        """An engine would not have it as tokens."""
        self._hopeless = False
        """Nor as text."""
        self._as_tokens = False

    def first(self, *, gives_ids: bool) -> bytes:
        """The body of the first leg, for an engine that gives token ids or does not."""
        if not gives_ids or not self._asks_ids:
            return self._asked.body
        self.transcript.ask_ids()
        return continuation.with_ids(self._asked.body)

    def refused(self) -> None:
        """The engine would not have the leg."""
        self._hopeless = self._hopeless or not self._as_tokens
        self._refused = self._refused or self._as_tokens

    async def next(self, question: RouteRequest) -> Leg | Ending | NotContinued:
        """What comes after a leg that broke off."""
        said, asked = self.transcript, self._asked
        may = continuation.continuing(asked)
        said.prompt = self._tokens
        if said.finished:
            wants = isinstance(may, Continuing) and may.wants_usage
            ending = said.ending("", wants_usage=wants) if isinstance(may, Continuing) else None
            return Ending(ending) if ending is not None else NotContinued("its last events are missing")
        if isinstance(may, str):
            return NotContinued(may)
        if said.spoiled:
            return NotContinued(said.spoiled)
        if self._hopeless:
            return NotContinued("an engine refused to go on with it")
        if self.number + 1 >= LEGS:
            return NotContinued(f"it broke off {LEGS} times")
        text = said.text
        if continuation.may_stop_inside(text, may.stops):
            return NotContinued("a stop string may have begun")
        # With stop strings, text is held back whose ids have come; and so it is where calls are looked for.
        sure = said.sure() if not may.stops and not may.tools else None
        if said.reasoned and sure is None:
            return NotContinued("it reasoned, and the token ids of that are not known")
        if not text and said.block < 0:
            said.go_on(None, made=0, by_tokens=False)
            return self._leg(asked.path, asked.body, question)
        return await self._after(text, sure, may, question)

    async def _after(
        self, text: str, sure: tuple[list[int], str] | None, may: Continuing, question: RouteRequest
    ) -> Leg | Ending | NotContinued:
        """The leg that goes on after a text."""
        said, asked = self.transcript, self._asked
        by_text = continuation.by_text(asked, text, said.made)
        if said.reasoned:
            by_text = None
        ids = None
        if not may.tools and not self._refused and (by_text is None or said.gives_ids):
            ids = await self._so_far(sure, text)
        if ids is None and by_text is None:
            # Nobody could say what it is to go on after.
            return NotContinued("the tokens of its prompt and answer are not known")
        prompt = len(self._ids or ())
        made = len(ids) - prompt if ids is not None else said.made
        if continuation.left(asked, made) == 0:
            said.made = made
            ending = said.ending("length", wants_usage=may.wants_usage)
            return Ending(ending) if ending is not None else NotContinued("its last events are missing")
        if ids is not None:
            self._tokens = said.prompt = prompt
            said.go_on(ids[prompt:], made=made, by_tokens=True)
            known = replace(question, tokens=ids, hashes=None, tokens_count=None)
            self._as_tokens = True
            return self._leg(api.COMPLETIONS, continuation.by_tokens(asked, ids, made), known)
        self._as_tokens = False
        known = await self._asked_anew(by_text or b"", question)
        said.go_on(None, made=made, by_tokens=False)
        return self._leg(asked.path, by_text or b"", known)

    def _leg(self, path: str, body: bytes, question: RouteRequest) -> Leg:
        self.number += 1
        return Leg(path.encode(), body, replace(question, leg=self.number))

    async def _so_far(self, sure: tuple[list[int], str] | None, text: str) -> list[int] | None:
        """Token ids of prompt and answer; none where nobody gives them."""
        ids, rest = sure if sure is not None else ([], text)
        if self._ids is None:
            self._ids = await self._told(self._asked)
        if self._ids is None:
            return None
        if rest:
            body = msgspec.json.encode({"model": self._asked.model, "prompt": rest, "add_special_tokens": False})
            more = await self._told(api.read(api.COMPLETIONS, body))
            if more is None:
                return None
            ids = [*ids, *more]
        return [*self._ids, *ids]

    async def _told(self, asked: Asked) -> list[int] | None:
        try:
            return (await self._find(asked, with_ids=True)).ids
        except (NoNode, Overloaded, EngineFailed):
            return None

    async def _asked_anew(self, body: bytes, question: RouteRequest) -> RouteRequest:
        """What is asked of the router about a leg that goes on after a text."""
        found = await self._find(api.read(self._asked.path, body))
        known = found.ids is not None
        return replace(
            question, tokens=found.ids, hashes=None if known else found.hashes, tokens_count=None if known else found.tokens
        )  # fmt: skip
