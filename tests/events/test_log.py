"""The log over a real server: what is acknowledged stays, nothing is there twice, nothing is missed in silence."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from nats.aio.msg import Msg
from nats.errors import FlushTimeoutError
from nats.js.api import StorageType, StreamConfig

from kvplane.events import codec, types
from kvplane.events.allowance import Pace
from kvplane.events.errors import CommitTooLarge, LogCorrupt, LogError, LogMissing, LogUnavailable, LostRace
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.connection import connected
from kvplane.events.log.follow import Follower, replay
from kvplane.events.log.group import GroupWriter
from kvplane.events.log.stream import open_stream, stream_config
from kvplane.services.embedded.server import start_server
from tests.support.ports import free_port
from tests.support.processes import stopped
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from kvplane.events.codec import Message
    from kvplane.services.embedded.server import Server

pytestmark = pytest.mark.anyio

NODE = "kv.default.node.a"
CACHE = "kv.default.cache.a"


def cordoned(number: int = 0) -> types.NodeCordoned:
    return types.NodeCordoned("a", f"number {number}")


def removed(batch: int, size: int = 8) -> types.BlocksRemoved:
    return types.BlocksRemoved("a", 1, batch, bytes(size))


async def read(client: Client) -> list[Message]:
    messages: list[Message] = []
    await replay(client, "default", messages.append)
    return messages


async def opened(client: Client) -> Appender:
    await open_stream(client.jetstream(), "default", create=True)
    return Appender(client, "default", new_writer("test"))


async def test_the_stream_is_made_as_a_log_must_be(client: Client) -> None:
    await open_stream(client.jetstream(), "default", create=True)
    config = (await client.jetstream().stream_info("KV_default")).config
    assert (config.deny_delete, config.storage, config.discard) == (True, "file", "new")
    with pytest.raises(Exception, match="not permitted|denied|10057|delete"):
        await (await opened(client)).append(NODE, [cordoned()])
        await client.jetstream().delete_msg("KV_default", 1)


async def test_a_log_that_is_not_there_is_named(client: Client) -> None:
    with pytest.raises(LogMissing, match="no log yet"):
        await open_stream(client.jetstream(), "default")


async def test_a_stream_that_can_forget_is_no_log(client: Client) -> None:
    config = stream_config("default")
    config.deny_delete = False
    config.max_age = 3600
    await client.jetstream().add_stream(config)
    with pytest.raises(LogCorrupt, match="deny_delete is off.*may expire"):
        await open_stream(client.jetstream(), "default")


async def test_a_stream_in_memory_is_no_log(client: Client) -> None:
    config = stream_config("default")
    config.storage = StorageType.MEMORY
    await client.jetstream().add_stream(config)
    with pytest.raises(LogCorrupt, match="storage is not file"):
        await open_stream(client.jetstream(), "default")


async def test_deleted_messages_are_an_alarm(client: Client) -> None:
    config = stream_config("default")
    config.deny_delete = False
    js = client.jetstream()
    await js.add_stream(config)
    for number in range(5):
        await js.publish(NODE, codec.encode([cordoned(number)]))
    await js.delete_msg("KV_default", 3)
    config.deny_delete = True
    await js.update_stream(config)
    with pytest.raises(LogCorrupt, match="messages 3 to 3 are missing"):
        await replay(client, "default", lambda _: None)


async def test_a_log_that_begins_later_than_needed_is_an_alarm(client: Client) -> None:
    appender = await opened(client)
    for number in range(5):
        await appender.append(NODE, [cordoned(number)])
    await client.jetstream().purge_stream("KV_default", seq=3)
    with pytest.raises(LogCorrupt, match="begins at 3, but 1 is needed"):
        await replay(client, "default", lambda _: None)
    assert await replay(client, "default", lambda _: None, applied=2) == 5


async def test_a_log_that_lost_its_end_is_an_alarm(client: Client) -> None:
    await (await opened(client)).append(NODE, [cordoned()])
    with pytest.raises(LogCorrupt, match="ends at 1, but 7"):
        await replay(client, "default", lambda _: None, applied=7)


async def test_a_gap_in_what_is_delivered_is_an_alarm(client: Client) -> None:
    handled: list[int] = []
    follower = Follower(client, "default", lambda message: handled.append(message.sequence))
    for sequence in (1, 3):
        follower._take(sequence, 1_700_000_000_000_000_000, Msg(_client=client, subject=NODE, data=b"x"))
    assert handled == [1]
    with pytest.raises(LogCorrupt, match="messages 2 to 2 are missing"):
        await follower._watch()


async def test_a_commit_carries_what_readers_check(client: Client) -> None:
    appender = await opened(client)
    await appender.append(NODE, [cordoned()], based_on=0)
    await appender.append(CACHE, [removed(1), removed(2)])
    first, second = await read(client)
    decoded = codec.decode("default", first)
    assert (decoded.writer, decoded.writer_seq, decoded.based_on) == (appender.writer, 1, 0)
    assert codec.decode("default", second).events == [removed(1), removed(2)]
    assert second.headers is not None
    assert second.headers["Kv-Crc32"] == codec.checksum(second.body)


async def test_of_two_writers_with_one_expectation_one_wins(client: Client) -> None:
    await opened(client)
    outcomes: list[str] = []

    async def write(number: int) -> None:
        try:
            await Appender(client, "default", new_writer("test")).append(NODE, [cordoned(number)], expected=0)
        except LostRace:
            outcomes.append("lost")
        else:
            outcomes.append("won")

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(write, number)
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]
    assert len(await read(client)) == 1


async def test_a_retry_with_a_stale_expectation_finds_its_own_first_try(client: Client) -> None:
    appender = await opened(client)
    body = codec.encode([cordoned()])
    headers = appender._headers(NODE, body) | {"Nats-Expected-Last-Subject-Sequence": "0"}
    assert await appender._publish(NODE, body, headers, retried=False) == 1
    # As after an acknowledgement that was lost: the same id, and an expectation that is no longer true.
    assert await appender._publish(NODE, body, headers, retried=True) == 1
    other = headers | {"Nats-Msg-Id": "another"}
    with pytest.raises(LostRace):
        await appender._publish(NODE, body, other, retried=True)


async def test_a_commit_over_the_limit_is_refused_before_it_is_sent(client: Client) -> None:
    appender = await opened(client)
    with pytest.raises(CommitTooLarge, match="over the server's limit"):
        await appender.append(CACHE, [removed(1, client.max_payload)])
    assert await appender.append(CACHE, [removed(2)]) == 1


async def test_a_subject_that_is_not_the_log_is_refused(client: Client) -> None:
    appender = await opened(client)
    with pytest.raises(LogError):
        await appender.append("kv.other.node.a", [cordoned()], give_up=0.5)


async def test_an_append_that_nobody_acknowledges_gives_up(server: Server, client: Client) -> None:
    appender = await opened(client)
    await server.stop()
    with anyio.fail_after(10), pytest.raises(LogUnavailable, match="did not acknowledge"):
        await appender.append(NODE, [cordoned()], give_up=0.5)


async def test_groups_keep_the_order_and_hold_everything(client: Client) -> None:
    appender = await opened(client)
    writer = GroupWriter(appender, CACHE, linger=0)
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        for batch in range(5000):
            await writer.send(removed(batch))
            if batch % 97 == 0:
                await anyio.lowlevel.checkpoint()
        await writer.flush()
        group.cancel_scope.cancel()
    messages = await read(client)
    batches = [event.batch for m in messages for event in codec.decode("default", m).events]  # type: ignore[attr-defined]
    assert batches == list(range(5000))
    assert len(messages) < 1000
    assert (writer.acknowledged, writer.dropped, writer.waiting) == (5000, 0, 0)


async def test_a_full_buffer_drops_the_oldest_and_counts(client: Client) -> None:
    appender = await opened(client)
    writer = GroupWriter(appender, CACHE, limit=10)
    for batch in range(25):
        writer.put(removed(batch))
    assert (writer.waiting, writer.dropped) == (10, 15)
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        await writer.flush()
        group.cancel_scope.cancel()
    (message,) = await read(client)
    assert [e.batch for e in codec.decode("default", message).events] == list(range(15, 25))  # type: ignore[attr-defined]


async def test_an_event_too_large_for_any_commit_is_dropped_alone(client: Client) -> None:
    appender = await opened(client)
    writer = GroupWriter(appender, CACHE)
    half = client.max_payload // 2 + 100
    for batch, size in enumerate((8, 8, half - half % 8, half - half % 8, 8)):
        writer.put(removed(batch, size))
    # A name of a block is in one piece.
    writer.put(types.BlocksStored("node", 1, 9, bytes(8), engine_hashes=[bytes(client.max_payload)]))
    writer.put(removed(10, 8))
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        await writer.flush()
        group.cancel_scope.cancel()
    assert (writer.acknowledged, writer.dropped) == (6, 1)


async def test_a_writer_with_a_pace_writes_no_faster_and_drops_nothing(client: Client) -> None:
    class Quick(Pace):
        RATE = 20 * Pace.RATE

    appender = await opened(client)
    writer = GroupWriter(appender, CACHE, linger=0, pace=Quick(anyio.current_time()))
    for batch in range(20):
        writer.put(removed(batch, 8 * 10_000))
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        await writer.flush()
        group.cancel_scope.cancel()
    messages = await read(client)
    commits = [codec.decode("default", message) for message in messages]
    batches = [event.batch for commit in commits for event in commit.events]  # type: ignore[attr-defined]
    assert batches == list(range(20))
    # Two of them reach the blocks that a commit ends with.
    assert [len(commit.events) for commit in commits] == [2] * 10
    assert (messages[-1].time - messages[0].time) / 1e9 > 0.3 * 9 * 20_000 / Quick.RATE


async def test_a_follower_goes_on_after_the_server_was_killed(tmp_path: Path) -> None:
    port = free_port()
    server = await start_server(tmp_path, port=port)
    async with connected([server.url], "test") as client:
        appender = await opened(client)
        writer = GroupWriter(appender, CACHE)
        seen: list[int] = []
        follower = Follower(client, "default", lambda message: seen.append(message.sequence))
        async with anyio.create_task_group() as group:
            group.start_soon(follower.run)
            group.start_soon(writer.run)
            for batch in range(60):
                writer.put(removed(batch))
                await anyio.sleep(0.01)
                if batch in (20, 40):
                    server.kill()
                    await server.process.wait()
                    await until(lambda: not client.is_connected)
                    server = await start_server(tmp_path, port=port)
            await writer.flush()
            await until(lambda: follower.applied >= writer.last_sequence)
            group.cancel_scope.cancel()
        assert seen == list(range(1, follower.applied + 1))
        messages = await read(client)
    await server.stop()
    # Each event once, in order: retries over two crashes neither lost nor doubled one.
    batches = [event.batch for m in messages for event in codec.decode("default", m).events]  # type: ignore[attr-defined]
    assert batches == list(range(60))


async def test_what_handle_raises_ends_the_follower(client: Client) -> None:
    await (await opened(client)).append(NODE, [cordoned()])

    def handle(_: Message) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await replay(client, "default", handle)


async def test_no_server_is_one_clear_sentence() -> None:
    with pytest.raises(LogUnavailable, match="no NATS server answers at .*kvplane up"):
        async with connected([f"nats://127.0.0.1:{free_port()}"], "test", connect_seconds=0.3):
            pass


async def test_a_client_outlives_a_flush_that_is_answered_too_late(client: Client, server: Server) -> None:
    appender = await opened(client)
    server.process.send_signal(signal.SIGSTOP)
    await until(lambda: stopped(server.pid))
    with pytest.raises(FlushTimeoutError):
        await client.flush(timeout=1)
    with anyio.move_on_after(0.5):
        await client.flush()
    server.process.send_signal(signal.SIGCONT)
    await client.flush()
    assert await appender.append(NODE, [cordoned()]) == 1
    # The same connection, and somebody still reads it.
    assert client.stats["reconnects"] == 0
    assert client._reading_task is not None
    assert not client._reading_task.done()


async def test_other_streams_of_the_server_do_not_matter(client: Client) -> None:
    await client.jetstream().add_stream(StreamConfig(name="other", subjects=["other.>"]))
    appender = await opened(client)
    await client.jetstream().publish("other.x", b"not ours")
    assert await appender.append(NODE, [cordoned()]) == 1
    assert len(await read(client)) == 1


async def test_a_log_that_was_replaced_while_followed_is_an_alarm(client: Client) -> None:
    appender = await opened(client)
    await appender.append(NODE, [cordoned()])
    follower = Follower(client, "default", lambda _: None)
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            group.start_soon(follower.run)
            await until(lambda: follower.applied == 1)
            await client.jetstream().delete_stream("KV_default")
            await open_stream(client.jetstream(), "default", create=True)
    assert caught.group_contains(LogCorrupt, match="ends at 0, but 1 was applied")


async def test_a_buffer_is_bounded_in_bytes_as_well(client: Client) -> None:
    writer = GroupWriter(await opened(client), CACHE, limit_bytes=100_000)
    for batch in range(10):
        writer.put(removed(batch, 30_000))
    assert (writer.waiting, writer.dropped) == (3, 7)
    async with anyio.create_task_group() as group:
        group.start_soon(writer.run)
        await writer.flush()
        writer.put(removed(10, 90_000))
        await writer.flush()
        group.cancel_scope.cancel()
    assert (writer.acknowledged, writer.dropped) == (4, 7)


async def test_an_answer_that_is_not_the_logs_is_no_acknowledgement(client: Client) -> None:
    """Whoever listens on a subject of the log can answer its commits before the log does."""
    appender = await opened(client)
    answers = [
        b"hello",
        b"{}",
        b"[]",
        b'{"seq":1}',
        b'{"stream":"KV_other","seq":1}',
        b'{"stream":"KV_default","seq":"1"}',
    ]

    async def meddle(message: Msg) -> None:
        if answers:
            await client.publish(message.reply, answers.pop())

    await client.subscribe(NODE, cb=meddle)
    for number in range(len(answers)):
        await appender.append(NODE, [cordoned(number)])
    messages = await read(client)
    reasons = [event.reason for m in messages for event in codec.decode("default", m).events]  # type: ignore[attr-defined]
    assert reasons == [f"number {number}" for number in range(6)]


async def test_a_retried_commit_is_found_behind_those_of_others(client: Client) -> None:
    appender = await opened(client)
    body = codec.encode([cordoned()])
    headers = appender._headers(NODE, body) | {"Nats-Expected-Last-Subject-Sequence": "0"}
    await appender._publish(NODE, body, headers, retried=False)
    await Appender(client, "default", new_writer("other")).append(NODE, [cordoned(1)])
    assert await appender._publish(NODE, body, headers, retried=True) == 1


async def test_who_has_caught_up_is_healthy(client: Client) -> None:
    """Otherwise the first answers of a router would call it degraded."""
    for number in range(3):
        await (await opened(client)).append(NODE, [cordoned(number)])
    follower = Follower(client, "default", lambda _: None)
    async with anyio.create_task_group() as group:
        group.start_soon(follower.run)
        await follower.caught_up.wait()
        assert follower.healthy
        group.cancel_scope.cancel()


async def test_a_flush_covers_what_was_said_before_it(server: Server) -> None:
    """Otherwise a service could be ready before the server knows what it answers."""
    sent = bytearray()

    async def relay(near: anyio.abc.SocketStream) -> None:
        async with (
            near,
            await anyio.connect_tcp("127.0.0.1", int(server.url.rpartition(":")[2])) as far,
            anyio.create_task_group() as both,
        ):

            async def back() -> None:
                async for data in far:
                    await near.send(data)

            both.start_soon(back)
            async for data in near:
                sent.extend(data)
                await far.send(data)
            both.cancel_scope.cancel()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, relay)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with connected([f"nats://127.0.0.1:{port}"], "test") as client:
            for number in range(20):
                before = sent.count(b"PING")
                await client.subscribe(f"subject.{number}")
                await client.flush()
                assert sent.count(b"PING") == before + 1
                assert sent.rindex(b"PING") > sent.find(b"SUB subject.%d " % number) >= 0
        group.cancel_scope.cancel()
