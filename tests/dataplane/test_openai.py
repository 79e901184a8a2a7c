"""Requests and answers of engines, as bytes and objects."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.dataplane import openai
from kvplane.services.protocol.errors import EngineFailed

if TYPE_CHECKING:
    from kvplane.services.dataplane.openai import Body

CHUNKS = st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers(), max_size=3), max_size=6)


@given(CHUNKS, st.sampled_from([b"\n\n", b"\r\n\r\n"]), st.sampled_from([b"", b"\n", b"\r\n\r\n"]), st.data())
def test_a_stream_may_be_cut_anywhere(sent: list[Body], end: bytes, last: bytes, data: st.DataObject) -> None:
    sent = [chunk for chunk in sent if not chunk.get("error")]
    stream = b": a comment" + end + b"data:" + end
    stream += b"".join(b"data: " + json.dumps(chunk).encode() + end for chunk in sent) + b"data: [DONE]" + last
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = openai.Chunks()
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [chunk for part in [*filter(None, parts), b""] for chunk in chunks.feed(part)] == sent
    assert chunks.begun
    assert chunks.ended


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"data: {", "no stream of JSON"), (b"data: [1]", "no stream of JSON objects"),
        (b'data: {"error": "full"}', "full"), (b"data: " + b"[" * 100_000, "no stream of JSON"),
        (b"data: " + b" " * (openai.MOST_LINE_BYTES + 1), "16 MiB"),
    ],
    ids=["cut", "list", "error", "deep", "long"],
)  # fmt: skip
def test_what_is_no_stream_of_chunks_is_named(stream: bytes, why: str) -> None:
    chunks = openai.Chunks()
    with pytest.raises(EngineFailed, match=why):
        for part in (stream, b""):
            list(chunks.feed(part))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
ODD_CHOICE = JSON | st.fixed_dictionaries(
    {}, optional={"index": JSON, "text": JSON, "delta": JSON | st.fixed_dictionaries({"content": JSON})}
)
ODD_USAGE = JSON | st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": JSON, "completion_tokens": JSON,
        "prompt_tokens_details": JSON | st.fixed_dictionaries({"cached_tokens": JSON}),
    },
)  # fmt: skip


@given(st.fixed_dictionaries({}, optional={"choices": JSON | st.lists(ODD_CHOICE, max_size=3), "usage": ODD_USAGE}))
def test_odd_chunks_are_read_without_harm(chunk: Body) -> None:
    for index, text in openai.text(chunk).items():
        assert 0 <= index < 1 << 53
        assert text
    usage = openai.usage(chunk)
    if usage is not None:
        for count in (usage.prompt_tokens, usage.cached_tokens or 0, usage.output_tokens):
            assert type(count) is int
            assert 0 <= count <= 1 << 53


@given(st.fixed_dictionaries({}, optional={"messages": JSON | st.lists(JSON), "prompt": JSON}))
def test_odd_requests_have_a_length(body: Body) -> None:
    openai.has_media(body)
    assert openai.length(body) >= 0


@pytest.mark.parametrize(
    ("request_says", "left"),
    [
        ({}, [1, 2, 3]),
        ({"truncate_prompt_tokens": None}, [1, 2, 3]),
        ({"truncate_prompt_tokens": 2}, [2, 3]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [2, 3]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, 2]),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, [1, 2, 3]),
        ({"truncate_prompt_tokens": -1}, None),
        ({"truncate_prompt_tokens": True}, None),
        ({"truncate_prompt_tokens": "2"}, None),
    ],
)
def test_what_is_left_of_a_prompt(request_says: Body, left: list[int] | None) -> None:
    assert openai.kept(request_says, [1, 2, 3]) == left


@pytest.mark.parametrize(
    ("content", "media", "length"),
    [
        ("abc", False, 3),
        ([{"type": "text", "text": "abc"}, {"type": "text", "text": "d"}], False, 4),
        ([{"text": "abc"}], False, 3),
        ([{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {"url": "data:..."}}], True, 3),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], True, 0),
    ],
)
def test_media_are_told_from_text(content: Any, media: bool, length: int) -> None:
    body = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": content}]}
    assert (openai.has_media(body), openai.length(body)) == (media, length)
    assert openai.length({"prompt": "abc"}) == 3


@pytest.mark.parametrize(
    ("body", "means"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"object": "error", "message": "no such thing"}', "no such thing"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"", "no reason given"),
    ],
)
def test_complaints_of_engines_are_understood(body: bytes, means: str) -> None:
    assert openai.complaint(body) == means
    if b'"error"' in body:
        with pytest.raises(EngineFailed, match=means):
            list(openai.Chunks().feed(b"data: " + body + b"\n"))
