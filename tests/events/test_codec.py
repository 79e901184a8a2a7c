"""The door from the log into the folds: every event comes back as it went, and no bytes raise anything but `BadCommit`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events import codec, types
from kvplane.events.codec import Message, decode
from kvplane.events.errors import BadCommit
from kvplane.events.hashing import pack_hashes

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.isprintable)
counts = st.integers(0, 1 << 53)
lengths = st.integers(0, 1 << 20)
packed = st.binary(max_size=64).map(lambda data: data[: len(data) // 8 * 8])
hashes = st.integers(0, (1 << 64) - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tiers = st.sampled_from(types.TIERS)
seconds = st.floats(0, 1e6)


def events_of(node: str, model: str) -> dict[str, st.SearchStrategy[list[types.Event]]]:
    """Commits that may lie under each topic, for this node or model."""
    registered = st.builds(
        types.NodeRegistered, node=st.just(node), address=texts, models=st.lists(names, min_size=1, max_size=3, unique=True),
        block_size=st.integers(1, 65536), capacity_blocks=st.dictionaries(tiers, counts).map(lambda d: {"gpu": 5, **d}),
        cache_mode=st.sampled_from(["managed", "reported"]), engine=texts, max_active=counts, pulse_seconds=seconds,
        labels=st.dictionaries(names, texts, max_size=3),
    )  # fmt: skip
    others = st.sampled_from(
        [types.NodeCordoned(node, "why"), types.NodeUncordoned(node), types.NodeLost(node), types.NodeRecovered(node),
         types.NodeRemoved(node)]
    )  # fmt: skip
    stored = st.builds(types.BlocksStored, st.just(node), counts, counts, packed, st.none() | hashes, tiers)
    engine = packed.map(
        lambda data: types.BlocksStored(
            node, 1, 1, data, engine_hashes=[b"\x01\x02", 1 << 63, -5, *range(9)][: len(data) // 8]
        )
    )
    removed = st.builds(types.BlocksRemoved, st.just(node), counts, counts, packed, tiers)
    cleared = st.builds(types.CacheCleared, st.just(node), counts, counts, texts)
    placed = st.builds(types.BlocksPlaced, st.just(node), counts, packed, packed, st.none() | hashes, texts)
    session = st.builds(types.SessionAssigned, names, st.just(model), names, texts)
    ended = st.builds(types.SessionEnded, names, st.just(model), texts)
    routed = packed.flatmap(
        lambda data: st.builds(
            types.RequestRouted, request=names, model=names, node=names, match=st.just(0), blocks=st.just(len(data) // 8),
            tokens=lengths, hashes=st.just(data), session=texts, policy=texts, applied=counts,
            candidates=st.lists(st.builds(types.Candidate, names, counts, st.floats(allow_nan=False)), max_size=3),
        )
    )  # fmt: skip
    completed = st.builds(types.RequestCompleted, names, names, texts, counts, counts, counts, seconds, seconds)
    policy = st.builds(
        types.PolicyChanged, names, st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    )

    def some(*kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[list[types.Event]]:
        return st.lists(st.one_of(*kinds), min_size=1, max_size=4)

    return {
        f"node.{node}": (registered | others).map(lambda event: [event]),
        f"cache.{node}": some(stored, removed, cleared, engine) | placed.map(lambda event: [event]),
        f"session.{model}": some(session, ended),
        "access.w": some(routed, completed),
        "control": some(policy),
    }


TOPICS = events_of("n", "m")
commits = st.sampled_from(sorted(TOPICS)).flatmap(lambda place: st.tuples(st.just(place), TOPICS[place]))


def message(subject: str, body: bytes, headers: dict[str, str] | None = None) -> Message:
    return Message(1, subject, 1, headers, body)


@given(commits)
def test_messagepack_comes_back(commit: tuple[str, list[types.Event]]) -> None:
    place, events = commit
    assert decode("f", message(f"kv.f.{place}", codec.encode(events))).events == events
    assert codec.join([codec.encode_one(event) for event in events]) == codec.encode(events)


@given(commits)
def test_json_comes_back(commit: tuple[str, list[types.Event]]) -> None:
    place, events = commit
    plain = [event for event in events if getattr(event, "engine_hashes", None) is None]
    if any(
        isinstance(event, types.RequestRouted) and any(abs(c.cost) == float("inf") for c in event.candidates)
        for event in plain
    ):
        return
    if plain:
        assert decode("f", message(f"kv.f.{place}", codec.encode_json(plain))).events == plain


@pytest.mark.parametrize("count", [1, 15, 16, 300, 16384])
def test_groups_of_any_size_are_joined_as_one_array(count: int) -> None:
    events: list[types.Event] = [types.CacheCleared("n", 1, batch) for batch in range(count)]
    body = codec.join([codec.encode_one(event) for event in events])
    assert decode("f", message("kv.f.cache.n", body)).events == events


def test_fields_from_the_future_are_ignored() -> None:
    event = codec.to_builtins(types.CacheCleared("n", 1)) | {"colour": {"deep": [1, {"x": None}]}}
    for body in (msgspec.msgpack.encode([event]), msgspec.json.encode([event])):
        assert decode("f", message("kv.f.cache.n", body)).events == [types.CacheCleared("n", 1)]


@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, msgspec.json.encode])
def test_nesting_is_bounded_by_a_number_and_not_by_the_interpreter(encode: Any) -> None:
    """Replicas on two versions of Python can recurse to different depths."""

    def nested(depth: int) -> bytes:
        inner: Any = 1
        for _ in range(depth - 2):
            inner = [inner]
        return bytes(encode([codec.to_builtins(types.CacheCleared("n", 1)) | {"colour": inner}]))

    assert decode("f", message("kv.f.cache.n", nested(codec.DEPTH_LIMIT))).events
    for depth in (codec.DEPTH_LIMIT + 1, 900):
        with pytest.raises(BadCommit) as caught:
            decode("f", message("kv.f.cache.n", nested(depth)))
        assert caught.value.code == "undecodable"


CLEARED = codec.encode([types.CacheCleared("n", 1)])
ROUTED = types.RequestRouted("q", "m", "n", 0, 1, 20, bytes(8))


def mutated(event: types.Event, **fields: Any) -> bytes:
    data = msgspec.to_builtins(event, builtin_types=(bytes,)) | fields
    return msgspec.msgpack.encode([data])


REFUSED: list[tuple[str, str, bytes, dict[str, str] | None]] = [
        ("foreign_subject", "kv.other.cache.n", CLEARED, None),
        ("foreign_subject", "kv.f.cache.%6e", CLEARED, None),
        ("foreign_subject", "kv.f.cache.n.x", CLEARED, None),
        ("checksum", "kv.f.cache.n", CLEARED, {codec.CRC32: "deadbeef"}),
        ("bad_header", "kv.f.cache.n", CLEARED, {codec.WRITER: "w", codec.WRITER_SEQ: "x"}),
        ("bad_header", "kv.f.cache.n", CLEARED, {codec.BASED_ON: "-1"}),
        ("bad_header", "kv.f.cache.n", CLEARED, {codec.BASED_ON: "9" * 30}),
        ("bad_header", "kv.f.cache.n", CLEARED, {codec.BASED_ON: "\u0661"}),
        ("bad_header", "kv.f.cache.n", CLEARED, {codec.WRITER: "w" * 129}),
        ("undecodable", "kv.f.cache.n", b"", None),
        ("undecodable", "kv.f.cache.n", CLEARED[:-1], None),
        ("undecodable", "kv.f.cache.n", CLEARED + b"\x00", None),
        ("undecodable", "kv.f.cache.n", b"[", None),
        ("undecodable", "kv.f.cache.n", b"[" * 100_000, None),
        ("undecodable", "kv.f.cache.n", b"[1]", None),
        ("invalid", "kv.f.cache.n", b"[]", None),
        ("invalid", "kv.f.cache.n", b"\x90", None),
        ("invalid", "kv.f.cache.n", b'{"stream":"KV_f","seq":1}', None),
        ("unknown_type", "kv.f.cache.n", b"[{}]", None),
        ("unknown_type", "kv.f.cache.n", b'[{"type":"BlocksStored.2"}]', None),
        ("unknown_type", "kv.f.node.n", CLEARED, None),
        ("unknown_type", "kv.f.cache.n", codec.encode([types.NodeLost("n")]), None),
        ("wrong_subject", "kv.f.cache.x", CLEARED, None),
        ("wrong_subject", "kv.f.session.x", codec.encode([types.SessionEnded("s", "m")]), None),
        ("wrong_subject", "kv.f.access.me", codec.encode([types.RequestCompleted("q", "n")]), {codec.WRITER: "you"}),
        ("invalid", "kv.f.node.n", codec.encode([types.NodeLost("n"), types.NodeRecovered("n")]), None),
        ("invalid", "kv.f.cache.n", codec.encode([types.BlocksPlaced("n", 1), types.CacheCleared("n", 1)]), None),
        ("invalid", "kv.f.cache.n", codec.encode([types.BlocksRemoved("n", 1, 1, b"1234567")]), None),
        ("invalid", "kv.f.cache.n", codec.encode([types.BlocksStored("n", 1, 1, bytes(16), engine_hashes=[1])]), None),
        ("invalid", "kv.f.cache.n", mutated(types.CacheCleared("n", 1), epoch=-1), None),
        ("invalid", "kv.f.cache.n", mutated(types.BlocksStored("n", 1, 1, b""), parent=-1), None),
        ("invalid", "kv.f.cache.n", mutated(types.BlocksStored("n", 1, 1, b""), tier="tape"), None),
        ("invalid", "kv.f.access.w", mutated(ROUTED, match=2), None),
        ("invalid", "kv.f.access.w", mutated(ROUTED, blocks=3), None),
        ("invalid", "kv.f.access.w", mutated(ROUTED, tokens=1 << 40), None),
        ("invalid", "kv.f.session.m", codec.encode([types.SessionEnded("a\nb", "m")]), None),
        ("invalid", "kv.f.cache.n", b'[{"type":"CacheCleared.1","node":"n","epoch":1e400}]', None),
        ("invalid", "kv.f.cache.n", b'[{"type":"BlocksRemoved.1","node":"n","epoch":1,"batch":1,"hashes":[-1]}]', None),
        ("invalid", "kv.f.cache.n", b'[{"type":"BlocksRemoved.1","node":"n","epoch":1,"batch":1,"hashes":"AAA="}]', None),
]  # fmt: skip


def test_the_examples_are_of_every_reason() -> None:
    assert {reason for reason, *_ in REFUSED} == set(codec.REASONS)


@pytest.mark.parametrize(("reason", "subject", "body", "headers"), REFUSED)
def test_each_reason(reason: str, subject: str, body: bytes, headers: dict[str, str] | None) -> None:
    with pytest.raises(BadCommit) as caught:
        decode("f", message(subject, body, headers))
    assert caught.value.code == reason
    assert reason in codec.REASONS
    assert str(caught.value)


subjects = st.sampled_from([f"kv.f.{place}" for place in TOPICS] + ["kv.f.node.*", "", "x"]) | st.text(max_size=30)
header_values = st.text(max_size=20) | st.integers().map(str)
headers = st.none() | st.dictionaries(
    st.sampled_from([codec.WRITER, codec.WRITER_SEQ, codec.BASED_ON, codec.CRC32, codec.CONTENT_TYPE]), header_values
)


changed = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)


def attempt(subject: str, body: bytes, given_headers: dict[str, str] | None) -> None:
    try:
        commit = decode("f", message(subject, body, given_headers))
    except BadCommit as error:
        assert error.code in codec.REASONS  # noqa: PT017 - any other error fails the test by itself
    else:
        assert commit.events


EVENTS = set(types.Event.__subclasses__())
EXAMPLES: list[tuple[str, types.Event]] = [
    ("node.n", types.NodeRegistered("n", "h:1", ["m"], 16, {"gpu": 1, "disk": 0}, "managed", "v", 3, 1.5, {"a": ""})),
    ("node.n", types.NodeCordoned("n", "why")),
    ("node.n", types.NodeUncordoned("n")),
    ("node.n", types.NodeLost("n", "fire")),
    ("node.n", types.NodeRecovered("n")),
    ("node.n", types.NodeRemoved("n", "sold")),
    ("cache.n", types.BlocksStored("n", 3, 4, b"\xff" * 16, (1 << 64) - 1, "cpu", [5, -6])),
    ("cache.n", types.BlocksRemoved("n", 3, 4, bytes(8), "disk")),
    ("cache.n", types.BlocksPlaced("n", 3, bytes(8), b"\xff" * 8, 7, "q")),
    ("cache.n", types.CacheCleared("n", 3, 4, "gap")),
    ("cache.n", types.GroupStored("n", 3, 4, 2, "sliding", bytes(16), 1024, 2, [5, -6])),
    ("cache.n", types.GroupRemoved("n", 3, 4, 2, bytes(8))),
    ("session.m", types.SessionAssigned("s", "m", "n", "new")),
    ("session.m", types.SessionEnded("s", "m", "bye")),
    (
        "access.w",
        types.RequestRouted("q", "m", "n", 1, 2, 33, bytes(16), "s", "ttft", 9, [types.Candidate("n", 1, 0.5)]),
    ),
    ("access.w", types.RequestCompleted("q", "n", "ok", 33, 16, 7, 0.25, 1.5)),
    ("access.w", types.RequestHeld("q", "m", 33, "s", "t", 2, "no room", 3, 0.5, 1, bytes(8), 9, 7, "00-1")),
    ("access.w", types.RequestReleased("q", "m", "room", 12.5)),
    ("control", types.PolicyChanged("ttft", {"x": -1.5})),
    ("control", types.FormatRaised(2, "9.9")),
]


def test_the_examples_are_of_every_event() -> None:
    assert {type(event) for _, event in EXAMPLES} == EVENTS


@pytest.mark.parametrize("encode", [codec.encode, codec.encode_json])
@pytest.mark.parametrize(("place", "event"), EXAMPLES, ids=lambda part: type(part).__name__)
def test_each_event_comes_back_with_all_that_it_says(place: str, event: types.Event, encode: Any) -> None:
    assert decode("f", message(f"kv.f.{place}", encode([event]))).events == [event]
    for other in TOPICS:
        if other.split(".")[0] != place.split(".", maxsplit=1)[0]:
            with pytest.raises(BadCommit):
                decode("f", message(f"kv.f.{other}", encode([event])))


def test_hashes_in_json_may_be_decimal_or_hexadecimal_numbers_or_text() -> None:
    body = (
        b'[{"type":"BlocksStored.1","node":"n","epoch":1,"batch":1,"parent":"0x10","hashes":'
        b'[18446744073709551615,"18446744073709551614","0xfffffffffffffffd","fffffffffffffffc"]}]'
    )
    (event,) = decode("f", message("kv.f.cache.n", body)).events
    expected = [(1 << 64) - 1 - at for at in range(4)]
    assert event == types.BlocksStored("n", 1, 1, pack_hashes(expected), 16)


HOSTILE = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff" * 9,
    b"\x91" * 200_000,
    b"\x91\x81" + b"\xa1a\x81" * 100_000,
    b"[" + b'{"a":' * 100_000,
    b'[{"type":"CacheCleared.1","node":"n","epoch":' + b"9" * 100_000 + b"}]",
    b'[{"type":"BlocksRemoved.1","node":"n","epoch":1,"batch":1,"hashes":["' + b"9" * 100_000 + b'"]}]',
    b'[{"type":"BlocksRemoved.1","node":"n","epoch":1,"batch":1,"hashes":[1e999,-0.0,NaN]}]',
    b'[{"type":"BlocksRemoved.1","node":"n","epoch":1,"batch":1,"hashes":[{"a":[]}]}]',
    b'[{"type":"CacheCleared.1","node":"\xff\xfe","epoch":1}]',
    b'[{"type":"CacheCleared.1","node":"\\ud800","epoch":1}]',
    b"\x91\x83\xa4type\xaeCacheCleared.1\xa4node\xa3\xed\xa0\x80\xa5epoch\x01",
    b'[{"type":["CacheCleared.1"],"node":"n","epoch":1}]',
    b'[{"type":{"a":1}}]',
    b"\x91\x81\xa4type\x90",
    b"\x91\x81\x90\x90",
    b"\xef\xbb\xbf[]",
    b"[]\x00",
    b"\x91\xc7\x08\x01" + bytes(8),
    b"\x91\xd6\xff\xff\xff\xff\xff",
]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:24]))
def test_bodies_made_to_hurt_are_refused(body: bytes) -> None:
    with pytest.raises(BadCommit) as caught:
        decode("f", message("kv.f.cache.n", body))
    assert caught.value.code in {"undecodable", "invalid", "unknown_type"}


@pytest.mark.parametrize(("count", "fits"), [(types.EVENTS_LIMIT, True), (types.EVENTS_LIMIT + 1, False)])
def test_a_commit_holds_a_bounded_number_of_events(count: int, fits: bool) -> None:
    body = codec.join([codec.encode_one(types.CacheCleared("n", 1))] * count)
    if fits:
        assert len(decode("f", message("kv.f.cache.n", body)).events) == count
    else:
        with pytest.raises(BadCommit, match="length"):
            decode("f", message("kv.f.cache.n", body))


def test_headers_are_read() -> None:
    given_headers = {
        codec.WRITER: "w",
        codec.WRITER_SEQ: "7",
        codec.BASED_ON: "0",
        codec.CRC32: codec.checksum(CLEARED),
    }
    assert decode("f", message("kv.f.cache.n", CLEARED, given_headers))[2:] == ("w", 7, 0)
    assert decode("f", message("kv.f.cache.n", CLEARED))[2:] == ("", 0, None)


@settings(max_examples=1000, deadline=None, print_blob=True)
@given(subjects, st.binary(max_size=200), headers)
def test_any_bytes(subject: str, body: bytes, given_headers: dict[str, str] | None) -> None:
    attempt(subject, body, given_headers)


@settings(max_examples=1000, deadline=None, print_blob=True)
@given(
    commits,
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.booleans(),
    st.integers(0, 9),
    headers,
)
def test_valid_commits_with_a_few_bytes_changed(
    commit: tuple[str, list[types.Event]],
    changes: list[tuple[int, int]],
    as_json: bool,
    cut: int,
    given_headers: dict[str, str] | None,
) -> None:
    place, events = commit
    try:
        body = bytearray(codec.encode_json(events) if as_json else codec.encode(events))
    except UnicodeDecodeError:
        return
    for at, value in changes:
        body[at % len(body)] = value
    attempt(f"kv.f.{place}", bytes(body[: len(body) - cut]), given_headers)


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
plain = st.recursive(
    scalars | st.text(max_size=9) | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
UNIONS = (types.NodeEvent, types.CacheEvent, types.AccessEvent)
FIELDS = sorted(
    {"type", "colour"} | {field for union in UNIONS for kind in union.__args__ for field in kind.__struct_fields__}
)


@settings(max_examples=1000, deadline=None, print_blob=True)
@given(commits, st.dictionaries(st.sampled_from(FIELDS), plain, max_size=3), st.booleans())
def test_valid_commits_with_fields_of_any_type(
    commit: tuple[str, list[types.Event]], fields: dict[str, Any], as_json: bool
) -> None:
    place, events = commit
    body = mutated(events[0], **fields)
    if as_json:
        body = msgspec.json.encode(codec.to_builtins(events[0]) | msgspec.to_builtins(fields))
    attempt(f"kv.f.{place}", b"[" + body + b"]" if as_json else body, None)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(
    st.dictionaries(scalars | st.binary(max_size=4) | st.tuples(st.integers(0, 9)), plain, max_size=3),
    st.binary(max_size=12),
)
def test_unknown_fields_whose_names_are_no_text(strange: dict[Any, Any], junk: bytes) -> None:
    """MessagePack allows anything as a key; a known event in front of it makes sure that it is walked into."""
    head = b"\x91\x85" + msgspec.msgpack.encode(codec.to_builtins(types.CacheCleared("n", 1)))[1:] + b"\xa6colour\x01"
    attempt("kv.f.cache.n", head + msgspec.msgpack.encode(strange) + b"\x01", None)
    attempt("kv.f.cache.n", head + junk, None)
