"""Which streams may be continued at another engine when theirs breaks off, and with which requests. Pure.

A further leg of a stream is exact in meaning only if the engine's state is all in the tokens so far. So what is known to be
neutral or to act on each token by itself is allowed, and every other field of a request is not, those that nobody knows here
included. `why_not` says so in words that the client is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvplane.services.gateway.api import CHAT, COMPLETIONS, MESSAGES

if TYPE_CHECKING:
    from kvplane.services.gateway.api import Asked
    from kvplane.services.http.reader import Headers

LEGS = 5
"""Most legs of one stream, the first included."""
IDS_PROMPT_TOKENS = 16_384
"""Longest prompt whose stream is asked for token ids: an engine that gives them repeats the prompt's in its first chunk."""
HEADER = b"x-kvplane-continue"
"""A client that says 0 here wants no continued stream."""
_NO = frozenset((b"0", b"no", b"off", b"false"))
_DEFAULT_TOKENS = 16
"""What an engine makes of a completion that says nothing of its length."""

Body = dict[str, Any]

_EACH_TOKEN = frozenset((
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "allowed_token_ids", "min_tokens",
    "max_tokens", "max_completion_tokens", "stream_interval", "stop_sequences",
))  # fmt: skip
"""What acts on each token by itself, or on the prompt and the answer alike."""
_ASIDE = frozenset((
    "model", "stream", "stream_options", "user", "cache_salt", "priority", "session_id", "request_id", "metadata", "store",
    "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
))  # fmt: skip
"""What does not change an answer."""
_OF_PROMPT = frozenset((
    "prompt", "messages", "system", "chat_template", "chat_template_kwargs", "reasoning_effort", "documents",
    "add_special_tokens", "add_generation_prompt", "continue_final_message", "mm_processor_kwargs", "media_io_kwargs",
))  # fmt: skip
"""What is in the prompt's tokens."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "length_penalty": (1,), "use_beam_search": (False,),
    "bad_words": ([],), "include_reasoning": (True,), "return_token_ids": (False,), "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,), "return_token_offsets": (False,), "response_format": ({"type": "text"},),
    "tools": ([],), "thinking": ({"type": "disabled"},), "modalities": (["text"],), "truncation_side": ("left", "right"),
    "early_stopping": (False,), "watermarking": (False,),
}  # fmt: skip
"""Fields that need a state of the engine's, unless they have one of these values."""
_WITH_TOOLS = frozenset(("tools", "tool_choice", "parallel_tool_calls"))
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Continuing(NamedTuple):
    """A stream that may be continued, as far as its request says."""

    stops: tuple[str, ...] = ()
    """Texts that end the answer, and are no part of it."""
    tools: bool = False
    """Its engine looks for calls in the text: only an engine that looks as well can go on."""
    wants_usage: bool = False


def unwanted(headers: Headers) -> bool:
    """Whether the client wants no continued stream."""
    return any(name == HEADER and value.strip().lower() in _NO for name, value in headers)


def continuing(asked: Asked) -> Continuing | str:
    """What is to be known of a stream that may be continued, or why it may not be."""
    if asked.path not in {CHAT, COMPLETIONS, MESSAGES}:
        return f"streams of {asked.path} are not continued"
    try:
        body = _decode(asked.body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        return f"its request can't be read whole: {error}"
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        if not (body.get(name) is None or type(body[name]) is int):
            return f"its {name!r} is no whole number"
    tools = asked.path == CHAT and bool(body.get("tools")) and body.get("tool_choice", "auto") in {None, "auto", "none"}
    for name, value in body.items():
        if value is None or name in _EACH_TOKEN or name in _ASIDE or name in _OF_PROMPT:
            continue
        if name in _NEUTRAL and any(type(value) is type(one) and value == one for one in _NEUTRAL[name]):
            continue
        if name in {"presence_penalty", "frequency_penalty", "length_penalty"} and value == _NEUTRAL[name][0]:
            continue
        if name == "seed" and body.get("temperature") == 0:
            continue
        if name in _WITH_TOOLS and (tools or (name != "tools" and not body.get("tools"))):
            continue
        return f"its request has {name!r}, which a second engine can't go on with"
    prompt = body.get("prompt")
    if asked.path == COMPLETIONS and not (isinstance(prompt, str) or _is_ids(prompt)):
        return "its request has several prompts"
    stops = body.get("stop_sequences" if asked.path == MESSAGES else "stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        return "its stop strings can't be read"
    options = body.get("stream_options")
    return Continuing(
        tuple(stop for stop in stops if stop), tools and body.get("tool_choice") != "none",
        isinstance(options, dict) and options.get("include_usage") is True and not asked.adds_usage,
    )  # fmt: skip


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int


def with_ids(body: bytes) -> bytes:
    """The body of a request that asks for its answer's token ids as well."""
    begin = body.index(b"{") + 1
    comma = b"" if body[begin:].lstrip().startswith(b"}") else b","
    return b'{"return_token_ids":true' + comma + body[begin:]


def may_stop_inside(text: str, stops: tuple[str, ...]) -> bool:
    """Whether a stop string may have begun in what the client has: its end would be another engine's first text."""
    return any(text.endswith(stop[:size]) for stop in stops for size in range(1, len(stop)))


def left(asked: Asked, made: int) -> int | None:
    """How many tokens the answer may still have; none without a limit."""
    body = _decode(asked.body)
    most = body.get("max_completion_tokens") if asked.path == CHAT else None
    most = body.get("max_tokens") if most is None else most
    if most is None and asked.path == COMPLETIONS:
        most = _DEFAULT_TOKENS
    return max(0, most - made) if type(most) is int else None


def by_tokens(asked: Asked, ids: list[int], made: int) -> bytes:
    """A completion of the prompt's and the answer's tokens so far, of which `made` are the answer's."""
    given = _decode(asked.body)
    body = {name: value for name, value in given.items() if name in _EACH_TOKEN or name in _ASIDE or name == "seed"}
    if asked.path == MESSAGES and given.get("stop_sequences"):
        body["stop"] = given["stop_sequences"]
    # What is said of a message there is no metadata of OpenAI's.
    for name in ("metadata", "store", "service_tier") if asked.path == MESSAGES else ():
        body.pop(name, None)
    for name in ("max_completion_tokens", "stop_sequences"):
        body.pop(name, None)
    body |= {
        "prompt": ids, "stream": True, "max_tokens": left(asked, made), "return_token_ids": True,
        "stream_options": {**(body.get("stream_options") or {}), "include_usage": True},
    }  # fmt: skip
    return _encoded(body, made)


def by_text(asked: Asked, text: str, made: int) -> bytes | None:
    """The same request with what was answered at the end of its prompt or messages; none where there is no such request."""
    body = _decode(asked.body)
    if asked.path == COMPLETIONS:
        if not isinstance(body.get("prompt"), str):
            return None
        body["prompt"] += text
        body["max_tokens"] = left(asked, made)
        return _encoded(body, made)
    messages = body.get("messages")
    if asked.path != CHAT or not isinstance(messages, list):
        return None
    if body.get("continue_final_message"):
        last = messages[-1] if messages else None
        if not isinstance(last, dict) or not isinstance(last.get("content"), str):
            return None
        messages[-1] = {**last, "content": last["content"] + text}
    else:
        messages.append({"role": "assistant", "content": text})
    body |= {"add_generation_prompt": False, "continue_final_message": True}
    most = left(asked, made)
    if most is not None:
        name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        body[name] = most
    return _encoded(body, made)


def _encoded(body: Body, made: int) -> bytes:
    if body.get("min_tokens"):
        body["min_tokens"] = max(0, body["min_tokens"] - made)
    return msgspec.json.encode(body)
