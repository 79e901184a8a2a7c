"""An engine that serves and reports nothing of its cache: everybody who could know says so, until events come."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from structlog.testing import capture_logs

from kvplane.services.diagnosis.doctor import judge
from kvplane.services.diagnosis.examine import examine
from kvplane.services.engines.adapters import Adapters
from kvplane.services.engines.attachment import Attachment
from kvplane.services.engines.facts import Engine, Kind, Served, gauges, samples
from kvplane.services.engines.hearing import PATIENCE_SECONDS, Hearing
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from tests.support.fake_engine import FakeEngine, running
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


def page(kind: Kind, asked: int, cached: int, answered: int, ended: int) -> str:
    """The counters of an engine that has served; two ranks of a vLLM."""
    if kind == "sglang":
        return (
            f"sglang:prompt_tokens_total {asked}\nsglang:cached_tokens_total {cached}\n"
            f"sglang:generation_tokens_total {answered}\nsglang:num_requests_total {ended}\n"
        )
    return (
        f'vllm:prefix_cache_queries_total{{engine="0"}} {asked}\nvllm:prefix_cache_hits_total{{engine="0"}} {cached}\n'
        f'vllm:generation_tokens_total{{engine="0"}} {answered}\nvllm:prefix_cache_queries_total{{engine="1"}} 9e9\n'
        f'vllm:request_success_total{{engine="0",finished_reason="stop"}} {ended}\n'
        f'vllm:request_success_total{{engine="0",finished_reason="length"}} 1\n'
    )


def test_what_was_served_is_read_from_the_metrics() -> None:
    assert gauges(samples(page("vllm", 100, 64, 9, 2)), 0).served == Served(45, 3)
    assert gauges(samples(page("sglang", 100, 64, 9, 2)), 0).served == Served(45, 2)
    assert gauges(samples(""), 0).served is None


class At:
    endpoint = "tcp://*:5557"
    live = 1


def missing(*looks: tuple[float, Served | None, bool]) -> bool:
    hearing = Hearing("vllm", "a", 16, At())
    for now, served, has_events in looks:
        hearing.look(served, now, received=has_events)
    return hearing.missing


def test_only_who_must_have_filled_a_block_is_missed() -> None:
    late = PATIENCE_SECONDS + 2
    start = (0.0, Served(1000, 10), False)
    assert missing(start, (1, Served(1017, 11), False), (late, Served(1017, 11), False))
    # It may be on its way.
    assert not missing(start, (1, Served(1017, 11), False), (2, Served(1017, 11), False))
    # Ten prompts of ten tokens are a hundred, and none of them fills a block.
    assert not missing(start, (1, Served(1100, 20), False), (late, Served(1100, 20), False))
    # What was served before the adapter came, and in another life of the engine.
    assert not missing(start, (late, Served(1000, 10), False))
    assert not missing(start, (1, Served(300, 3), False), (late, Served(300, 3), False))
    assert not missing(start, (1, Served(1017, 11), False), (late, Served(1017, 11), True))
    assert not missing((0, None, False), (late, None, False))


@asynccontextmanager
async def attached(fleet: Fleet, url: str, *, events: str) -> AsyncIterator[Adapters]:
    async with Engine("vllm", url) as engine, anyio.create_task_group() as group:
        wanted = Attachment(node="a", pulse_seconds=0.2, events=events)
        service = Adapters(await fleet.connect("attach"), fleet.name, engine, wanted)
        await group.start(service.run)
        yield service
        group.cancel_scope.cancel()


async def test_a_node_whose_events_never_come_is_named_until_they_do(fleet: Fleet) -> None:
    await fleet.coordinator()
    engine = FakeEngine(replays=False)
    endpoint = f"tcp://*:{free_port()}"
    engine.more_metrics = page("vllm", 50, 0, 0, 2)
    logs.configure("warning")

    async def has_no_events() -> bool:
        (row,) = (await fleet.ask("coordinator.node.list", messages.ListRequest()))["nodes"]
        return bool(row["unheard"])

    async def has_events() -> bool:
        return not await has_no_events()

    with capture_logs() as lines:
        async with running(engine), attached(fleet, engine.url, events=endpoint) as service:
            assert service.readiness() == ("", {"nodes": 1})
            await until(lambda: service.adapters[0].hearing._before)
            engine.more_metrics = page("vllm", 90, 0, 0, 3)
            await until(has_no_events, 20)
            reason = f"node a: nobody publishes at {endpoint}"
            assert service.readiness() == (reason, {"nodes": 1, "unheard": ["a"]})
            problems = [
                finding.message for finding in judge(await examine(fleet.client, fleet.name)) if finding.what == "nodes"
            ]
            assert any(text.startswith("nothing is heard of the cache of a, which serves") for text in problems)
            # Now it publishes where the adapter listens.
            service.adapters[0].published._socket.connect(f"tcp://127.0.0.1:{engine.ports[1]}")
            while not service.adapters[0].track.applied:
                engine.cache.request([len(engine.cache.held())] * 3 * engine.cache.size)
                await engine.publish()
                await anyio.sleep(0.05)
            await until(has_events, 20)
            assert service.readiness() == ("", {"nodes": 1})
    (warning,) = [line for line in lines if line["event"] == "no_events_heard"]
    assert (warning["node"], warning["endpoint"], warning["tokens"]) == ("a", endpoint, 40)
    assert "start vLLM with --enable-prefix-caching --kv-events-config" in warning["hint"]


@pytest.mark.parametrize("given", [True, False])
async def test_an_adapter_that_listens_where_the_engine_connects_says_so(
    fleet: Fleet,
    server: Server,
    given: bool,
) -> None:
    await fleet.coordinator()
    engine = FakeEngine()
    engine.connect_to = f"tcp://127.0.0.1:{free_port()}"
    options: Any = ["--events", engine.connect_to, "--replay", engine.replay_endpoint] if given else []
    async with running(engine):
        process = await anyio.open_process(
            [sys.executable, "-m", "kvplane", "attach", "vllm", "--engine", engine.url, "--node", "a", "--server", server.url,
             *options]
        )  # fmt: skip
        try:
            stderr = b""
            with anyio.fail_after(40):
                while b"node_registered" not in stderr:
                    assert process.stderr is not None
                    stderr += await process.stderr.receive()
        finally:
            process.kill()
            await process.aclose()
    (line,) = [line for line in stderr.decode().splitlines() if "events_bound" in line]
    assert engine.connect_to in line
    assert "the adapter listens there and the engine connects" in line
    assert ('"warning"' in line) is given
