"""Nonsense on every door: each is answered with a code and a sentence, and nothing stops."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvplane.events.errors import KvplaneError
from kvplane.events.hashing import MOST_TOKENS, pack_hashes
from kvplane.services.control import commands
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused
from kvplane.services.rpc.client import ask
from kvplane.services.rpc.server import Endpoint, fault, serve
from tests.support.historians import messages_of
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

ENDPOINTS = [
    "route",
    "complete",
    *(
        f"coordinator.{name}"
        for name in (
            "node.register", "node.cordon", "node.uncordon", "node.remove", "node.list", "cache.admit", "cache.touch",
            "cache.evict", "cache.lookup", "session.end", "policy.set", "status",
        )
    ),
]  # fmt: skip

FORMS = [
    messages.RouteRequest, messages.CompleteRequest, messages.RegisterRequest, messages.NodeRequest,
    messages.ListRequest, messages.AdmitRequest, messages.BlocksRequest, messages.LookupRequest,
    messages.SessionRequest, messages.PolicyRequest, messages.StatusRequest,
]  # fmt: skip

NODE = {"node": "a", "address": "x", "models": ["m"], "block_size": 16, "capacity_blocks": {"gpu": 4}}


@pytest.fixture
async def small(fleet: Fleet) -> Fleet:
    """One managed node `a` of model `m`, four blocks."""
    await fleet.coordinator()
    router = await fleet.router()
    await fleet.ask(
        "coordinator.node.register", msgspec.convert(NODE | {"cache_mode": "managed"}, messages.RegisterRequest)
    )
    await until(lambda: "a" in router.state.nodes)
    return fleet


async def sent(fleet: Fleet, endpoint: str, body: bytes) -> tuple[str | None, dict[str, Any]]:
    """Status and body of the answer to raw bytes."""
    answer = await fleet.client.request(f"kv.default.{endpoint}", body, timeout=5)
    headers = answer.headers or {}
    as_json = body[:1] < b"\x80"
    return headers.get("Nats-Service-Error-Code"), (json.loads if as_json or headers else msgspec.msgpack.decode)(
        answer.data
    )


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_malformed_bytes_are_answered_and_the_service_goes_on(small: Fleet, endpoint: str) -> None:
    bad = [
        b"\xff",
        b"\x00\x01",
        b"[]",
        b"null",
        b"{",
        b"{]",
        b'"text"',
        b"7",
        b"\xc1",
        b"\x81\xa1",
        b"[" * 5000,
        b"\xdf" * 64,
    ]
    bad += [
        b'{"node": 7, "model": 7, "request": 7, "policy": 7, "digest": 7, "session": 7}',
        b"{\xff\xfe}",
    ]
    for body in bad:
        status, answer = await sent(small, endpoint, body)
        assert (status, answer["code"]) == ("400", "bad_request"), body
        assert len(answer["error"]) > 20
    assert (await small.ask("coordinator.status", messages.StatusRequest()))["nodes"] == 1


@pytest.mark.parametrize(
    ("endpoint", "request_", "code"),
    [
        ("route", {"model": "unknown", "hashes": []}, "unknown_model"),
        ("route", {"model": "m"}, "bad_request"),
        ("route", {"model": "m", "tokens": [1], "hashes": [1]}, "bad_request"),
        ("route", {"model": "", "tokens": [1]}, "bad_request"),
        ("route", {"model": "m" * 129, "tokens": [1]}, "bad_request"),
        ("route", {"model": "m", "tokens": [-1]}, "bad_request"),
        ("route", {"model": "m", "tokens": [1 << 32]}, "bad_request"),
        ("route", {"model": "m", "tokens": ["1"]}, "bad_request"),
        ("route", {"model": "m", "hashes": [1 << 64]}, "bad_request"),
        ("route", {"model": "m", "hashes": [True]}, "bad_request"),
        ("route", {"model": "m", "hashes": ["xyz"]}, "bad_request"),
        ("route", {"model": "m", "hashes": "AAA"}, "bad_request"),
        ("route", {"model": "m", "hashes": [1, 2], "tokens_count": 31}, "bad_request"),
        ("route", {"model": "m", "hashes": [1], "tokens_count": -1}, "bad_request"),
        ("route", {"model": "m", "hashes": [1], "session": "a\nb"}, "bad_request"),
        ("route", {"model": "m", "prompt": "text"}, "no_tokenizer"),
        ("route", {"model": "m", "hashes": [1], "exclude": ["a"]}, "no_node"),
        ("complete", {"request": "", "node": "a"}, "bad_request"),
        ("complete", {"request": "r", "node": "a", "ttft": -1}, "bad_request"),
        ("complete", {"request": "r", "node": "a", "duration": 1e9}, "bad_request"),
        ("coordinator.node.register", NODE, "node_exists"),
        ("coordinator.node.register", NODE | {"node": "b", "block_size": 0}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "block_size": 32}, "conflict"),
        ("coordinator.node.register", NODE | {"node": "b", "capacity_blocks": {"gpu": -4}}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "capacity_blocks": {"tape": 4}}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "capacity_blocks": {}}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "models": []}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "models": [""]}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "max_active": -1}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "max_active": 10**30}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "block_size": 10**30}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "cache_mode": "magic"}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b", "pulse_seconds": -1}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b\x00"}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": ""}, "bad_request"),
        ("coordinator.node.register", NODE | {"node": "b" * 129}, "bad_request"),
        ("coordinator.node.cordon", {"node": "nobody"}, "unknown_node"),
        ("coordinator.node.uncordon", {"node": "*"}, "unknown_node"),
        ("coordinator.node.remove", {"node": "a.b >"}, "unknown_node"),
        ("coordinator.node.remove", {"node": ""}, "bad_request"),
        ("coordinator.cache.admit", {"model": "m", "hashes": []}, "bad_request"),
        ("coordinator.cache.admit", {"model": "m", "hashes": [1, 1]}, "bad_request"),
        ("coordinator.cache.admit", {"model": "m", "hashes": [1, 2, 3, 4, 5]}, "no_room"),
        ("coordinator.cache.admit", {"model": "other", "hashes": [1]}, "unknown_model"),
        ("coordinator.cache.admit", {"model": "other", "hashes": [1], "node": "a"}, "unknown_model"),
        ("coordinator.cache.admit", {"model": "m", "hashes": [1], "node": "nobody"}, "unknown_node"),
        ("coordinator.cache.admit", {"model": "m", "hashes": [1], "strategy": "worst"}, "bad_request"),
        ("coordinator.cache.touch", {"node": "nobody", "hashes": [1]}, "unknown_node"),
        ("coordinator.cache.evict", {"node": "a"}, "bad_request"),
        ("coordinator.cache.evict", {"node": "a", "count": 3}, "no_room"),
        ("coordinator.cache.evict", {"node": "a", "count": -3}, "bad_request"),
        ("coordinator.cache.lookup", {"model": "other", "hashes": [1]}, "unknown_model"),
        ("coordinator.session.end", {"model": "m", "session": ""}, "bad_request"),
        ("coordinator.policy.set", {"policy": "no_such"}, "bad_request"),
        ("coordinator.policy.set", {"policy": "no.such:thing"}, "bad_request"),
        ("coordinator.policy.set", {"policy": "math:pi"}, "bad_request"),
    ],
)  # fmt: skip
async def test_wrong_requests_say_what_to_do(small: Fleet, endpoint: str, request_: dict[str, Any], code: str) -> None:
    before = (await small.ask("coordinator.status", messages.StatusRequest()))["sequence"]
    status, answer = await sent(small, endpoint, json.dumps(request_).encode())
    assert answer["code"] == code
    assert status is not None
    assert status.startswith(("4", "5"))
    assert len(answer["error"]) > 20
    assert "Traceback" not in answer["error"]
    # A refusal changes nothing.
    assert (await small.ask("coordinator.status", messages.StatusRequest()))["sequence"] == before


async def test_names_may_hold_anything_printable(small: Fleet) -> None:
    name = "Qwen/Qwen2.5 7B * > %41 ü.日本"
    request = NODE | {"node": name, "models": [name]}
    status, answer = await sent(small, "coordinator.node.register", json.dumps(request).encode())
    assert (status, answer["node"]) == (None, name)
    listing = await small.ask("coordinator.node.list", messages.ListRequest(model=name))
    assert [row["node"] for row in listing["nodes"]] == [name]


async def test_a_prompt_of_ten_million_tokens_is_routed_or_refused_with_a_sentence(small: Fleet) -> None:
    blocks = 10_000_000 // 16
    hashes = pack_hashes(range(min(blocks, (small.client.max_payload - 1000) // 8)))
    answer = await small.ask(
        "route", messages.RouteRequest(model="m", hashes=hashes[: 250_000 * 8], tokens_count=10_000_000)
    )
    assert (answer["kind"], answer["tokens"]) == ("miss", 10_000_000)
    assert await small.refused("route", messages.RouteRequest(model="m", hashes=hashes)) == "bad_request"
    status = await small.ask("coordinator.status", messages.StatusRequest())
    assert status["skipped"] == {}


@pytest.mark.parametrize("encode", [msgspec.json.encode, msgspec.msgpack.encode])
async def test_an_unknown_field_is_refused_by_its_name_everywhere(small: Fleet, encode: Any) -> None:
    for endpoint in ENDPOINTS:
        answer = await small.client.request(f"kv.default.{endpoint}", encode({"sesion": "s"}), timeout=5)
        assert answer.headers is not None
        assert answer.headers["Nats-Service-Error-Code"] == "400", endpoint
        assert "unknown field 'sesion'" in answer.headers["Nats-Service-Error"]
    body = {"model": "m", "tokens": [1], "sesion": "s"}
    message = json.loads((await small.client.request("kv.default.route", encode(body), timeout=5)).data)["error"]
    assert "unknown field 'sesion'; was 'session' meant? known are model, hashes, tokens," in message


def test_what_a_client_leaves_as_it_is_does_not_travel() -> None:
    """So that a service which does not know a newer field understands those that don't use it."""
    request = messages.RouteRequest(model="m", tokens=[1], request="r")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request)) == {"model": "m", "tokens": [1], "request": "r"}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(messages.ListRequest())) == {}


async def test_that_all_nodes_are_lost_is_the_answer_however_the_prompt_is_given(fleet: Fleet) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    for node in ("a", "b"):
        await fleet.ask("coordinator.node.register", msgspec.convert(NODE | {"node": node}, messages.RegisterRequest))
        await coordinator._conclude(commands.lost, node, "gone")
    await until(lambda: [node.lost for node in router.state.nodes.values()] == ["gone", "gone"])
    prompts: list[dict[str, Any]] = [{"prompt": "text"}, {"tokens": [1]}, {"hashes": b""}]
    for prompt in prompts:
        with pytest.raises(Refused, match="no node of model 'm' is available: all 2 lost") as caught:
            await fleet.ask("route", messages.RouteRequest(model="m", **prompt))
        assert caught.value.code == "no_node"


def test_more_tokens_than_the_limit_are_refused() -> None:
    too_long = b"\x82\xa5model\xa1m\xa6tokens\xdd" + (MOST_TOKENS + 1).to_bytes(4, "big") + bytes(MOST_TOKENS + 1)
    with pytest.raises(KvplaneError, match="does not fit"):
        messages.decode_request(too_long, messages.RouteRequest)


async def test_forged_messages_on_every_subject_change_nothing(small: Fleet) -> None:
    """Acknowledgements, requests and nonsense that land on the log are skipped, counted, and stop nobody."""
    before = await small.ask("coordinator.status", messages.StatusRequest(digest=True))
    subjects = ["node.a", "node.%61", "cache.a", "cache.b", "session.m", "access.x", "control", "node.%zz"]
    bodies = [b'{"stream":"KV_default","seq":7}', b"", b"\x91\x80", b"[{}]", b"\x00" * 100]
    for subject in subjects:
        for body in bodies:
            await small.client.jetstream().publish(f"kv.default.{subject}", body)
    expected = before["sequence"] + len(subjects) * len(bodies)
    for _ in range(100):
        after = await small.ask("coordinator.status", messages.StatusRequest())
        if after["sequence"] == expected:
            break
    assert sum(after["skipped"].values()) == len(subjects) * len(bodies)
    assert (after["nodes"], after["memberships"]) == (before["nodes"], before["memberships"])
    await small.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))


@settings(max_examples=400, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(FORMS),
)
def test_no_bytes_make_a_decoder_raise_anything_but_ours(body: bytes, form: type[msgspec.Struct]) -> None:
    try:
        messages.decode_request(body, form)
    except KvplaneError as error:
        status, sentence, answer = fault(error)
        assert status == "400"
        assert sentence.isascii()
        assert "\n" not in sentence
        assert json.loads(answer)["code"] == "bad_request"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None, print_blob=True)
@given(st.data(), st.sampled_from(FORMS))
def test_no_fields_make_a_decoder_raise_anything_but_ours(data: st.DataObject, form: type[msgspec.Struct]) -> None:
    names = list(form.__struct_fields__)
    fields = data.draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=5), PLAIN, max_size=8))
    bodies = []
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        try:
            bodies.append(encode(fields))
        except (OverflowError, UnicodeEncodeError):
            continue
    for body in bodies:
        try:
            messages.decode_request(body, form)
        except KvplaneError as error:
            assert error.code == "bad_request"  # noqa: PT017 - any other error fails the test by itself


def header_block(block: bytes, subject: str, body: bytes, reply: bytes = b"") -> bytes:
    """A message with headers as they are, valid or not: no client library would send these."""
    return b"HPUB %s %s%d %d\r\n%s%s\r\n" % (subject.encode(), reply, len(block), len(block) + len(body), block, body)


BLOCKS = [
    b"X",
    b"NATS/1.0",
    b"XXXX\r\n\r\n",
    b"\n",
    b"NATS/1.0\r\nStatus: 100\r\n\r\n",
    b"NATS/1.0 100 Idle\r\n\r\n",
    b"\xff" * 30,
]


async def test_headers_of_any_bytes_stop_no_replica_and_no_service(small: Fleet) -> None:
    """On the log they would stop every replica that ever reads it; on an endpoint, the service."""
    before = await small.ask("coordinator.status", messages.StatusRequest())
    host, port = small.url.removeprefix("nats://").split(":")
    async with await anyio.connect_tcp(host, int(port)) as stream:
        await stream.send(b'CONNECT {"verbose":false,"headers":true}\r\n')
        for block in BLOCKS:
            await stream.send(header_block(block, "kv.default.control", b"junk"))
            for endpoint in ("route", "coordinator.status", "pulse.a"):
                await stream.send(header_block(block, f"kv.default.{endpoint}", b"junk", b"nowhere "))
        await stream.send(b"PING\r\n")
        received = b""
        with anyio.fail_after(10):
            while b"PONG" not in received:
                received += await stream.receive()
    late = await small.router()
    await small.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))
    after = await small.ask("coordinator.status", messages.StatusRequest())
    assert after["sequence"] == before["sequence"] + len(BLOCKS) + 1
    assert sum(after["skipped"].values()) == len(BLOCKS)
    await until(lambda: late.state.sequence == after["sequence"])
    assert await small.refused("route", messages.RouteRequest(model="m", hashes=pack_hashes([1]))) == "no_node"


async def test_what_the_log_names_as_policy_is_not_imported(small: Fleet) -> None:
    """`unittest.__main__` exits the process that imports it."""
    policy = messages.PolicyRequest(policy="unittest.__main__:x")
    assert await small.refused("coordinator.policy.set", policy) == "bad_request"
    event = b'[{"type":"PolicyChanged.1","policy":"unittest.__main__:x"}]'
    await small.client.jetstream().publish("kv.default.control", event)
    for _ in range(100):
        answer = await small.ask("route", messages.RouteRequest(model="m", hashes=pack_hashes([1]), dry_run=True))
        if answer["policy"] == "least_loaded":
            break
        await anyio.sleep(0.02)
    assert answer["policy"] == "least_loaded"


async def test_one_bad_request_does_not_cost_the_decisions_of_others(small: Fleet) -> None:
    """They share a commit, and a commit is taken whole or not at all."""
    honest = await small.ask("route", messages.RouteRequest(model="m", hashes=pack_hashes([1])))
    body = json.dumps({"model": "m", "hashes": [], "tokens_count": 1 << 40}).encode()
    assert (await sent(small, "route", body))[0] == "400"
    endless = messages.CompleteRequest(request=honest["request"], node="a", ttft=float("inf"))
    assert await small.refused("complete", endless) == "bad_request"
    await small.ask("complete", messages.CompleteRequest(request=honest["request"], node="a", ttft=0.5))

    async def completed() -> bool:
        log = await messages_of(small.client)
        return any(
            b"RequestCompleted" in message.body and honest["request"].encode() in message.body for message in log
        )

    await until(completed)
    # Whoever has committed something has read all that came before.
    await small.ask("coordinator.node.cordon", messages.NodeRequest(node="a"))
    status = await small.ask("coordinator.status", messages.StatusRequest())
    assert (status["skipped"], status["ignored"]) == ({}, {})


@pytest.mark.parametrize(
    ("endpoint", "request_"),
    [
        ("coordinator.node.register", NODE | {"node": "b", "block_size": 70_000}),
        ("coordinator.node.register", NODE | {"node": "b", "address": "x" * 600}),
        ("coordinator.node.register", NODE | {"node": "b", "labels": {str(n): "" for n in range(65)}}),
        ("coordinator.node.cordon", {"node": "a", "reason": "x" * 600}),
        ("coordinator.policy.set", {"policy": "ttft", "parameters": {"": 1}}),
    ],
)
async def test_what_no_reader_would_take_is_not_written(small: Fleet, endpoint: str, request_: dict[str, Any]) -> None:
    before = (await small.ask("coordinator.status", messages.StatusRequest()))["sequence"]
    assert (await sent(small, endpoint, json.dumps(request_).encode()))[1]["code"] == "bad_request"
    assert (await small.ask("coordinator.status", messages.StatusRequest()))["sequence"] == before


async def test_an_answer_larger_than_a_message_is_refused_and_not_lost(client: Client) -> None:
    async with anyio.create_task_group() as group:
        endpoint = Endpoint("big", "big", messages.StatusRequest, lambda _: {"data": "x" * (client.max_payload + 1)})
        await serve(client, group, "big", "answers too much", [endpoint], {})
        with pytest.raises(Refused) as caught:
            await ask(client, "big", messages.StatusRequest(), seconds=3)
        assert (caught.value.status, caught.value.code) == (413, "answer_too_large")
        group.cancel_scope.cancel()
