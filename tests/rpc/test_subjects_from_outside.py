"""No subject that came from outside is published to: every place that publishes is known, and what answers name is checked."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pytest

from kvplane.services.history.client import pages
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoAnswer
from kvplane.services.rpc.pieces import snapshot_at

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
SENDS = {
    "publish", "publish_async", "respond", "respond_error", "request", "ask_once", "subscribe", "pull_subscribe",
    "ask", "_send_publish", "_send_command",
}  # fmt: skip
LAW = "the subject is written here, or made of the fleet's name and a checked one"
CHECKED: dict[str, str] = {
    "events/log/append.py:_publish": "the caller's, all of `events.subjects`",
    "events/log/client.py:publish": "passes on",
    "events/log/client.py:_request_new_style": "passes on, with a reply subject of its own",
    "events/log/copies.py:_ask": LAW,
    "events/log/deliveries.py:open": "its own inbox",
    "events/log/deliveries.py:_created": LAW,
    "events/log/deliveries.py:close": LAW,
    "events/log/deliveries.py:_answer": "comes from outside: only flow control of its own consumer is let through",
    "events/log/servers.py:request": "passes on",
    "events/log/snapshots.py:put": f"{LAW}; objects have names of this process's own",
    "services/diagnosis/examine.py:_captured": LAW,
    "services/diagnosis/examine.py:_json": LAW,
    "services/diagnosis/examine.py:_status": f"{LAW}; what a service says of its name stands between words of ours",
    "services/replication/compaction.py:_stored": "the same",
    "services/engines/remembered.py:remembered": LAW,
    "services/membership/member.py:register": LAW,
    "services/membership/member.py:check": LAW,
    "services/membership/member.py:log_takes": LAW,
    "services/simulation/simnode.py:_admit": LAW,
    "services/membership/member.py:listen": LAW,
    "services/membership/member.py:heartbeat": LAW,
    "services/replication/checkpoints.py:run": LAW,
    "services/replication/checkpoints.py:_note": LAW,
    "services/rpc/client.py:ask": "the caller's",
    "services/rpc/client.py:_ask_until_answered": "the caller's",
    "services/rpc/client.py:_ask_watching": "the caller's, and its own inbox",
    "services/rpc/client.py:instances": LAW,
    "services/rpc/server.py:_respond": "comes from outside: `_genuine` let only what can be an inbox through",
    "services/rpc/server.py:_refuse": "the same",
    "services/rpc/server.py:sign": "the same",
    "services/rpc/pieces.py:whole": "comes from outside: `following` lets only that endpoint's through",
    "services/history/client.py:pages": "the same",
}
"""Where something is published, or asked on a subject that is not written there; and why it can't be any subject."""


def _written(subject: ast.expr) -> bool:
    """Whether a subject begins as one of a fleet or of listing, in the source."""
    if isinstance(subject, ast.JoinedStr) and isinstance(subject.values[0], ast.Constant):
        return str(subject.values[0].value).startswith(("kv.", "$SRV."))
    return False


def _places(path: Path) -> set[str]:
    found: set[str] = set()
    text = path.read_text()
    # Others are also called so: a query of the history, a question to an engine.
    asks = SENDS if "services.rpc.client import" in text else SENDS - {"ask"}

    def walk(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call):
                called = child.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                # `ask` with a subject that is written there can go nowhere else.
                subjects = child.args[1:2] if name in {"ask", "ask_once"} else child.args[:1]
                if name in asks and not any(map(_written, subjects)):
                    found.add(f"{path.relative_to(ROOT)}:{inside}")
            walk(child, inside)

    walk(ast.parse(text), "")
    return found


def test_every_place_that_publishes_is_known_and_says_whose_its_subject_is() -> None:
    folders = ("events/log", "services")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if "demo" not in path.parts]
    found = {place for path in paths for place in _places(path)}
    assert sorted(found - CHECKED.keys()) == [], "say in CHECKED whose subject it is that these publish to"
    assert CHECKED.keys() <= found


async def test_what_an_answer_names_for_its_next_piece_is_asked_only_if_it_is_one(client: Client) -> None:
    """Whoever asks on it does so with his own rights: an admin's would compact the log."""
    received: list[str] = []

    async def command(message: Msg) -> None:
        received.append(message.subject)
        await message.respond(b"")

    named = [""]

    async def piece(message: Msg) -> None:
        found = messages.Piece(result="r", offset=0, size=9, data=b"x", next=named[0])
        await message.respond(msgspec.msgpack.encode(found))

    async def page(message: Msg) -> None:
        table = pa.table({"a": [1]})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        found = messages.SqlAnswer(columns=[], stored=1, result="r", data=sink.getvalue().to_pybytes(), next=named[0])
        await message.respond(msgspec.msgpack.encode(found))

    for subject in ("kv.f.coordinator.>", "kv.g.>", "$JS.API.>", "elsewhere.>"):
        await client.subscribe(subject, cb=command)
    await client.subscribe("kv.f.history.snapshot", cb=piece)
    await client.subscribe("kv.f.sql", cb=page)
    for named[0] in (
        "kv.f.coordinator.compact", "kv.f.coordinator.w.piece", "kv.g.history.h.piece", "kv.g.sql.h",
        "$JS.API.STREAM.PURGE.KV_f", "elsewhere.piece", "kv.f.history.h.status",
    ):  # fmt: skip
        with pytest.raises(NoAnswer, match="for what follows"):
            await snapshot_at(client, "f", 1)
        with pytest.raises(NoAnswer, match="for what follows"):
            _ = [each async for each in pages(client, "f", "SELECT 1", seconds=5)]
    await client.flush()
    assert received == []


async def test_more_pieces_than_were_spoken_of_are_not_collected(client: Client) -> None:
    async def piece(message: Msg) -> None:
        found = messages.Piece(result="r", offset=0, size=3, data=b"xx", next="kv.f.history.h.piece")
        await message.respond(msgspec.msgpack.encode(found))

    for subject in ("kv.f.history.snapshot", "kv.f.history.h.piece"):
        await client.subscribe(subject, cb=piece)
    with pytest.raises(NoAnswer, match="more than the 3 bytes"):
        await snapshot_at(client, "f", 1)
