"""More held than fits proves that removals were lost: a gap, said; what is newest is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from structlog.testing import capture_logs

from kvplane.events.types import CacheCleared
from kvplane.services.engines.sequence import Track
from kvplane.services.engines.translate import Translator
from kvplane.services.process import logs
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.naive_engine import naive_hashes
from tests.support.one_node_fold import Folded
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio
SIZE = 16


def single(number: int) -> dict[str, Any]:
    return {
        "type": "BlockStored", "block_hashes": [number + 1], "parent_block_hash": None, "token_ids": [number] * SIZE,
        "block_size": SIZE, "lora_id": None, "medium": "GPU", "lora_name": None,
    }  # fmt: skip


def blocks(*numbers: int) -> set[int]:
    return {naive_hashes([number] * SIZE, SIZE)[0] for number in numbers}


class Node:
    def __init__(self, capacity: int) -> None:
        self.track = Track(Translator("a", SIZE, {"gpu": capacity}))
        self.track.translator.epoch = 1
        self.track.resync([], ended=True, same_life=None)
        self.folded = Folded(block_size=SIZE)
        self.gaps = 0

    def say(self, number: int, *events: dict[str, Any]) -> None:
        out = self.track.live(number, msgspec.msgpack.encode([float(number), list(events), 0]))
        assert out is not None
        self.gaps += sum(isinstance(event, CacheCleared) and event.reason.startswith("gap: ") for event in out)
        self.folded.put(out)
        assert self.folded.held() == self.track.translator.held()


def test_stores_without_removals_are_a_loss_and_the_newest_are_known() -> None:
    node = Node(50)
    for number in range(160):
        node.say(number, single(number))
        assert len(node.folded.held()) <= 50
    # The oldest matched and the newest did not.
    assert node.folded.held() >= blocks(*range(153, 160))
    assert node.folded.held().isdisjoint(blocks(*range(50)))
    assert (node.gaps, node.track.gaps, node.track.translator.oddities()) == (3, 3, {"overfull": 2})
    assert node.track.overfull == (
        "the engine reported 51 blocks as held and 50 fit: its removals were lost, or --capacity-blocks is too small"
    )


def test_a_full_cache_is_none() -> None:
    node = Node(50)
    for number in range(160):
        gone = [{"type": "BlockRemoved", "block_hashes": [number - 49], "medium": "GPU"}] if number >= 50 else []
        node.say(number, *gone, single(number))
    assert node.folded.held() == blocks(*range(110, 160))
    assert (node.gaps, node.track.overfull) == (0, "")


def test_one_batch_that_alone_does_not_fit_leaves_nothing() -> None:
    node = Node(5)
    node.say(0, single(0))
    node.say(1, *map(single, range(1, 10)))
    assert node.folded.held() == set()
    node.say(2, single(20))
    assert node.folded.held() == blocks(20)


def test_a_replay_that_holds_more_than_fits_is_a_loss_too() -> None:
    node = Node(50)
    replies = [(number, msgspec.msgpack.encode([1.0, [single(number)], 0])) for number in range(160)]
    node.track.resync(replies, ended=True, same_life=True)
    assert node.track.translator.held() >= blocks(*range(153, 160))
    assert node.track.translator.used() <= 50


async def test_the_adapter_says_it(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    engine = FakeEngine(capacity=12)
    logs.configure("info")
    with capture_logs() as lines:
        async with running(engine), attaching(fleet, engine.url, capacity_blocks=5) as live:
            await live.member()
            adapter = live.service.adapters[0]
            await until(lambda: adapter.published.live)
            for prompt in range(4):
                engine.cache.request([prompt] * 3 * engine.cache.size)
                await engine.publish()
            await until(lambda: any(line["event"] == "more_held_than_fits" for line in lines), 20)
            node = coordinator.state.nodes["a"]
            newest = set(naive_hashes([3] * 3 * engine.cache.size, engine.cache.size))
            await until(lambda: set(coordinator.state.caches.index(node.model).held(node.slots["gpu"])) == newest)
    (warning, *_) = [line for line in lines if line["event"] == "more_held_than_fits"]
    assert (warning["log_level"], warning["node"]) == ("warning", "a")
    assert "--capacity-blocks is too small" in warning["reason"]
