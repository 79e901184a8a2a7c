"""Formats of the log: what was written first is still read, and what is newer is never guessed at.

`tests/data/format-1.jsonl` was written by the first version of every event; `tests.support.future_format`
is a kvplane of tomorrow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events import codec, types
from kvplane.events.codec import Message
from kvplane.events.errors import NewerFormat
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.subjects import subject
from kvplane.events.versions import FORMAT, SINCE
from kvplane.projections.digest import digest
from kvplane.projections.errors import BadSnapshot
from kvplane.projections.fleet import FleetState
from kvplane.projections.overview import summary
from kvplane.projections.snapshot import dump, load
from kvplane.services.demo.fleet import Fleet
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused
from kvplane.services.rpc.client import ask
from tests.support.fold_given import SECOND, START, Given, registered, replayed
from tests.support.fork_server import open_program
from tests.support.log_file import messages_of, write
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


FIRST = Path(__file__).resolve().parents[1] / "data" / "format-1.jsonl"
ROOT = Path(__file__).resolve().parents[2]
NEXT = FORMAT + 1
TOMORROWS = b'[{"type":"SessionEnded.2","session":"s","model":"m","cause":"bye"}]'


def _raised(number: int) -> bytes:
    return codec.encode_json([types.FormatRaised(number, "9.9")])


def _by_tomorrow(messages: list[Message], folder: Path) -> dict[str, Any]:
    """What tomorrow's kvplane makes of a log."""
    write(folder / "log.jsonl", messages)
    command = [sys.executable, "-m", "tests.support.future_format", "fold", str(folder / "log.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_the_first_version_wrote_is_read_and_means_the_same() -> None:
    state = FleetState("f")
    kinds = set()
    for message in messages_of(FIRST):
        applied = state.apply(message)
        assert applied.commit is not None, (message.sequence, applied)
        kinds |= {type(event) for event in applied.commit.events}
    assert kinds == set(types.Event.__subclasses__()) - {types.FormatRaised} - SINCE.keys()
    assert state.format == 1
    a, b, c = (state.nodes[name] for name in "abc")
    assert (a.epoch, a.cordoned, a.lost) == (1, False, None)
    assert (b.epoch, b.managed, b.registered.max_active, b.registered.labels) == (2, True, 4, {"zone": "z"})
    assert (c.epoch, c.cordoned, c.lost) == (3, True, None)
    index = state.caches.index("m")
    assert set(index.held(a.slots["gpu"])) == {1, 2, 3, 4, 5}
    assert set(index.held(a.slots["cpu"])) == {1, 2}
    assert set(index.held(b.slots["gpu"])) == {1, 2, 3, 4, 5, 6, 7, 9}
    assert not any(index.count(slot) for slot in c.slots.values())
    assert {key: (session.node, session.was) for key, session in state.sessions.items()} == {
        ("m", "s1"): ("a", ""), ("m", "s3"): ("", "d"),
    }  # fmt: skip
    assert {request: active.node for request, active in state.load.running.items()} == {"q2": "b"}
    assert sorted(state.recency["b"].protected) == [1, 2]
    assert (state.policy, state.parameters) == ("cascade", {"session_seconds": 0.5})
    assert state.ignored == {"unknown_request": 1}


def test_what_the_first_version_wrote_is_brought_up_to_tomorrows_shapes(tmp_path: Path) -> None:
    messages = messages_of(FIRST)
    assert _by_tomorrow(messages, tmp_path) == summary(replayed(messages), digests=True)


def test_a_later_shape_before_its_format_is_skipped_by_those_who_know_it_as_by_those_who_do_not(tmp_path: Path) -> None:
    given = Given()
    given.node(registered("a"))
    given.assigns("s", "a")
    assert given.raw("kv.f.session.m", TOMORROWS).skipped == "unknown_type"
    assert given.state.sessions.get("m", "s") is not None
    known = _by_tomorrow(given.messages, tmp_path)
    assert (known["digest"], known["sessions"]) == (digest(given.state), 1)


def test_in_its_format_a_later_shape_is_applied_and_who_does_not_know_it_stops(tmp_path: Path) -> None:
    given = Given()
    given.node(registered("a"))
    given.assigns("s", "a")
    with pytest.raises(
        NewerFormat, match=rf"from commit 3 on .* format {NEXT}, which kvplane 9\.9 wrote.* up to format {FORMAT}"
    ):
        given.raw("kv.f.control", _raised(NEXT))
    later = Message(4, "kv.f.session.m", START + 9 * SECOND, None, TOMORROWS)
    known = _by_tomorrow([*given.messages, later], tmp_path)
    assert (known["format"], known["sessions"], known["skipped"]) == (NEXT, 0, {})


def test_the_format_never_goes_back(tmp_path: Path) -> None:
    messages = [Message(n, "kv.f.control", START, None, _raised(number)) for n, number in ((1, 2), (2, 2))]
    known = _by_tomorrow(messages, tmp_path)
    assert (known["format"], known["skipped"]) == (2, {"no_change": 1})


@pytest.mark.parametrize("place", ["kv.f.node.a", "kv.f.cache.a", "kv.f.session.m", "kv.f.access.w"])
def test_nobody_but_control_raises_the_format(place: str) -> None:
    given = Given()
    given.node(registered("a"))
    assert given.raw(place, _raised(99)).skipped == "unknown_type"


@pytest.mark.parametrize("number", [b"1", b"0", b"-1", b"1e9", b'"2"', b"1000001"])
def test_a_format_that_can_not_be_is_skipped(number: bytes) -> None:
    assert Given().raw("kv.f.control", b'[{"type":"FormatRaised.1","format":%s}]' % number).skipped == "invalid"


def test_a_snapshot_of_a_log_in_a_later_format_is_refused() -> None:
    state = replayed(messages_of(FIRST))
    state.format = NEXT
    with pytest.raises(BadSnapshot, match=f"format {NEXT}, .* up to format {FORMAT}"):
        load("f", dump(state))


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    running = Fleet(tmp_path, free_port(), "formats", open_process=open_program)
    await running.start_server()
    yield running
    await running.stop()


@pytest.mark.anyio
async def test_a_fleet_is_upgraded_while_it_runs(fleet: Fleet) -> None:
    async with connected([fleet.url], "test") as client:

        async def answer(endpoint: str, **request: object) -> dict[str, Any]:
            form = messages.FormatRequest(**request) if endpoint.endswith("raise") else messages.StatusRequest()  # type: ignore[arg-type]
            found: dict[str, Any] = await ask(client, f"kv.formats.coordinator.{endpoint}", form)
            return found

        await fleet.start("old coordinator", "coordinator")
        (old_coordinator,) = await fleet.coordinators(client, 1)
        await fleet.start("old router", "router")
        (old_router,) = await fleet.routers(client, 1)
        register = messages.RegisterRequest(
            node="a", address="a:1", models=["m"], block_size=16, capacity_blocks={"gpu": 64}, cache_mode="reported"
        )
        await ask(client, "kv.formats.coordinator.node.register", register)
        assert (await answer("format.raise"))["changed"] is False
        with pytest.raises(Refused, match=f"reads formats up to {FORMAT}"):
            await answer("format.raise", format=NEXT)

        await fleet.start("new coordinator", "coordinator", program="tests.support.future_format")
        await fleet.start("new router", "router", program="tests.support.future_format")
        assert len(await fleet.coordinators(client, 2)) == 2
        new_router = next(name for name in await fleet.routers(client, 2) if name != old_router)
        await fleet.kill("old coordinator")
        shown = await answer("format.show")
        formats = {reader["writer"]: reader["format"] for reader in shown["readers"]}
        # A log that nobody older has begun is in the newest format of its time.
        assert shown["format"] == FORMAT
        assert formats.pop(old_router) == FORMAT
        assert old_coordinator not in formats
        assert set(formats.values()) == {NEXT}
        with pytest.raises(Refused, match=f"1 of 3 readers would stop at format {NEXT}: {old_router}"):
            await answer("format.raise")

        raised = await answer("format.raise", force=True)
        assert (raised["format"], raised["changed"]) == (NEXT, True)
        with anyio.fail_after(10):
            assert await fleet.ended("old router") == 1
        assert f"in format {NEXT}" in (fleet.folder / "old router.log").read_text()
        appender = Appender(client, "formats", new_writer("test"))
        await appender.append(subject("formats", "session", "m"), [types.SessionAssigned("s", "m", "a", "new")])
        end = client.jetstream()
        acknowledged = await end.publish(subject("formats", "session", "m"), TOMORROWS)
        with anyio.fail_after(10):
            while True:
                status: dict[str, Any] = await ask(
                    client, f"kv.formats.router.{new_router}.status", messages.StatusRequest()
                )
                if status["sequence"] >= acknowledged.seq:
                    break
                await anyio.sleep(0.05)
        assert (status["format"], status["sessions"], status["skipped"]) == (NEXT, 0, {})
        routed: dict[str, Any] = await ask(
            client, "kv.formats.route", messages.RouteRequest(model="m", tokens=list(range(40)))
        )
        assert routed["node"] == "a"
