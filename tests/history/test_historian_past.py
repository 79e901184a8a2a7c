"""Past states against folds of the log: at every sequence, purged or not, and what is said where nothing is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import msgspec
import pytest

from kvplane.projections import snapshot_body
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive
from kvplane.services.history import ingest as ingestion
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Refused
from tests.support.historians import FAR, Scribe, historian, messages_of, purge, question

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.services.embedded.server import Server
    from kvplane.services.history.historian import Historian

pytestmark = pytest.mark.anyio

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def digests(log: list[Message]) -> list[str]:
    """Digest of the state after each commit; the first one is that of nothing."""
    state = FleetState("default")
    found = [digest(state)]
    for message in log:
        state.apply(message)
        found.append(digest(state))
    return found


async def check(running: Historian, wanted: list[str], *sequences: int) -> None:
    for sequence in sequences:
        found = await running.past.state(str(sequence), "")
        assert (found["sequence"], found["digest"]) == (sequence, wanted[sequence]), sequence


async def refused(client: Client, at: str) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        await question(client, "history.state", messages.MomentRequest(at=at))
    return caught.value.code, str(caught.value)


async def test_every_past_state_is_the_one_that_was(server: Server, client: Client, tmp_path: Path) -> None:
    scribe = Scribe(client)
    await scribe.write(30)
    async with historian(server.url, tmp_path / "h") as running:
        assert await running.ingest.save_snapshot() == 30
        last = await scribe.write(40)
        assert await running.ingest.reached(last, seconds=10)
        await running.ingest.maintain(FAR)
        last = await scribe.write(10)
        assert await running.ingest.reached(last, seconds=10)
        wanted = digests(await messages_of(client))
        assert len(wanted) == last + 1
        await check(running, wanted, *range(last + 1))
        # The log begins between the snapshot and its end; then the snapshot is worth nothing.
        assert await purge(client, 51) == 51
        await check(running, wanted, *range(0, last, 11), 29, 30, 31, 50, 51, last)
        snapshot = next((tmp_path / "h" / "snapshots").iterdir())
        for data in (snapshot.read_bytes()[:-9], b"x" * 5000):
            snapshot.write_bytes(data)
            await check(running, wanted, 29, 30, 31, 50, last)
        answer = await question(client, "history.changes", messages.ChangesRequest(first="20", second=str(last)))
        assert answer["numbers"]["sequence"] == [20, last]
    # What was folded before is folded again when the historian begins anew.
    async with historian(server.url, tmp_path / "h") as running:
        assert digest(running.ingest.state) == wanted[last]
        snapshot.unlink()
        archive.expire(running.ingest.store, FAR, days=None, size=0)
        assert await refused(client, "30") == (
            "before_history",
            "the history begins at sequence 71, and no snapshot before it is left; ask for a later moment",
        )


async def test_a_time_means_the_last_commit_before_it(server: Server, client: Client, tmp_path: Path) -> None:
    last = await Scribe(client).write(150)
    log = await messages_of(client)
    micros = [message.time // 1000 for message in log]
    async with historian(server.url, tmp_path / "h") as running:
        for border in micros:
            for instant in (border - 1, border, border + 1):
                before = [message.sequence for message, time in zip(log, micros, strict=True) if time <= instant]
                if before:
                    moment = EPOCH + timedelta(microseconds=instant)
                    assert await running.past.sequence(moment.isoformat()) == before[-1]
        moment = EPOCH + timedelta(microseconds=micros[100])
        wanted = max(message.sequence for message in log if message.time // 1000 <= micros[100])
        for form in (moment.replace(tzinfo=None), moment.astimezone(timezone(timedelta(hours=-7)))):
            assert await running.past.sequence(form.isoformat()) == wanted
        assert await running.past.sequence("9999-12-31T23:59:59") == last
        for at in (
            "0001-01-01",
            "2000-01-01T00:00:00+14:00",
            (EPOCH + timedelta(microseconds=micros[0] - 1)).isoformat(),
        ):
            code, message = await refused(client, at)
            assert (code, "is before the history begins: its first commit is of" in message) == ("before_history", True)
        for at in (str(last + 1), "9" * 5000, "18446744073709551616"):
            code, message = await refused(client, at)
            assert (code, f"the log ends at sequence {last}" in message) == ("not_yet", True)
            assert len(message) < 200
        for body in ({"at": 5}, {"at": "5"}):
            for encode, decode in (
                (msgspec.json.encode, msgspec.json.decode),
                (msgspec.msgpack.encode, msgspec.msgpack.decode),
            ):
                answer = await client.request("kv.default.history.sequence", encode(body))
                assert decode(answer.data) == {"sequence": 5}
        for at in ("", "-1", "²", "٣", "tomorrow", "2026-13-01", "1.5"):
            code, message = await refused(client, at)
            assert (code, "is no moment" in message) == ("bad_request", True)
        assert (await refused(client, "0x10"))[0] == "bad_request"
        with pytest.raises(Refused, match="is after"):
            await question(client, "history.changes", messages.ChangesRequest(first="20", second="10"))
        with pytest.raises(Refused, match="no node 'nobody' was there at sequence 20"):
            await question(client, "history.state", messages.MomentRequest(at="20", node="nobody"))


async def test_a_historian_that_can_not_make_a_snapshot_goes_on(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_body, "MOST_SLOTS", 0)
    monkeypatch.setattr(ingestion, "SNAPSHOT_COMMITS", 20)
    scribe = Scribe(client)
    await scribe.write(10)
    async with historian(server.url, tmp_path / "h") as running:
        for _ in range(3):
            last = await scribe.write(30)
            assert await running.ingest.reached(last, seconds=10)
        assert await running.ingest.save_snapshot() == 0
        last = await scribe.write(30)
        assert await running.ingest.reached(last, seconds=10)
    # It ended in good order, too.
    async with historian(server.url, tmp_path / "h") as running:
        assert await running.ingest.reached(last, seconds=10)
