"""Requests and answers out of bytes: strict, bounded, and without I/O.

`RequestReader.feed` takes what came from a connection and gives the requests that are whole; `AnswerReader.feed` hands
on an answer's head and then its data as it comes. Both stand on llhttp, which refuses what two readers could understand
in two ways (RFC 9112): both lengths, folded headers, bare line feeds, odd chunk sizes. What it lets pass is refused
here: no or several hosts, transfer codings other than `chunked`, HTTP/0.9, targets that are no path, changes of
protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httptools

from kvplane.services.protocol.errors import BadAnswer, BadHttp

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD_BYTES = 64 << 10
"""Longest head of a request or an answer."""
HEADERS_LIMIT = 128
"""Most headers of a request or an answer."""
BODY_BYTES = 32 << 20
"""Longest body of a request."""
TRAILER_BYTES = 8 << 10
"""Longest part of a chunked body that is no data, beyond some bytes a chunk."""
CHUNK_EXTRA = 64
"""So many bytes of a chunk may be no data."""

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, and values, in the order in which they came."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_INFORMATIONAL = 200
_NO_BODY = {204, 304}


class Request:
    """A request. `target` is its path with the query."""

    __slots__ = ("_first", "body", "headers", "keep_alive", "method", "target")

    def __init__(self, method: bytes, target: bytes, headers: Headers, *, keep_alive: bool) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = b""
        self.keep_alive = keep_alive
        """Whether the connection may be used once more after the answer."""
        self._first: dict[bytes, bytes] | None = None

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]

    def header(self, name: bytes) -> bytes:
        """The first header of a name, which is given in lower case; empty without one."""
        first = self._first
        if first is None:
            first = self._first = dict(reversed(self.headers))
        return first.get(name, b"")


class RequestReader:
    """Reads one client's requests. `interim` is called with what must be answered at once: `100 Continue`."""

    def __init__(self, interim: Callable[[bytes], None], *, body_bytes: int = BODY_BYTES) -> None:
        self._interim = interim
        self._body_bytes = body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._whole: list[Request] = []
        self._begin()

    def _begin(self) -> None:
        self.inside = False
        """A request has begun and is not whole."""
        self.in_body = False
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._request: Request | None = None
        self._parts: list[bytes] = []
        self._body = 0
        self._fed = 0
        self._chunks = 0

    def feed(self, data: bytes) -> list[Request]:
        """The requests that are whole with these bytes. Raises `BadHttp`; nothing more can be read after that."""
        if self.in_body:
            self._fed += len(data)
        else:
            self._head_bytes += len(data)
            if not self.inside:
                self.inside = bool(data.strip(b"\r\n"))
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise BadHttp(400, "this server changes to no other protocol; send no Upgrade, and no CONNECT") from None
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, BadHttp):
                raise cause from None
            raise BadHttp(400, f"the request can't be read: {error}") from None
        if not self.in_body and self.inside and self._head_bytes > HEAD_BYTES and not self._whole:
            raise BadHttp(431, f"the request's head is longer than {HEAD_BYTES:,} bytes")
        if self.in_body and self._fed - self._body > TRAILER_BYTES + CHUNK_EXTRA * self._chunks:
            raise BadHttp(400, "the request's chunks are more frame than data")
        whole, self._whole = self._whole, []
        return whole

    def on_url(self, target: bytes) -> None:
        """For the parser. It may come in parts."""
        self._target += target
        if len(self._target) > HEAD_BYTES:
            raise BadHttp(431, f"the request's target is longer than {HEAD_BYTES:,} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """For the parser. Those that come behind a chunked body are dropped."""
        if self.in_body:
            return
        if len(self._headers) >= HEADERS_LIMIT:
            raise BadHttp(431, f"the request has more than {HEADERS_LIMIT} headers")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """For the parser."""
        version = self._parser.get_http_version()
        hosts = length = 0
        continues = coded = False
        for name, value in self._headers:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                coded = True
                if value.strip().lower() != b"chunked":
                    raise BadHttp(501, f"transfer coding {value[:40]!r} is not known here; only chunked is")
            elif name == b"expect":
                if value.strip().lower() != b"100-continue":
                    raise BadHttp(417, f"expectation {value[:40]!r} is not known here; only 100-continue is")
                continues = True
        if version not in {"1.0", "1.1"} or (version == "1.0" and coded):
            raise BadHttp(505 if not coded else 400, f"HTTP/{version} is not spoken like this; speak HTTP/1.1")
        if hosts > 1 or (not hosts and version == "1.1"):
            raise BadHttp(400, "a request names one host, in one header")
        if not self._target.startswith(b"/") and self._target != b"*":
            raise BadHttp(400, "a request's target begins with a slash; this is no proxy for other hosts")
        if length > self._body_bytes:
            raise BadHttp(413, f"the body has {length:,} bytes; the limit is {self._body_bytes:,}")
        self.in_body = True
        self._request = Request(
            self._parser.get_method(), self._target, self._headers, keep_alive=self._parser.should_keep_alive()
        )
        if continues and version == "1.1":
            self._interim(CONTINUE)

    def on_chunk_header(self) -> None:
        """For the parser."""
        self._chunks += 1

    def on_body(self, data: bytes) -> None:
        """For the parser."""
        self._body += len(data)
        if self._body > self._body_bytes:
            raise BadHttp(413, f"the body has more than {self._body_bytes:,} bytes, which is the limit")
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """For the parser."""
        request = self._request
        if request is None:
            raise BadHttp(400, "the request can't be read")
        request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._whole.append(request)
        self._begin()


class AnswerReader:
    """Reads answers of an engine, one after `begin`: `on_head`, then `on_data` for every piece, then `on_end`."""

    def __init__(
        self, on_head: Callable[[int, Headers], None], on_data: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        self._on_head, self._on_end = on_head, on_end
        self.on_body = on_data
        """For the parser."""
        self._parser = httptools.HttpResponseParser(self)
        self.begin()

    def begin(self) -> None:
        """Expect an answer, on a connection whose last one ended and kept it open."""
        self._headers: Headers = []
        self._head_bytes = 0
        self._interim = False
        self._length = False
        self._status = 0
        self.headed = False
        """The head was read."""
        self.ended = False
        """All was read."""
        self.keep_alive = False
        """Whether the connection may be used once more; known at the end."""

    def feed(self, data: bytes) -> None:
        """Take what came. Raises `BadAnswer`."""
        if not self.headed:
            self._head_bytes += min(len(data), HEAD_BYTES + 1)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise BadAnswer("it changes to another protocol") from None
        except httptools.HttpParserError as error:
            cause = error.__context__
            raise BadAnswer(str(cause if isinstance(cause, BadAnswer) else f"it is not HTTP: {error}")) from None
        if not self.headed and self._head_bytes > HEAD_BYTES:
            raise BadAnswer(f"its head is longer than {HEAD_BYTES:,} bytes")

    def close(self) -> None:
        """The connection has ended. Raises `BadAnswer` unless that is how the answer ends."""
        if self.ended:
            return
        if not self.headed or self._length:
            raise BadAnswer("it broke off")
        self.ended = True
        self._on_end()

    def on_header(self, name: bytes, value: bytes) -> None:
        """For the parser."""
        if self.headed:
            return
        if len(self._headers) >= HEADERS_LIMIT:
            raise BadAnswer(f"it has more than {HEADERS_LIMIT} headers")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """For the parser."""
        if self.ended:
            raise BadAnswer("there is more than one answer")
        status = self._parser.get_status_code()
        self._interim = status < _INFORMATIONAL
        if self._interim:
            self._headers = []
            return
        self._length = status in _NO_BODY or any(
            name in {b"content-length", b"transfer-encoding"} for name, _ in self._headers
        )
        self.headed = True
        self._on_head(status, self._headers)

    def on_message_complete(self) -> None:
        """For the parser."""
        if self._interim:
            self._interim = False
            return
        self.keep_alive = self._length and self._parser.should_keep_alive()
        self.ended = True
        self._on_end()
