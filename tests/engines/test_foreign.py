"""Batches of another engine than the one that was attached: the adapter ends with a sentence that names both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.fake_ranks import ranks
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def publish(engine: FakeEngine, prompt: int) -> None:
    engine.cache.request([prompt] * 3 * engine.cache.size)
    await engine.publish()


async def test_the_endpoint_of_another_rank_is_not_believed(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    async with ranks(2) as engine:
        options: dict[str, Any] = {"rank": 0, "events": engine[1].endpoint}
        async with attaching(fleet, engine[0].url, **options) as live:
            await live.member()
            await until(lambda: live.service.adapters[0].published.connections)
            with anyio.fail_after(30):
                while not live.failure:
                    await publish(engine[1], len(engine[1].cache.buffer))
                    await anyio.sleep(0.05)
            says = await live.ended()
        assert engine[1].endpoint in says
        assert (
            "of data-parallel rank 1, and that of rank 0 was to come; give --rank 1, or the endpoint of rank 0" in says
        )
        # It has left, and nothing of it is routed to.
        await until(lambda: "a" not in coordinator.state.nodes)
        # In what is replayed as well, before it is a node at all.
        options["replay"] = engine[1].replay_endpoint
        async with attaching(fleet, engine[0].url, node="b", **options) as live:
            assert "of data-parallel rank 1" in await live.ended()
        assert "b" not in coordinator.state.nodes


@pytest.mark.parametrize("topics", ["the same", "others"])
async def test_two_engines_that_connect_to_one_adapter_are_two(fleet: Fleet, topics: str) -> None:
    await fleet.coordinator()
    one, two = FakeEngine(replays=False), FakeEngine(replays=False)
    one.connect_to = two.connect_to = f"tcp://127.0.0.1:{free_port()}"
    if topics == "others":
        one.topic, two.topic = b"kv@10.0.0.1@m", b"kv@10.0.0.2@m"
    async with running(one), attaching(fleet, one.url) as live:
        await live.member()
        await until(lambda: live.service.adapters[0].published.connections)
        async with running(two):
            await until(lambda: live.service.adapters[0].published.publishers.live == 2)
            with anyio.fail_after(30):
                while not live.failure:
                    for engine in (one, two):
                        await publish(engine, len(engine.cache.buffer))
                        await anyio.sleep(0.05)
            says = await live.ended()
    assert one.connect_to in says
    assert "give each an endpoint and an adapter of its own" in says
    if topics == "others":
        assert "'kv@10.0.0.1@m'" in says
        assert "'kv@10.0.0.2@m'" in says
    else:
        assert says.count("127.0.0.1:") == 3


async def test_an_engine_that_connects_again_with_another_topic_is_one(fleet: Fleet) -> None:
    await fleet.coordinator()
    engine = FakeEngine(replays=False)
    engine.connect_to = f"tcp://127.0.0.1:{free_port()}"
    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        for life in range(3):
            engine.topic = b"kv@10.0.0.%d@m" % life
            adapter = live.service.adapters[0]
            await until(lambda adapter=adapter, life=life: adapter.published.connections == life + 1)  # type: ignore[misc]
            assert adapter.published.publishers.live == 1
            before = adapter.track.applied
            with anyio.fail_after(30):
                while adapter.track.applied < before + 3:
                    await publish(engine, len(engine.cache.buffer) + 100 * life)
                    await anyio.sleep(0.05)
            # What is no engine at all, and leaves, is none of them.
            stream = await anyio.connect_tcp("127.0.0.1", int(engine.connect_to.rpartition(":")[2]))
            await stream.send(b"GET / HTTP/1.1\r\n\r\n" * 3)
            await stream.aclose()
            await engine.restart()
        assert live.failure == ""
