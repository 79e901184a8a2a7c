"""Trace context from a request to the log, the history and `explain`, and back in the answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import duckdb
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.events.codec import Message, decode_body
from kvplane.events.errors import BadCommit
from kvplane.events.hashing import pack_hashes
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive, replay
from kvplane.projections.history.store import LIVE, Store
from kvplane.projections.history.tables import LACKING, SINCE_1, VERSION
from kvplane.services.protocol import messages
from kvplane.services.protocol.traceparent import parse
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.commands import run
from tests.support.fold_given import Given, registered
from tests.support.historians import historian, messages_of, question
from tests.support.history_stores import write_history
from tests.support.http_of_services import observed

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
BAD = (
    "", "x", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
    f"{PARENT}-more", f"{PARENT}x", PARENT.upper(), f" {PARENT}", f"01-{TRACE}-{SPAN}-01.more", f"{PARENT}\n",
)  # fmt: skip


def test_what_is_a_traceparent() -> None:
    assert parse(PARENT) == PARENT
    assert [parse(bad) for bad in BAD] == [""] * len(BAD)
    # Of a later version, the part that is known.
    assert parse(f"cc-{TRACE}-{SPAN}-09-what-comes-then") == f"00-{TRACE}-{SPAN}-09"


@given(st.text(max_size=70) | st.text("0123456789abcdef-", min_size=50, max_size=60))
def test_nothing_else_passes(text: str) -> None:
    found = parse(text)
    assert found == "" or (len(found) == 55 and text[2:55] == found[2:])


async def ask_with(
    fleet: Fleet, where: str, body: dict[str, Any], headers: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    answer = await fleet.client.request(f"kv.default.{where}", json.dumps(body).encode(), headers=headers)
    return msgspec.json.decode(answer.data), answer.headers or {}


@pytest.mark.anyio
async def test_from_the_request_to_sql_and_explain(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="node-1", prefill_speed=1e6, decode_speed=1e5))
    router = await fleet.router()
    route = {"model": "sim", "tokens": list(range(40))}
    async with historian(server.url, tmp_path / "history") as keeper, observed(router) as http:
        routed, headers = await ask_with(fleet, "route", {**route, "request": "r1"}, {"traceparent": PARENT})
        assert headers["traceparent"] == PARENT
        await fleet.ask(f"router.{router.writer}.flush", messages.StatusRequest())
        # The node ends it; another span of the same trace asks it.
        child = f"00-{TRACE}-{'1' * 16}-01"
        serve = {"request": "r1", "hashes": [], "tokens": 40, "output_tokens": 1}
        _, headers = await ask_with(fleet, routed["address"].removeprefix("kv.default."), serve, {"Traceparent": child})
        assert headers["traceparent"] == child
        # By the field, by `complete`, with both (the header counts), with none, and with what is none.
        await ask_with(fleet, "route", {**route, "request": "r2", "traceparent": PARENT}, {})
        await ask_with(fleet, "complete", {"request": "r2", "node": "node-1"}, {"traceparent": child})
        await ask_with(fleet, "route", {**route, "request": "r3", "traceparent": PARENT}, {"traceparent": child})
        _, headers = await ask_with(fleet, "route", {**route, "request": "r4"}, {})
        assert "traceparent" not in headers
        # NATS clients take blanks away around values.
        bad_ones = [bad for bad in BAD if bad and parse(bad.strip()) == ""]
        for bad in bad_ones:
            answer, headers = await ask_with(fleet, "route", {**route, "request": "r5"}, {"traceparent": bad})
            assert answer["node"] == "node-1"
            assert "traceparent" not in headers
        refused, headers = await ask_with(fleet, "route", {"model": "who", "tokens": [1]}, {"traceparent": PARENT})
        assert (refused["code"], headers["traceparent"]) == ("unknown_model", PARENT)
        metrics = await http.metrics()
        assert metrics("kvplane_bad_traceparents_total") == len(bad_ones)
        await fleet.ask(f"router.{router.writer}.flush", messages.StatusRequest())
        # Two requests complete; the node writes by itself.
        counted = messages.SqlRequest(sql="SELECT count(*) FROM completions")
        with anyio.fail_after(20):
            while (await question(fleet.client, "sql", counted))["rows"] != [[2]]:
                await anyio.sleep(0.05)
        log = await messages_of(fleet.client)
        assert await keeper.ingest.reached(len(log), seconds=20)
        query = "SELECT request, trace FROM {} ORDER BY sequence, event"
        found = await question(fleet.client, "sql", messages.SqlRequest(sql=query.format("decisions")))
        assert dict(found["rows"]) == {"r1": PARENT, "r2": PARENT, "r3": child, "r4": None, "r5": None}
        found = await question(fleet.client, "sql", messages.SqlRequest(sql=query.format("completions")))
        assert dict(found["rows"]) == {"r1": child, "r2": child}
        by_id = f"SELECT request FROM decisions WHERE trace[4:35] = '{TRACE}' ORDER BY request"
        found = await question(fleet.client, "sql", messages.SqlRequest(sql=by_id))
        assert found["rows"] == [["r1"], ["r2"], ["r3"]]
        explained = await question(fleet.client, "explain", messages.ExplainRequest(request="r1"))
        assert explained["verdict"] == "agrees"
        assert (explained["recorded"]["trace"], explained["outcome"]["trace"]) == (PARENT, child)
        output = await commanded("explain", "r1", "--server", server.url)
        assert PARENT in output
    # The fold does not read it.
    assert fold(log) == fold([without_trace(message) for message in log])


async def commanded(*arguments: str) -> str:
    return (await anyio.to_thread.run_sync(lambda: run(*arguments))).stdout


def fold(log: list[Message]) -> str:
    state = FleetState("default")
    for message in log:
        assert state.apply(message).skipped is None
    return digest(state)


def without_trace(message: Message) -> Message:
    events = msgspec.msgpack.decode(message.body)
    for event in events:
        event.pop("trace", None)
    body = msgspec.msgpack.encode(events)
    headers = {**(message.headers or {}), codec.CRC32: codec.checksum(body)}
    return message._replace(body=body, headers=headers)


@pytest.mark.anyio
async def test_log_lines_of_a_request_name_its_trace(fleet: Fleet) -> None:
    await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="node-1", prefill_speed=1e6))
    router = await fleet.router()
    router.chooser.decide = None  # type: ignore[method-assign,assignment]
    with capture_logs([merge_contextvars]) as logged:
        await ask_with(fleet, "route", {"model": "sim", "tokens": [1]}, {"traceparent": PARENT})
    assert [line.get("trace") for line in logged if line["event"] == "endpoint_failed"] == [PARENT]


@pytest.mark.parametrize("trace", [7, None, "x" * 65, ["deep"], {"a": 1}, b"\xff", 1.5])
def test_a_trace_that_is_none_is_to_newer_readers_what_it_is_to_older_ones(trace: object) -> None:
    event = {"type": "RequestRouted.1", "request": "r", "model": "m", "node": "n", "match": 0, "blocks": 0, "tokens": 1}
    body = msgspec.msgpack.encode([{**event, "trace": trace}])
    (found,) = decode_body("access", body)
    assert found == types.RequestRouted("r", "m", "n", 0, 0, 1)
    if not isinstance(trace, bytes):
        assert list(decode_body("access", json.dumps([{**event, "trace": trace}]).encode())) == [found]
    # As older readers do: other fields are still looked at.
    with pytest.raises(BadCommit):
        decode_body("access", msgspec.msgpack.encode([{**event, "trace": trace, "tokens": "many"}]))


def test_a_trace_nested_too_deep_is_as_any_unknown_field() -> None:
    deep: list[Any] = []
    for _ in range(40):
        deep = [deep]
    event = {"type": "RequestRouted.1", "request": "r", "model": "m", "node": "n", "match": 0, "blocks": 0, "tokens": 1}
    reasons = []
    for field in ("trace", "unheard"):
        with pytest.raises(BadCommit) as caught:
            decode_body("access", msgspec.msgpack.encode([{**event, field: deep}]))
        reasons.append(caught.value.code)
    assert reasons == ["undecodable", "undecodable"]


@pytest.mark.parametrize("field", ["origin", "leg"])
@pytest.mark.parametrize("value", [None, 5.5, True, -1, "x" * 129, 1 << 40, [], {"a": 1}])
def test_what_says_nothing_of_attempts_is_taken_as_absent(field: str, value: object) -> None:
    """To readers that are older than these fields they are unknown, whatever is in them."""
    event = {
        "type": "RequestRouted.1",
        "request": "r.1",
        "model": "m",
        "node": "n",
        "match": 0,
        "blocks": 0,
        "tokens": 1,
    }
    plain = decode_body("access", msgspec.msgpack.encode([event]))
    assert decode_body("access", msgspec.msgpack.encode([{**event, field: value}])) == plain
    good = {"origin": "r", "leg": 2}[field]
    (told,) = decode_body("access", msgspec.msgpack.encode([{**event, field: good}]))
    assert getattr(told, field) == good


def make_version_1(folder: Path) -> None:
    """Turn a history into what version 1 wrote: no trace in tables or files, no version of files."""
    connection = duckdb.connect(str(folder / "history.duckdb"))
    for table, _ in SINCE_1:
        connection.execute(f"DROP VIEW main.{table.name}")
    for table, column in LACKING[1]:
        connection.execute(f"ALTER TABLE {LIVE}.{table.name} DROP COLUMN {column.name}")
    connection.execute("ALTER TABLE archive_files DROP COLUMN version")
    for path in (folder / "archive").rglob("*.parquet"):
        meta = connection.execute(
            "SELECT key::VARCHAR, value::VARCHAR FROM parquet_kv_metadata(?)", [str(path)]
        ).fetchall()
        metadata = {**dict(meta), "kvplane_version": "1"}
        pairs = ", ".join(f"{key}: '{value}'" for key, value in metadata.items() if key.startswith("kvplane"))
        lacking = [column.name for table, column in LACKING[1] if path.is_relative_to(folder / "archive" / table.name)]
        rows = f"SELECT * EXCLUDE ({', '.join(lacking)}) FROM read_parquet('{path}', hive_partitioning = false)"
        if not lacking:
            rows = f"SELECT * FROM read_parquet('{path}', hive_partitioning = false)"
        connection.execute(f"COPY ({rows}) TO '{path}.new' (FORMAT parquet, KV_METADATA {{{pairs}}})")
        path.with_name(path.name + ".new").rename(path)
        name = str(path.relative_to(folder / "archive"))
        connection.execute("UPDATE archive_files SET bytes = ? WHERE name = ?", [path.stat().st_size, name])
    connection.execute("UPDATE checkpoint SET version = 1")
    connection.close()


def traced_log(given_: Given, *, trace: str) -> None:
    node = given_.state.nodes.get("a") or given_.node(registered("a"))
    assert node
    for number in range(3):
        request = f"r{len(given_.messages)}"
        event = types.RequestRouted(request, "m", "a", 0, 2, 33, pack_hashes([number, 7]), decided=5, trace=trace)
        assert given_.put("access", "w", event) is None
        assert given_.put("access", "w", types.RequestCompleted(request, "a", trace=trace)) is None


def test_a_history_of_version_1_goes_on_with_its_archive(tmp_path: Path) -> None:
    log = Given()
    traced_log(log, trace="")
    store = Store(tmp_path, "f")
    write_history(store, log.messages, 4)
    archived = archive.Part("1970-01-01", 0, 4)
    archive.adopt(store, archived, archive.export(store, archived, store.cursor()))
    write_history(store, log.messages, len(log.messages))
    store.close()
    make_version_1(tmp_path)

    raised = Store(tmp_path, "f")
    assert raised.raised
    traced_log(log, trace=PARENT)
    write_history(raised, log.messages, len(log.messages))
    again = archive.Part("1970-01-02", 4, 9)
    archive.adopt(raised, again, archive.export(raised, again, raised.cursor()))
    raised.close()

    store = Store(tmp_path, "f")
    assert not store.raised
    assert store.connection.execute("SELECT version FROM checkpoint").fetchall() == [(VERSION,)]
    assert {file.version for file in archive.listed(store)} == {1, VERSION}
    for table in ("decisions", "completions"):
        found = store.connection.execute(f"SELECT trace, count(*) FROM {table} GROUP BY ALL ORDER BY 1").fetchall()
        assert found == [(PARENT, 3), (None, 3)]
    # The same as a history that was never of version 1, and the log comes out of it.
    once = Store(tmp_path / "once", "f")
    write_history(once, log.messages, len(log.messages))
    assert once.content() == store.content()
    fold_again = FleetState("f")
    made = list(replay.messages(store.fetch, "f", 0, len(log.messages)))
    for message in made:
        fold_again.apply(message)
    assert digest(fold_again) == digest(log.state)
    traces = [decode_body("access", message.body)[0].trace for message in made[1:]]  # type: ignore[attr-defined]
    assert traces == [""] * 6 + [PARENT] * 6
    once.close()
    store.close()

    # Made again from the archive, whose files are of two versions.
    (tmp_path / "history.duckdb").unlink()
    recovered = Store(tmp_path, "f")
    assert archive.recover(recovered) == 9
    assert {file.version for file in archive.listed(recovered)} == {1, VERSION}
    assert recovered.connection.execute("SELECT count(*), count(trace) FROM decisions").fetchall() == [(4, 1)]
    recovered.close()
