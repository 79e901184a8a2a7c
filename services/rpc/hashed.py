"""A prompt that is longer than a message may be is hashed where it is asked about."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio.to_thread
import msgspec

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import block_hashes
from kvplane.events.types import HASHES_LIMIT
from kvplane.services.protocol.errors import BadRequest, NoTokenizer
from kvplane.services.protocol.messages import RouteRequest

if TYPE_CHECKING:
    from kvplane.services.protocol.hashing import Hashing

SPARE_BYTES = 64
"""For what a request without hashes has not: their length, and that of other fields in MessagePack."""
_encode = msgspec.msgpack.Encoder().encode


def probe(request: RouteRequest) -> RouteRequest:
    """What a router is asked to learn how the prompts of a model are hashed; no decision about the request."""
    return RouteRequest(model=request.model, hashes=b"", tokens_count=1, exclude=request.exclude, dry_run=True)


async def hashed(request: RouteRequest, how: Hashing | None, most: int) -> RouteRequest:
    """The request with hashes instead of tokens, of as many first blocks as fit into `most` bytes.

    Raises `BadRequest`, or `NoTokenizer` for a prompt whose tokens are not known.
    """
    if how is None:
        raise BadRequest(
            f"the request takes more than the {most:,} bytes that the server allows, and the router does not tell how to hash: "
            "send hashes instead of tokens, raise the server's max_payload, or start routers of this version"
        )
    if request.prompt is not None and how.tokenizer != "bytes":
        raise NoTokenizer(
            f"no tokenizer is known for model {request.model[:80]!r}; send tokens, or hashes with tokens_count"
        )
    tokens = list(request.prompt.encode()) if request.prompt is not None else request.tokens or []
    lora = request.adapter or how.lora
    try:
        hashes = await anyio.to_thread.run_sync(
            partial(block_hashes, tokens, how.block_size, lora=lora, salt=request.salt)
        )
    except BadHashes as error:
        raise BadRequest(str(error)) from None
    short = msgspec.structs.replace(request, tokens=None, prompt=None, hashes=b"", tokens_count=len(tokens))
    blocks = min(HASHES_LIMIT, max(0, most - len(_encode(short)) - SPARE_BYTES) // 8)
    return msgspec.structs.replace(short, hashes=hashes[: blocks * 8])
