"""Numbers of an engine's that are none: unknown, never a traceback."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.services.engines.facts import Engine, Gauges, _number, _sglang_sources, gauges, samples
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio
ODD = ["NaN", "+Inf", "-Inf", "-1", "1e300"]


@pytest.mark.parametrize("number", ODD)
def test_a_gauge_that_is_no_number_is_unknown(number: str) -> None:
    page = f"""process_start_time_seconds {number}
vllm:num_requests_running{{engine="0"}} {number}
vllm:num_requests_waiting{{engine="0"}} 2
vllm:prefix_cache_queries_total{{engine="0"}} {number}
vllm:request_success_total{{engine="0"}} {number}
"""
    assert gauges(samples(page), 0) == Gauges(active=2, waiting=2)
    assert _number(number) == 0
    assert _number(json.loads(f"[{number.removeprefix('+').replace('Inf', 'Infinity')}]")[0]) == 0


@pytest.mark.parametrize("number", ODD)
async def test_the_adapter_goes_on(fleet: Fleet, number: str) -> None:
    coordinator = await fleet.coordinator()
    engine = FakeEngine(has_start_time=False)
    engine.more_metrics = f'process_start_time_seconds {number}\nvllm:num_requests_running{{engine="0"}} {number}\n'
    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        await until(lambda: "a" in coordinator.liveness.heartbeats and coordinator.liveness.heartbeats["a"].active)
        assert coordinator.liveness.heartbeats["a"].active == 3
        assert live.failure == ""


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e300, -1, "many", None, [], {}])
async def test_what_sglang_tells_of_itself_may_be_anything(odd: Any) -> None:
    engine = FakeEngine("sglang")
    async with running(engine), Engine("sglang", engine.url) as http:
        for field in (
            "page_size",
            "max_total_num_tokens",
            "kv_events",
            "internal_states",
            "dp_size",
            "kv_events_config",
        ):
            info: dict[str, Any] = {"page_size": 16, "max_total_num_tokens": 160, "internal_states": [odd], field: odd}

            async def told(*_: str, info: dict[str, Any] = info) -> Any:
                return json.loads(json.dumps(info))

            http._json = told  # type: ignore[method-assign]
            facts = await http.facts()
            assert facts.block_size in {0, 16}
            assert facts.capacity_blocks in {0, 10}
    assert len(_sglang_sources({"dp_size": 1e15, "kv_events_config": '{"publisher": "zmq"}'})) == 4096
    assert _sglang_sources(
        {"kv_events_config": json.dumps({"publisher": "zmq", "endpoint": odd, "replay_endpoint": odd})}
    )
