"""Where on a real log a time is."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from kvplane.events.log.stream import open_stream
from kvplane.events.log.times import first_since
from kvplane.events.subjects import stream_name
from tests.support.historians import NAME, Scribe, purge

if TYPE_CHECKING:
    from nats.aio.client import Client


async def test_a_time_is_found_wherever_it_is(client: Client) -> None:
    last = await Scribe(client).write(40)
    js = client.jetstream()
    times = [(await js.get_msg(stream_name(NAME), sequence)).time for sequence in range(1, last + 1)]
    naive = [time.replace(tzinfo=None) for time in times if time is not None]
    assert len(naive) == last
    for begin in (1, 17):
        if begin > 1:
            await purge(client, begin)
        state = await open_stream(js, NAME)
        for time in naive:
            first = next(sequence for sequence in range(begin, last + 1) if naive[sequence - 1] >= time)
            assert await first_since(js, NAME, state, time) == first
        assert await first_since(js, NAME, state, naive[0] - timedelta(days=1)) == begin
        assert await first_since(js, NAME, state, naive[-1] + timedelta(microseconds=1)) == last + 1


async def test_what_is_purged_meanwhile_is_passed_over(client: Client) -> None:
    last = await Scribe(client).write(20)
    js = client.jetstream()
    before = await open_stream(js, NAME)
    first = (await js.get_msg(stream_name(NAME), 1)).time
    assert first is not None
    await purge(client, 15)
    assert await first_since(js, NAME, before, first.replace(tzinfo=None)) in range(1, 16)
    assert last == 20
