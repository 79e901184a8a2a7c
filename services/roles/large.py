"""Large requests are decoded and hashed in a process of their own: a prompt of a million tokens would hold up everybody.

They wait in a line; it is short, and nobody has all of it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import anyio
from msgspec import structs
from xxhash import xxh3_128_digest

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import block_hashes
from kvplane.services.process.workers import Worker
from kvplane.services.protocol.errors import BadRequest, Overloaded, ServiceFault, WorkerDied
from kvplane.services.protocol.messages import RouteRequest, decode_request, one_of
from kvplane.services.rpc.asker import asker

if TYPE_CHECKING:
    from collections.abc import Callable

WAITING_LIMIT = 32
"""Most large requests that wait."""
WAITING_OF_ONE = 8
"""Those of one asker."""

_held: list[list[int]] = []
"""In the worker: the tokens of the request that is worked on."""


def _decoded(body: bytes) -> RouteRequest:
    """A request without its tokens, which stay here."""
    request = decode_request(body, RouteRequest)
    form = one_of(request)
    tokens = list((request.prompt or "").encode()) if form == "prompt" else request.tokens
    _held[:] = [tokens or []]
    # What remains says of which form it was.
    return structs.replace(request, tokens=[] if form == "tokens" else None, prompt="" if form == "prompt" else None)


def _hashed(size: int, lora: str, salt: str) -> tuple[bytes, int]:
    """Block hashes of the tokens that were held, and how many tokens there were."""
    tokens = _held.pop() if _held else []
    try:
        return block_hashes(tokens, size, lora=lora, salt=salt), len(tokens)
    except BadHashes as error:
        raise BadRequest(str(error)) from None


class _Answer:
    """What one is waited for by those who asked the same."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.request: RouteRequest | None = None
        self.error: ServiceFault | None = None


class Large:
    """The large requests of one router. `prepare` gives block size and LoRA for a request; it raises what routing would."""

    def __init__(self, prepare: Callable[[RouteRequest], tuple[int, str]]) -> None:
        self._prepare = prepare
        self._worker = Worker()
        self._one = anyio.Lock()
        self._waiting: Counter[str] = Counter()
        self._answers: dict[bytes, _Answer] = {}

    async def decode(self, body: bytes) -> RouteRequest:
        """The request, with hashes instead of what they are made of. Raises `BadRequest`, `Overloaded` and `WorkerDied`."""
        who = asker()
        key = who.encode() + xxh3_128_digest(body)
        answer = self._answers.get(key)
        if answer is None:
            if self._waiting[who] >= WAITING_OF_ONE or self._waiting.total() >= WAITING_LIMIT:
                raise Overloaded(
                    f"{self._waiting[who]} large requests of yours wait here; send fewer at once, or hashes"
                )
            answer = self._answers[key] = _Answer()
            self._waiting[who] += 1
            try:
                answer.request = await self._made(body)
            except ServiceFault as error:
                answer.error = error
            finally:
                self._waiting[who] -= 1
                self._waiting = +self._waiting
                del self._answers[key]
                answer.done.set()
        else:
            # Who gets no answer soon asks again, and the first answer counts.
            await answer.done.wait()
        if answer.error is not None:
            raise answer.error
        if answer.request is None:
            raise WorkerDied("the one who asked the same before was cancelled; ask again")
        return answer.request

    async def _made(self, body: bytes) -> RouteRequest:
        async with self._one:
            request = await self._worker.call(_decoded, body)
            if request.hashes is not None:
                return request
            size, lora = self._prepare(request)
            hashes, count = await self._worker.call(_hashed, size, lora, request.salt)
        return structs.replace(request, tokens=None, prompt=None, hashes=hashes, tokens_count=count)

    def close(self) -> None:
        """End the process."""
        self._worker.close()
