"""Requests and answers out of bytes: what two readers could understand in two ways is refused, h11 judges the rest."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.http.reader import BODY_BYTES, CONTINUE, HEAD_BYTES, AnswerReader, Request, RequestReader
from kvplane.services.protocol.errors import BadAnswer, BadHttp

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n"


def read(*pieces: bytes, body_bytes: int = BODY_BYTES) -> tuple[list[Request], list[bytes]]:
    """The requests in some pieces, and what had to be answered meanwhile."""
    interim: list[bytes] = []
    reader = RequestReader(interim.append, body_bytes=body_bytes)
    found: list[Request] = []
    for piece in pieces:
        found += reader.feed(piece)
    return found, interim


AMBIGUOUS = {
    "both lengths": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "one length twice": HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
    "a signed length": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "a length beyond all": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
    "an unknown coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "no coding at all": HEAD + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked and then another": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "another and then chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a blank before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a tab of another kind": HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a folded header": HEAD + b"X: a\r\n b\r\n\r\n",
    "a header that begins with a blank": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: a\n\n",
    "one bare line feed": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "a bare carriage return": b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "a byte of zero": HEAD + b"X: a\x00b\r\n\r\n",
    "a header without a name": HEAD + b": x\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "an odd chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5x\r\nhello\r\n0\r\n\r\n",
    "a negative chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "a chunk size with a prefix": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk size beyond all": HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "chunks with bare line feeds": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n",
    "a chunk longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a version to come": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "a blank in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "another host's target": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tunnel": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\nx",
    "another protocol": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nabc",
    "another expectation": HEAD + b"Expect: tea\r\nContent-Length: 0\r\n\r\n",
    "bytes of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("text", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_could_be_understood_in_two_ways_is_refused(text: bytes) -> None:
    for pieces in ([text], [text[at : at + 1] for at in range(len(text))]):
        with pytest.raises(BadHttp) as caught:
            read(*pieces)
        assert 400 <= caught.value.status < 600


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(str.encode)
VALUE = st.binary(max_size=40).map(lambda raw: bytes(32 + byte % 95 for byte in raw).strip())
RESERVED = {b"host", b"content-length", b"transfer-encoding", b"expect", b"connection", b"upgrade", b"proxy-connection"}
PLAIN = st.lists(st.tuples(TOKEN.filter(lambda name: name not in RESERVED), VALUE), max_size=8)


@given(
    method=st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE"]), path=st.text("abc/?=&%20", max_size=20), headers=PLAIN,
    body=st.binary(max_size=300), chunks=st.lists(st.integers(1, 60), max_size=5),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)  # fmt: skip
def test_what_is_understood_is_what_h11_understands(
    method: bytes, path: str, headers: list[tuple[bytes, bytes]], body: bytes, chunks: list[int], cuts: list[int]
) -> None:
    head = b"%b /%b HTTP/1.1\r\nHost: a\r\n" % (method, path.encode())
    head += b"".join(b"%b: %b\r\n" % pair for pair in headers)
    if chunks:
        parts, rest = [], body
        for size in chunks:
            part, rest = rest[:size], rest[size:]
            if part:
                parts.append(b"%x\r\n%b\r\n" % (len(part), part))
        if rest:
            parts.append(b"%X\r\n%b\r\n" % (len(rest), rest))
        text = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(parts) + b"0\r\n\r\n"
    else:
        text = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    (found,), _ = read(*pieces)
    judge = h11.Connection(h11.SERVER)
    judge.receive_data(text)
    asked = judge.next_event()
    assert isinstance(asked, h11.Request)
    judged = b""
    while isinstance(event := judge.next_event(), h11.Data):
        judged += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert (found.method, found.target) == (asked.method, asked.target)
    assert found.headers == [(name, value) for name, value in asked.headers]
    assert found.body == judged == body


@given(text=st.binary(max_size=400), cuts=st.lists(st.integers(1, 400), max_size=4))
def test_no_bytes_do_more_than_be_refused(text: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found: list[Request] = []
    with suppress(BadHttp):
        found, _ = read(*(text[begin:end] for begin, end in pairwise(places)))
    assert all(request.target for request in found)


def test_several_requests_may_come_at_once() -> None:
    one = HEAD + b"Content-Length: 2\r\n\r\nab"
    found, _ = read(one + one[:20], one[20:] + b"\r\n\r\n" + one)
    assert [request.body for request in found] == [b"ab", b"ab", b"ab"]


def test_who_waits_to_send_is_told_to_go_on() -> None:
    found, interim = read(HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", b"ab")
    assert interim == [CONTINUE]
    assert found[0].body == b"ab"


def test_limits() -> None:
    with pytest.raises(BadHttp, match="limit is 10") as caught:
        read(HEAD + b"Content-Length: 11\r\n\r\n", body_bytes=10)
    assert caught.value.status == 413
    with pytest.raises(BadHttp, match="more than 10 bytes"):
        read(HEAD + b"Transfer-Encoding: chunked\r\n\r\nb\r\n12345678901\r\n0\r\n\r\n", body_bytes=10)
    with pytest.raises(BadHttp) as caught:
        read(HEAD, *[b"X: %b\r\n" % (b"y" * 1000)] * (HEAD_BYTES // 1000 + 1))
    assert caught.value.status == 431
    with pytest.raises(BadHttp) as caught:
        read(HEAD + b"".join(b"X-%d: 1\r\n" % number for number in range(200)) + b"\r\n")
    assert caught.value.status == 431
    with pytest.raises(BadHttp):
        read(b"GET /" + b"a" * (HEAD_BYTES + 1))


def test_chunks_that_are_more_frame_than_data_are_refused() -> None:
    reader = RequestReader(lambda _: None)
    reader.feed(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(BadHttp, match="more frame than data"):
        for _ in range(100):
            reader.feed(b"1;" + b"x" * 1000 + b"\r\na\r\n")


class Answer:
    """One answer as it was read."""

    def __init__(self) -> None:
        self.status = 0
        self.data = b""
        self.ended = False
        self.reader = AnswerReader(self._head, self._take, self._end)

    def _head(self, status: int, _: object) -> None:
        self.status = status

    def _take(self, data: bytes) -> None:
        self.data += data

    def _end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_answers_of_every_form(size: int) -> None:
    for text, whole, kept in (
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", True, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", True, True),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
            True,
            False,
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", False, False),
    ):
        answer = Answer()
        for at in range(0, len(text), size):
            answer.reader.feed(text[at : at + size])
        assert (answer.status, answer.data, answer.ended) == (200, b"hello", whole)
        answer.reader.close()
        assert answer.ended
        assert answer.reader.keep_alive is kept


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n",
        b"", b"HTTP/1.1 200", b"SSH-2.0-x\r\n", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * (HEAD_BYTES + 1),
    ],
)  # fmt: skip
def test_answers_that_break_off_or_are_none(text: bytes) -> None:
    answer = Answer()
    with pytest.raises(BadAnswer):
        answer.reader.feed(text)
        answer.reader.close()
