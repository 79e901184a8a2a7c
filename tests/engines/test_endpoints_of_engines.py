"""Where engines publish: bound to a free port, connected, on other hosts, somewhere else after a restart."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.services.engines.facts import Source, _sglang_sources, _sources
from kvplane.services.engines.sockets import Published, way_of
from kvplane.services.protocol.errors import EngineUnfit
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


class Ephemeral(FakeEngine):
    """It has bound any free port and tells its own address, as vLLM does for `tcp://*:0`."""

    def options_endpoint(self) -> str:
        return f"tcp://*:{self.ports[1]}" if self.connect_to != "told" else f"tcp://127.0.0.1:{self.ports[1]}"

    def _pages(self) -> Any:
        self.connect_to = "told"
        try:
            return super()._pages()
        finally:
            self.connect_to = ""


async def test_the_adapter_connects_to_what_the_engine_has_bound(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    engine = Ephemeral()
    async with running(engine), attaching(fleet, engine.url) as live:
        await live.member()
        (adapter,) = live.service.adapters
        assert adapter.source.events == f"tcp://127.0.0.1:{engine.ports[1]}"

        def held() -> set[int]:
            node = coordinator.state.nodes["a"]
            return set(coordinator.state.caches.index(node.model).held(node.slots["gpu"]))

        for _ in range(2):
            await until(lambda: adapter.published.publishers.live == 1, 30)
            assert not adapter.published.bound
            engine.cache.request([engine.life + 1] * 3 * engine.cache.size)
            await engine.publish()
            await until(lambda: held() == engine.cache.held(), 20)
            assert adapter.track.applied
            # Another life has other free ports.
            engine.ports[1:] = [free_port(), free_port()]
            await engine.restart()


@pytest.mark.parametrize("way", ["", "connect:"])
async def test_an_address_that_is_not_here_is_connected_to(way: str) -> None:
    published = Published(f"{way}tcp://198.51.100.9:30050", "127.0.0.1")
    try:
        assert (published.bound, published.endpoint) == (False, "tcp://198.51.100.9:30050")
    finally:
        published.close()


async def test_the_user_says_which_it_is() -> None:
    assert way_of("connect:tcp://10.0.0.9:5557") == ("connect", "tcp://10.0.0.9:5557")
    assert way_of("tcp://10.0.0.9:5557") == ("", "tcp://10.0.0.9:5557")
    port = free_port()
    published = Published(f"connect:tcp://127.0.0.1:{port}", "127.0.0.1")
    assert not published.bound
    published.close()
    published = Published(f"bind:tcp://*:{port}", "127.0.0.1")
    assert published.bound
    with pytest.raises(EngineUnfit, match=r"the adapter can't listen: Address already in use"):
        Published(f"bind:tcp://*:{port}", "127.0.0.1")
    published.close()
    with pytest.raises(EngineUnfit, match="took any free port for its events and does not say which"):
        Published("tcp://*:0", "127.0.0.1")
    with pytest.raises(EngineUnfit, match="the adapter can't listen: .*, nor connect: "):
        Published("nonsense", "127.0.0.1")


def test_vllm_tells_its_publishers_by_rank_or_as_a_list() -> None:
    one = {"data_parallel_rank": 1, "endpoint": "tcp://10.0.0.1:5558", "replay_endpoint": None, "topic": ""}
    zero = {
        "data_parallel_rank": 0,
        "endpoint": "tcp://10.0.0.1:5557",
        "replay_endpoint": "tcp://10.0.0.1:6557",
        "topic": "",
    }
    expected = [
        Source(rank=0, events="tcp://10.0.0.1:5557", replay="tcp://10.0.0.1:6557"),
        Source(rank=1, events="tcp://10.0.0.1:5558"),
    ]
    assert _sources([one, zero, 7, None, {}]) == expected
    assert _sources({"1": one, "0": zero, "x": None}) == expected
    assert _sources("nonsense") == []


def test_publishers_of_an_sglang_of_several_hosts_are_connected_to() -> None:
    config = json.dumps({"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:6557"})
    publishers = [
        {"dp_rank": 4, "endpoint": "tcp://10.0.0.2:5561"}, {"dp_rank": 0, "endpoint": "tcp://10.0.0.1:5557"}, "odd",
        {"dp_rank": 9},
    ]  # fmt: skip
    info = {"dp_size": 8, "kv_events_config": config, "kv_events": {"publishers": publishers}}
    assert _sglang_sources(info) == [
        Source(rank=0, events="connect:tcp://10.0.0.1:5557", replay="tcp://10.0.0.1:6557"),
        Source(rank=4, events="connect:tcp://10.0.0.2:5561", replay="tcp://10.0.0.2:6561"),
    ]
    assert len(_sglang_sources({**info, "kv_events": None})) == 8
