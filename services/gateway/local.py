"""Prompts whose tokens are found here, for models whose files this machine has.

A model is believed when an engine has given the same tokens to all of `proof.questions`; that is asked again whenever a node
of the model registers. It is believed no longer when answers count other prompts than were thought, or when an engine that is
asked about a few of the real requests gives other tokens. Then engines are asked for all of them, as before.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread
import msgspec
import structlog

from kvplane.services.gateway import api
from kvplane.services.protocol.errors import EngineFailed, NoNode, Overloaded
from kvplane.services.tokens import proof
from kvplane.services.tokens.errors import Elsewhere, Unusable
from kvplane.services.tokens.files import in_hub_cache, load
from kvplane.services.tokens.prefixes import Hasher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from kvplane.services.gateway.api import Asked
    from kvplane.services.protocol.hashing import Hashing
    from kvplane.services.tokens.model import Known, Model, Work

ASIDE_CHARACTERS = 1 << 15
"""A text that is longer has its tokens found in a thread, so that others need not wait."""
LONGEST_BODY = 2 << 20
MOST_MESSAGES = 2_000
"""Longer requests, in bytes, and those of more messages are left to engines: nobody else has a turn while one is rendered."""
AGAIN_SECONDS = 30.0
"""Pause before engines that did not answer are asked about a model again."""
MOST_WAITING = 8
"""Real requests that wait for an engine to be asked about them as well; more are not asked about."""
WRONG_COUNT = "answers count other numbers of tokens than were found here"

_log = structlog.get_logger("kvplane.gateway")


class Rendered(NamedTuple):
    """What an engine says of a prompt: its token ids; none when it renders no such prompts."""

    node: str
    ids: list[int] | None


class _Sample(NamedTuple):
    """A real request that an engine is asked about as well, and what was found here."""

    asked: Asked
    credentials: bytes
    hasher: Hasher
    known: Known


class _Local:
    """A model with files here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Model | None = None
        self.believed = False
        self.reason = "not tried yet"
        self.again = 0.0
        """When it is tried again, if not for a node that registers; in seconds of the gateway's clock."""
        self.evidence = proof.Evidence()
        self.hashers: dict[tuple[int, str, str], Hasher] = {}


class LocalPrompts:
    """Finds the tokens of prompts. `folders` leads from models to their files; `render` asks an engine about a request.

    `hashing` says how a model's blocks are hashed, and `base` whose tokenizer a LoRA or an alias has; both raise `NoNode` when
    no node serves the model.
    """

    def __init__(
        self, folders: Mapping[str, Path], *, hub_cache: bool, hashing: Callable[[str], Hashing],
        base: Callable[[str], str], render: Callable[[Asked, bytes], Awaitable[Rendered | None]],
    ) -> None:  # fmt: skip
        self._models: dict[str, _Local | None] = {name: _Local(folder) for name, folder in folders.items()}
        self._hub_cache = hub_cache
        self._hashing, self._base = hashing, base
        self._render = render
        self._to_try: dict[str, None] = {}
        self._samples: deque[_Sample] = deque()
        self._wake = anyio.Event()
        self.compared = self.differed = 0
        """Prompts that an engine was asked about as well, and those whose tokens were others."""

    async def run(self) -> None:
        """Try models, and compare some of the real requests, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._to_try:
                name = next(iter(self._to_try))
                del self._to_try[name]
                local = self._models.get(name)
                if local is not None:
                    await self._try(name, local)
            while self._samples:
                await self._compare(self._samples.popleft())

    def states(self) -> dict[str, tuple[bool, str]]:
        """Models that have files here: whether they are believed, and if not, why."""
        return {name: (local.believed, local.reason) for name, local in self._models.items() if local is not None}

    def held_bytes(self) -> int:
        """What known texts take."""
        return sum(
            local.model.held_bytes for local in self._models.values() if local is not None and local.model is not None
        )

    def registered(self, models: list[str]) -> None:
        """A node of these models has begun: its engine may have other files or settings."""
        for name in models:
            if self._models.get(name) is not None:
                self._soon(name)

    def _soon(self, name: str) -> None:
        self._to_try[name] = None
        self._wake.set()

    async def find(self, asked: Asked, credentials: bytes) -> Known | None:
        """The prompt of a request; none if an engine must be asked."""
        name, local = self._known(asked.model)
        if local is None or len(asked.body) > LONGEST_BODY or len(asked.messages) > MOST_MESSAGES:
            return None
        if not local.believed or local.model is None:
            if time.monotonic() >= local.again:
                local.again = math.inf
                self._soon(name)
            return None
        try:
            work = self._begin(local, asked)
            if work.size > ASIDE_CHARACTERS:
                ids = await anyio.to_thread.run_sync(local.model.tokenizer.ids, work.pieces)
                known = local.model.finish(work, ids)
            else:
                known = local.model.now(work)
        except (Elsewhere, Unusable):
            return None
        if local.evidence.ask() and len(self._samples) < MOST_WAITING:
            self._samples.append(_Sample(asked, credentials, work.hasher, known))
            self._wake.set()
        return known

    def told(self, model: str, thought: int, prompt_tokens: int) -> None:
        """An answer has counted a prompt that was found here to have `thought` tokens."""
        name, local = self._known(model)
        if local is not None and local.believed and local.evidence.told(thought, prompt_tokens):
            self._fall(name, local, WRONG_COUNT)

    def _known(self, model: str) -> tuple[str, _Local | None]:
        """Whose files a model has, and what is known of them."""
        if model in self._models or not (self._models or self._hub_cache):
            return model, self._models.get(model)
        # Names come from clients: of those that no node serves nothing is remembered.
        try:
            name = self._base(model)
        except (NoNode, Overloaded):
            return model, None
        if name not in self._models and self._hub_cache:
            folder = in_hub_cache(name)
            self._models[name] = _Local(folder) if folder is not None else None
        return name, self._models.get(name)

    def _begin(self, local: _Local, asked: Asked) -> Work:
        how = self._hashing(asked.model)
        salt = api.salt(asked.fields)
        hasher = local.hashers.get((how.block_size, how.lora, salt))
        if hasher is None:
            if len(local.hashers) > 1_000:
                local.hashers.clear()
            hasher = local.hashers[how.block_size, how.lora, salt] = Hasher(how.block_size, how.lora, salt)
        return _work(local.model, asked, hasher)

    async def _try(self, name: str, local: _Local) -> None:
        local.reason = reason = await self._difference(name, local)
        if reason:
            self._fall(name, local, reason)
        elif not local.believed:
            local.believed, local.evidence = True, proof.Evidence()
            _log.info("tokens_found_here", model=name, folder=str(local.folder))

    async def _difference(self, name: str, local: _Local) -> str:
        """Why the model is not believed; empty if it is."""
        try:
            if local.model is None:
                local.model = await anyio.to_thread.run_sync(load, local.folder)
        except Unusable as error:
            return str(error)
        compared = 0
        hasher = Hasher(1)
        for path, body in proof.questions(name):
            asked = api.read(path, body)
            try:
                known = local.model.now(_work(local.model, asked, hasher))
            except (Elsewhere, Unusable):
                continue
            try:
                rendered = await self._render(asked, b"")
            except (EngineFailed, NoNode, Overloaded) as error:
                local.again = time.monotonic() + AGAIN_SECONDS
                return f"no engine tells its tokens: {error}"
            if rendered is None or rendered.ids is None:
                continue
            compared += 1
            if known.tokens != len(rendered.ids) or known.hashes != hasher.hashes(rendered.ids):
                return (
                    f"node {rendered.node} has other tokens than {local.folder} for a question of the self-test: "
                    "another template or tokenizer, or settings of the engine that change them"
                )
        return "" if compared else "its engines render no prompts to compare with: start vLLM with --enable-scale-out"

    async def _compare(self, sample: _Sample) -> None:
        asked, known = sample.asked, sample.known
        name, local = self._known(asked.model)
        if local is None or not local.believed:
            return
        try:
            rendered = await self._render(asked, sample.credentials)
        except (EngineFailed, NoNode, Overloaded):
            return
        if rendered is None or rendered.ids is None:
            return
        hashes = await anyio.to_thread.run_sync(sample.hasher.hashes, rendered.ids)
        self.compared += 1
        if known.tokens != len(rendered.ids) or known.hashes != hashes:
            self.differed += 1
            self._fall(name, local, f"node {rendered.node} has other tokens for a client's request")

    def _fall(self, name: str, local: _Local, reason: str) -> None:
        local.reason = reason
        local.believed = False
        _log.warning(
            "tokens_not_found_here", model=name, reason=reason, instead="engines are asked for all of its prompts"
        )


def _work(model: Model | None, asked: Asked, hasher: Hasher) -> Work:
    if model is None:
        raise Elsewhere("its files are not read")
    if asked.path == api.CHAT:
        return model.begin_chat(asked.fields, hasher, asked.messages)
    raw = bytes(asked.fields.prompt)
    if asked.path != api.COMPLETIONS or not raw.startswith(b'"') or asked.fields.truncate_prompt_tokens is not None:
        raise Elsewhere("engines render this kind of request")
    try:
        return model.begin_text(msgspec.json.decode(raw, type=str), hasher)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Elsewhere(f"the prompt is not read here: {error}") from None
