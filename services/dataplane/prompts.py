"""How engines are asked for a prompt's tokens, and then routers for a node: the same for gateways and `kvplane complete`.

`POST {path}/render` with the unchanged body has the tokens that the engine itself would see (vLLM). Where there is none,
`/tokenize` is asked with what can be put together for it; that leaves out `reasoning_content` of messages, among others.
Pure: whoever asks brings the HTTP and the time.
"""

from __future__ import annotations

import msgspec

from kvplane.services.protocol.messages import RouteRequest

LOCAL, RENDER, TOKENIZE = "local", "render", "tokenize"
"""Where tokens come from, as metrics name it."""
NO_SUCH_ENDPOINT = frozenset((403, 404, 405, 501))
"""vLLM forbids what it was not started with."""
RENDERS_NOT = (
    "its engines render no prompts, and /tokenize leaves out the reasoning of messages and more: start vLLM with "
    "--enable-scale-out"
)
"""Said once a model."""
FORGET_SECONDS = 60.0
"""So long an engine that has no such endpoint is not asked for it again."""
MOST_TOKEN = (1 << 32) - 1


class _Rendered(msgspec.Struct, gc=False):
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    tokens: list[int] | None = None


_one = msgspec.json.Decoder(_Rendered).decode
_several = msgspec.json.Decoder(list[_Rendered]).decode


class Lacking:
    """Endpoints that engines don't have, for as long as that is believed. Times in seconds of any one clock."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}

    def note(self, node: str, endpoint: str, now: float) -> None:
        """A node's engine has no such endpoint."""
        self._until[node, endpoint] = now + FORGET_SECONDS

    def may(self, node: str, endpoint: str, now: float) -> bool:
        """Whether it is worth asking."""
        until = self._until.get((node, endpoint))
        if until is None or now < until:
            return until is None
        del self._until[node, endpoint]
        return True


def told(answer: bytes) -> list[int] | None:
    """Token ids in the answer of `/render` (one prompt, or a list of one) or `/tokenize`; none when there are none."""
    try:
        if answer.lstrip().startswith(b"["):
            several = _several(answer)
            rendered = several[0] if len(several) == 1 else _Rendered()
        else:
            rendered = _one(answer)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    ids = rendered.token_ids or rendered.prompt_token_ids or rendered.tokens
    if not ids or min(ids) < 0 or max(ids) > MOST_TOKEN:
        return None
    return ids


def query(
    model: str, ids: list[int] | None, count: int, *, session: str, salt: str, request: str = "", traceparent: str = "",
    hashes: bytes = b"",
) -> RouteRequest:  # fmt: skip
    """What is asked of a router about a prompt: by its token ids or hashes, or without them by about how many tokens it has."""
    known = ids is not None
    return RouteRequest(
        model=model, tokens=ids, hashes=None if known else hashes, tokens_count=None if known else count,
        session=session, salt=salt, request=request, traceparent=traceparent,
    )  # fmt: skip
