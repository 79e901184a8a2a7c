"""What of a stream its client has, so that another engine can go on from there. Pure: bytes in, bytes out.

A `Transcript` stands between the legs of one stream and its client. The first leg passes as it comes, whole events at a time,
without the token ids that only the gateway asked for. Of a further leg each event is made to look as if it came from the first:
its id, no second role, usage of the whole, and the shape of the client's API where the leg is a completion of tokens.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import msgspec

from kvplane.services.gateway import closing
from kvplane.services.gateway.api import CHAT, MESSAGES
from kvplane.services.gateway.usage import LONGEST_EVENT, Usage, events_in, last_end, merged, usage

if TYPE_CHECKING:
    from collections.abc import Sequence

KEPT_BYTES = 512 << 10
"""Most bytes that are kept of one stream, text and token ids; a longer one is not continued."""
ALL_KEPT_BYTES = 256 << 20
"""Most bytes that are kept of all streams of a gateway."""
_ID_BYTES = 4
_CHANNEL = 200_005
"""First token of every answer in OpenAI's harmony format, whose text can't be gone on with without its parser."""
_SERVERS_FAULT = frozenset(
    ("InternalServerError", "internal_server_error", "server_error", "api_error", "internal_error")
)


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: int | None = 0
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: Any = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct, gc=False):
    id: Any = ""
    created: Any = 0
    model: Any = ""
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


class _Event(msgspec.Struct, gc=False):
    """Of Anthropic's streams."""

    type: str = ""
    index: int = 0
    message: Any = None
    content_block: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    usage: Any = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk).decode
_event = msgspec.json.Decoder(_Event).decode
_body = msgspec.json.Decoder(dict[str, Any]).decode


class Kept:
    """What is kept of all streams of a gateway, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0


class Transcript:
    """One stream. `strip`: the client did not ask for usage. `ids`: the gateway asked for token ids, and the client did not."""

    def __init__(self, path: str, kept: Kept, *, strip: bool) -> None:
        self._path = path
        self._kept = kept
        self._strip = strip
        self._size = 0
        self._held = b""
        self._said = bytearray()
        self.ids = array("I")
        self._sure_ids = self._sure_said = 0
        """So many ids have the text up to there as theirs, no more and no less."""
        self._has_ids = True
        self.made = 0
        """Tokens of the answer, as far as its engines tell."""
        self.head = closing.Head("", 0, "")
        self.begun = False
        """Something has been passed on."""
        self.reasoned = False
        self.spoiled = ""
        """Why it can't be continued, as far as its events say."""
        self.finished = ""
        """Its finish reason."""
        self.done = False
        self.error = ""
        """What an event of the engine's said that went wrong, which the client has been told."""
        self.broken = ""
        """The same, of an engine's failure that the client need not see."""
        self.last_words = b""
        """That event, and what came after it."""
        self.usage = Usage()
        """Of the leg."""
        self.block = -1
        """Anthropic's block of text that is open."""
        self._stopping = b""
        self.leg = 0
        self._by_tokens = False
        self._own_ids = False
        self.prompt = -1
        """Tokens of the client's own prompt, where they are known."""
        self._cut = 0
        """Tokens of the answer that the leg has in its prompt."""

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._said.decode("utf-8", "surrogatepass")

    @property
    def gives_ids(self) -> bool:
        """Whether every piece of its text came with token ids."""
        return self._has_ids and self._own_ids

    @property
    def whole(self) -> bool:
        """Whether the stream's last event came."""
        return self.done

    def sure(self) -> tuple[list[int], str] | None:
        """Token ids of the answer, and the rest of it, of which they are not known; none where ids can't be gone on with."""
        if not self._has_ids or not self._sure_ids or self.ids[0] == _CHANNEL:
            return None
        return self.ids[: self._sure_ids].tolist(), self._said[self._sure_said :].decode("utf-8", "surrogatepass")

    def ask_ids(self) -> None:
        """The leg's engine is asked for token ids."""
        self._own_ids = True

    def go_on(self, ids: Sequence[int] | None, *, made: int, by_tokens: bool) -> None:
        """Another leg begins after so many tokens, with these as the answer's ids where it is one of tokens."""
        self.leg += 1
        self._held = b""
        self.usage = Usage()
        self.broken, self.last_words, self._stopping = "", b"", b""
        self.made = self._cut = made
        self._by_tokens, self._own_ids = by_tokens, by_tokens
        self._has_ids = by_tokens or not self._said
        self.ids = array("I", ids or ())
        self._sure_ids, self._sure_said = len(self.ids), len(self._said)
        self._keep()

    @property
    def counted(self) -> Usage:
        """Usage of the leg; of one that broke off, what came of its answer."""
        return self.usage if self.done or self.usage.output >= 0 else self.usage._replace(output=self.made - self._cut)

    def overall(self) -> Usage:
        """Usage of the whole stream."""
        own = self.usage
        if not self.leg or own.prompt < 0:
            return own if not self.leg else Usage(self.prompt, -1, self.made)
        prompt = self.prompt if 0 <= self.prompt <= own.prompt else max(0, own.prompt - self._cut)
        return Usage(prompt, min(own.cached, prompt), own.prompt - prompt + max(0, own.output))

    def forget(self) -> None:
        """The stream has ended."""
        self._kept.bytes -= self._size
        self._size = 0

    def feed(self, data: bytes) -> bytes:
        """Take what came; what of it the client is to have now."""
        if self.broken:
            if len(self.last_words) < LONGEST_EVENT:
                self.last_words += data
            return b""
        if self._held or not data.endswith(b"\n\n"):
            data = self._held + data
            end = last_end(data)
            if len(data) - end > LONGEST_EVENT and not self.leg:
                # No event is so long; whatever it is, the client shall have it.
                self._spoil("its events are too long")
                end = len(data)
            data, self._held = data[:end], data[end:]
        if data.count(b"\n\n") == 1:
            return self._pass(data)
        parts = []
        events = events_in(data)
        for at, event in enumerate(events):
            parts.append(self._pass(event))
            if self._stopped():
                self.last_words = b"".join(events[at:]) if self.last_words else b""
                break
        return b"".join(parts)

    def _stopped(self) -> bool:
        return bool(self.broken)

    def close(self) -> bytes:
        """The leg has ended: what was held back of it, which is no whole event."""
        held, self._held = self._held, b""
        return held if not self.leg else b""

    def _pass(self, event: bytes) -> bytes:
        at = event.find(b"data:")
        if at < 0:
            return event
        payload = event[at + 5 :].strip()
        if payload == b"[DONE]":
            last = self._message_end() if self._by_tokens and self._path == MESSAGES else event
            self.done = True
            return last
        try:
            if self._path == MESSAGES and not self._by_tokens:
                return self._message(event, _event(payload))
            chunk = _chunk(payload)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            self._spoil("its events are not understood")
            return event if not self.leg else b""
        if chunk.error is not None:
            return self._wrong(event, chunk.error)
        counted = usage(chunk.usage)
        if counted is not None:
            self.usage = merged(self.usage, counted)
        text = ""
        for choice in chunk.choices or ():
            text += self._note(choice)
        if self.broken:
            return b""
        if self.leg:
            return self._as_first(payload, chunk, text)
        if not self.head.id:
            self.head = closing.Head(chunk.id, chunk.created, chunk.model)
        if counted is not None and self._strip and not chunk.choices:
            return b""
        self.begun = True
        return without_ids(event) if self._own_ids and b'token_ids"' in event else event

    def _note(self, choice: _Choice) -> str:
        """Keep what a chunk says; its text."""
        text, ids, delta = choice.text, choice.token_ids, choice.delta
        if delta is not None:
            text = delta.content
            if delta.tool_calls or delta.function_call:
                self._spoil("a tool call is under way")
            if delta.refusal or delta.audio:
                self._spoil("it is no plain text")
            if delta.reasoning or delta.reasoning_content:
                self.reasoned = True
                if self._said and self.leg:
                    self.broken = "it reasons in the middle of an answer"
                elif self._said:
                    self._spoil("its reasoning goes on after its text")
        if choice.index:
            self._spoil("it has several choices")
        if choice.finish_reason:
            self.finished = str(choice.finish_reason)
        if ids is not None:
            self.made += len(ids)
        elif text:
            self.made += 1
            self._has_ids = False
        if self.spoiled:
            return text or ""
        if ids is not None:
            try:
                self.ids.extend(ids)
            except (OverflowError, TypeError):
                self._has_ids = False
        if text:
            self._said += text.encode("utf-8", "surrogatepass")
            if self._has_ids and ids is not None and len(ids) == 1:
                # A text that comes with several may end before the last of them.
                self._sure_ids, self._sure_said = len(self.ids), len(self._said)
        self._keep()
        return text or ""

    def _keep(self) -> None:
        size = len(self._said) + _ID_BYTES * len(self.ids)
        self._kept.bytes += size - self._size
        self._size = size
        if size > KEPT_BYTES or self._kept.bytes > ALL_KEPT_BYTES:
            self._spoil("too much of it would have to be kept")

    def _spoil(self, why: str) -> None:
        """It can't be continued from now on, and nothing of it needs to be kept."""
        self.spoiled = self.spoiled or why
        self._said, self.ids = bytearray(), array("I")
        self._sure_ids = self._sure_said = 0
        self.forget()

    def _wrong(self, event: bytes, error: object) -> bytes:
        said = error.get("message") or error if isinstance(error, dict) else error
        code = error.get("code") if isinstance(error, dict) else None
        kind = error.get("type") if isinstance(error, dict) else None
        if (type(code) is int and code >= 500) or kind in _SERVERS_FAULT or self.leg:
            self.broken, self.last_words = str(said), event
            return b""
        self.error = str(said)
        return event

    def _message(self, event: bytes, said: _Event) -> bytes:
        """An event of Anthropic's, of the first leg or of one that begins anew."""
        if said.error is not None:
            return self._wrong(event, said.error)
        for counts in (said.usage, said.message.get("usage") if isinstance(said.message, dict) else None):
            counted = usage(counts)
            if counted is not None:
                self.usage = merged(self.usage, counted)
        if self._stopping:
            event, self._stopping, self.block = self._stopping + event, b"", -1
        match said.type:
            case "message_start" if self.begun:
                return b""
            case "message_start":
                self.begun = True
            case "content_block_start":
                if (said.content_block or {}).get("type") != "text" or said.index:
                    self._spoil("it is no plain text")
                self.block = said.index
            case "content_block_delta":
                text = (said.delta or {}).get("text")
                if not isinstance(text, str):
                    self._spoil("it is no plain text")
                else:
                    self._note(_Choice(text=text))
            case "content_block_stop":
                # As long as nothing comes after it, the text may go on.
                self._stopping = event
                return b""
            case "message_delta":
                self.finished = str((said.delta or {}).get("stop_reason") or "")
            case "message_stop":
                self.done = True
        return event

    def _as_first(self, payload: bytes, chunk: _Chunk, text: str) -> bytes:
        """An event of a further leg as the first leg would have sent it."""
        if self._path == MESSAGES:
            return self._as_message(chunk, text)
        body = _body(payload)
        if self.head.id:
            body |= self.head.fields
        if self._by_tokens and self._path == CHAT:
            body["object"] = "chat.completion.chunk"
            body["choices"] = [closing.choice_of_chat(choice) for choice in body.get("choices") or ()]
        kept = not body.get("choices")
        for choice in body.get("choices") or ():
            for name in ("token_ids", "prompt_token_ids"):
                if choice.get(name) is not None:
                    choice[name] = None
            delta = choice.get("delta") or {}
            if self.begun:
                delta.pop("role", None)
            # A chunk without anything in it may be the one with the role.
            kept = kept or bool(choice.get("finish_reason") or choice.get("text") or any(delta.values()))
        body.pop("prompt_token_ids", None)
        if body.get("usage"):
            if self._strip and not body["choices"]:
                return b""
            body["usage"] |= closing.counts(self.overall())
        elif not kept:
            return b""
        if not self.head.id:
            self.head = closing.Head(chunk.id, chunk.created, chunk.model)
        self.begun = True
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _as_message(self, chunk: _Chunk, text: str) -> bytes:
        parts = b""
        if text:
            if self.block < 0:
                self.block = 0
                parts = closing.block_start()
            parts += closing.text_delta(self.block, text)
        return parts if chunk.usage is None or chunk.choices else parts + self._message_end()

    def _message_end(self) -> bytes:
        """The end of Anthropic's message, once it is known."""
        if not self.finished or self.done:
            return b""
        self.done = True
        return closing.message_end(self.block, self.finished, self.overall())

    def ending(self, finish: str, *, wants_usage: bool) -> bytes | None:
        """The last events of a stream whose answer is whole, where they can be made; none where they can't."""
        counted = Usage(self.prompt, -1, self.made)
        if self._path == MESSAGES:
            return closing.message_end(self.block, self.finished or finish, counted)
        if wants_usage and self.prompt < 0:
            return None
        parts = b"" if self.finished else closing.last_chunk(self._path, self.head, finish)
        if wants_usage:
            parts += closing.usage_chunk(self._path, self.head, counted)
        return parts + b"data: [DONE]\n\n"


def without_ids(event: bytes) -> bytes:
    """An event without the token ids that the client did not ask for."""
    for name in (b'"prompt_token_ids":', b'"token_ids":'):
        # In a text the quotes are escaped, so this is the field.
        at = event.find(name)
        if at < 0:
            continue
        at += len(name)
        while event[at : at + 1] == b" ":
            at += 1
        if event[at : at + 1] == b"[":
            event = event[:at] + b"null" + event[event.index(b"]", at) + 1 :]
    return event
