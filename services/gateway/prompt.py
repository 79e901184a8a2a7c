"""The tokens of a request, so that its blocks have the names under which engines report them.

Token ids that the client gives are taken as they are. Those of a model whose files are here are found here (`local`).
Anything else is asked of an engine of the model, which applies its own template: `POST {path}/render` with the unchanged body
where there is such an endpoint (vLLM), else `/tokenize`, which leaves out what it does not know. A prompt whose tokens nobody
gives is routed by load and session.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import structlog

from kvplane.services.dataplane import openai
from kvplane.services.dataplane.prompts import LOCAL, NO_SUCH_ENDPOINT, RENDER, RENDERS_NOT, TOKENIZE, Lacking, told
from kvplane.services.gateway import api
from kvplane.services.gateway.local import Rendered
from kvplane.services.http.pool import Pool, origin, request_head
from kvplane.services.protocol.errors import EngineFailed, NoNode, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplane.services.gateway.api import Asked
    from kvplane.services.gateway.local import LocalPrompts

RENDER_SECONDS = 10.0
ATTEMPTS = 3
TOKENS_BYTES = 64 << 20
"""Longest list of tokens that is taken from an engine."""
BYTES_A_TOKEN = 4
"""Guessed of a prompt whose tokens nobody gives."""

_log = structlog.get_logger("kvplane.gateway")


_JSON = b"content-type: application/json\r\n"
_TOKENIZED = frozenset((api.CHAT, api.COMPLETIONS))
"""What `/tokenize` understands."""
_MEDIA = re.compile(rb'"type"\s*:\s*"(?:(?:input_)?(?:image|audio|video|file)(?:_url|_embeds|_pil)?|document)"').search
"""Finds parts that are no text. In a text the quotes are escaped."""


class Prompt(NamedTuple):
    """A prompt's tokens or hashes, or only about how many tokens it has. Source: as in `sources` of metrics."""

    ids: list[int] | None
    tokens: int
    source: str
    hashes: bytes = b""


class Anyone(NamedTuple):
    """An engine that can be asked."""

    node: str
    address: str


class Prompts:
    """Gets prompts. `clock` gives seconds."""

    def __init__(
        self, pool: Pool, clock: Callable[[], float], local: LocalPrompts,
        anyone: Callable[[str, frozenset[str]], Anyone], engine_key: bytes = b"",
    ) -> None:  # fmt: skip
        self._anyone = anyone
        self._engine_key = engine_key
        """The line of a head with which engines are asked, when not with what the client sent."""
        self._local = local
        self._pool = pool
        self._clock = clock
        self._lacking = Lacking()
        self._warned: set[tuple[str, str]] = set()

    async def prompt(self, asked: Asked, credentials: bytes, *, with_ids: bool = False) -> Prompt:
        """The prompt of a request; with its ids even where hashes are found here. Raises `NoNode`, `Overloaded`."""
        ids = api.token_ids(asked)
        if ids is not None:
            return Prompt(ids, len(ids), "client")
        guess = api.length(asked) // BYTES_A_TOKEN
        if _MEDIA(asked.body):
            # Their blocks have keys that only the engine knows.
            return Prompt(None, guess, "none")
        known = await self._local.find(asked, credentials) if not with_ids else None
        if known is not None:
            return Prompt(None, known.tokens, LOCAL, known.hashes)
        tried: frozenset[str] = frozenset()
        for _ in range(ATTEMPTS):
            try:
                engine = self._anyone(asked.model, tried)
            except (NoNode, Overloaded):
                if not tried:
                    raise
                # Whether they can answer the request itself is another question.
                break
            try:
                found = await self._ask(engine, asked, credentials)
            except EngineFailed as error:
                _log.info("prompt_not_told", node=engine.node, error=str(error))
                tried |= {engine.node}
                continue
            if found is None:
                break
            return Prompt(found[0], len(found[0]), found[1])
        self._warn(asked.model, "no engine gives its prompts' tokens: routed by load and session, not by cache")
        return Prompt(None, guess, "none")

    async def rendered(self, asked: Asked, credentials: bytes) -> Rendered | None:
        """What an engine says of a request's tokens. Raises `EngineFailed`, `NoNode`, `Overloaded`."""
        engine = self._anyone(asked.model, frozenset())
        status, answer = await self._post(engine, f"{asked.path}/{RENDER}", asked.body, credentials)
        return Rendered(engine.node, told(answer)) if status == 200 else None

    async def _ask(self, engine: Anyone, asked: Asked, credentials: bytes) -> tuple[list[int], str] | None:
        """Token ids by one engine, and which endpoint gave them; none when it won't. Raises `EngineFailed`."""
        now, renders = self._clock(), f"{asked.path}/{RENDER}"
        if self._lacking.may(engine.node, renders, now):
            status, answer = await self._post(engine, renders, asked.body, credentials)
            if status == 200:
                ids = told(answer)
                if ids is not None:
                    # The engine has truncated them already.
                    return ids, RENDER
            if status in NO_SUCH_ENDPOINT:
                self._lacking.note(engine.node, renders, now)
                if asked.path != api.COMPLETIONS:
                    self._warn(asked.model, RENDERS_NOT)
            elif 400 <= status < 500:
                # What is wrong with the request, the engine says when it gets it.
                return None
        if asked.path not in _TOKENIZED or not self._lacking.may(engine.node, TOKENIZE, now):
            return None
        question = openai.question(msgspec.json.decode(asked.body))
        status, answer = await self._post(engine, "/tokenize", msgspec.json.encode(question), credentials)
        if status == 200:
            ids = told(answer)
            known = api.kept(asked.fields, ids) if ids is not None else None
            return (known, TOKENIZE) if known is not None else None
        if status in NO_SUCH_ENDPOINT:
            self._lacking.note(engine.node, TOKENIZE, now)
        return None

    async def _post(self, engine: Anyone, path: str, body: bytes, credentials: bytes) -> tuple[int, bytes]:
        where = origin(engine.address)
        head = request_head(where, b"POST", path.encode(), len(body), _JSON + (self._engine_key or credentials))
        call = await self._pool.send(where, head, body, patience=RENDER_SECONDS)
        try:
            if call.status >= 500:
                raise EngineFailed(f"{path} answers {call.status}")
            return call.status, await call.read(TOKENS_BYTES)
        finally:
            call.release()

    def _warn(self, model: str, hint: str) -> None:
        if (model, hint) not in self._warned:
            self._warned.add((model, hint))
            _log.warning("tokens_not_known", model=model, hint=hint)
