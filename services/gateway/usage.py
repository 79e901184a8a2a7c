"""What an answer counts, read while it passes. Pure: bytes in, bytes out.

A stream of server-sent events is passed on as it comes, whole events at a time: behind half of one no error could be told.
`Events` looks at the events that can matter, by a search for `"usage"` in the bytes, and leaves out the extra one of a stream
whose usage only the gateway asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

LONGEST_EVENT = 16 << 20
_TAIL = 256
_SHORT, _LONG = 64, 4096
_LAST_EVENTS = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete", b"response.failed")
_MOST = 1 << 53
ANSWER_BYTES = 64 << 20
"""Longest answer, not streamed, that is looked at for its usage."""


class Usage(NamedTuple):
    """Tokens of a request as its engine counted them; -1 where it does not say."""

    prompt: int = -1
    cached: int = -1
    output: int = -1


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value <= _MOST else -1


def usage(counts: object) -> Usage | None:
    """Usage in the words of OpenAI's completions or responses, or of Anthropic's messages; none without one."""
    if not isinstance(counts, dict):
        return None
    prompt = _count(counts.get("prompt_tokens", counts.get("input_tokens")))
    output = _count(counts.get("completion_tokens", counts.get("output_tokens")))
    details = counts.get("prompt_tokens_details", counts.get("input_tokens_details"))
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else -1
    read = _count(counts.get("cache_read_input_tokens"))
    if cached < 0 <= read:
        # Anthropic counts what was read from the cache apart from the rest of the input.
        cached = read
        prompt = prompt + read + max(0, _count(counts.get("cache_creation_input_tokens"))) if prompt >= 0 else -1
    return Usage(prompt, cached, output)


def merged(before: Usage, found: Usage) -> Usage:
    """What is known after a further event: Anthropic's streams have input first and output last."""
    return Usage(*(new if new >= 0 else old for old, new in zip(before, found, strict=True)))


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    usage: Any = None
    message: Any = None
    response: Any = None
    choices: Any = None
    error: Any = None


class _Answer(msgspec.Struct, frozen=True, gc=False):
    usage: Any = None
    message: Any = None
    response: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


def _in_chunk(chunk: _Chunk | _Answer) -> Usage | None:
    found = usage(chunk.usage)
    if found is None:
        # Anthropic's `message_start`, and the last event of responses.
        for part in (chunk.message, chunk.response):
            found = found or usage(part.get("usage") if isinstance(part, dict) else None)
    return found


def in_answer(body: bytes) -> Usage:
    """Usage of an answer that is not streamed."""
    if len(body) > ANSWER_BYTES or b'"usage"' not in body:
        return Usage()
    try:
        return _in_chunk(_decode_answer(body)) or Usage()
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return Usage()


class Events:
    """Watches one stream. `feed` gives the bytes that are to be passed on; with `strip` those of the extra event are left out.

    The extra event is OpenAI's last one: it has usage and no choices.
    """

    __slots__ = ("_before", "_ended", "_held", "_last", "_strip", "error", "usage")
    broken = ""
    """What it says is the client's to know."""

    def __init__(self, *, strip: bool) -> None:
        self._strip = strip
        self._held = b""
        """The beginning of an event whose end has not come."""
        self._before = self._last = b""
        """The last two pieces; of short ones, more."""
        self._ended = False
        """The last event began in a long piece."""
        self.usage = Usage()
        self.error = ""
        """What an event of the engine's said that went wrong."""

    @property
    def counted(self) -> Usage:
        """Usage, as far as the engine has said it."""
        return self.usage

    @property
    def whole(self) -> bool:
        """Whether the stream ended as streams do: with `[DONE]`, or with Anthropic's or the responses' last event."""
        return self._ended or _is_last(self._before[-_TAIL:] + self._last)

    def feed(self, data: bytes) -> bytes:
        """Take what came; what of it is to be passed on now."""
        size = len(data)
        # What says that it is the last event may lie across pieces, and that event may be long.
        self._before = (self._before + self._last)[-_TAIL:] if size < _SHORT else self._last
        self._last = data
        if size > _LONG and _is_last(data):
            self._ended = True
        if not self._held and data.endswith(b"\n\n") and not _matters(data):
            return data
        if self._held:
            data, self._held = self._held + data, b""
        end = last_end(data)
        whole, rest = data[:end], data[end:]
        if len(rest) > LONGEST_EVENT:
            # No event is so long; whatever it is, the client shall have it.
            whole, rest = data, b""
        self._held = rest
        return self._stripped(whole) if _matters(whole) else whole

    def close(self) -> bytes:
        """The stream has ended: what was held back of it."""
        held, self._held = self._held, b""
        return held

    def _stripped(self, data: bytes) -> bytes:
        kept = []
        for event in events_in(data):
            chunk = self._read(event)
            if not self._strip or chunk is None or chunk.choices or chunk.usage is None or chunk.error:
                kept.append(event)
        return b"".join(kept)

    def _read(self, event: bytes) -> _Chunk | None:
        if not _matters(event):
            return None
        at = event.find(b"data:")
        if at < 0:
            return None
        try:
            chunk = _decode(event[at + 5 :].strip())
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        if isinstance(chunk.error, dict) and not self.error:
            self.error = str(chunk.error.get("message") or chunk.error)
        found = _in_chunk(chunk)
        if found is not None:
            self.usage = merged(self.usage, found)
        return chunk


def _is_last(data: bytes) -> bool:
    return any(mark in data for mark in _LAST_EVENTS)


def _matters(data: bytes) -> bool:
    """Whether there may be usage or an error. In a text the quotes are escaped."""
    return b'"usage"' in data or b'"error"' in data


def last_end(data: bytes) -> int:
    """Where the last whole event ends."""
    return max(
        data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0, data.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0
    )


def events_in(data: bytes) -> list[bytes]:
    """Whole events, each with its end."""
    blank = b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n"
    parts = data.split(blank)
    return [part + blank for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
