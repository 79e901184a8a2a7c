"""Tokens as pairs, as SGLang tells them with EAGLE; and an engine of which nothing is understood is not ready, and says why."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from kvplane.services.engines.dialect import decode
from kvplane.services.engines.translate import MISFITS, Translator
from kvplane.services.process import logs
from kvplane.services.protocol.errors import BadBatch
from tests.support.attaching import attaching
from tests.support.fake_engine import FakeEngine, running
from tests.support.naive_engine import naive_hashes
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


def batch(names: list[Any], tokens: list[Any], parent: Any = None, size: int = 4) -> bytes:
    """As SGLang: an array, without what is nothing at its end."""
    return msgspec.msgpack.encode([1.0, [["BlockStored", names, parent, tokens, size, None, "GPU"]]])


def pairs(tokens: list[int]) -> list[list[int]]:
    return [[one, two] for one, two in pairwise(tokens)]


def test_pairs_are_the_tokens_that_they_begin_with() -> None:
    tokens = list(range(100, 113))
    translator = Translator("a", 4, {"gpu": 8})
    translator.apply(decode(batch([1, 2], pairs(tokens)[:8])), 0)
    translator.apply(decode(batch([3], pairs(tokens)[8:12], 2)), 1)
    assert translator.held() == set(naive_hashes(tokens[:12], 4))
    # The same block before another token is another of the engine's; the last of the two takes it along.
    translator.apply(decode(batch([33], [*pairs(tokens)[8:11], [111, 7]], 2)), 2)
    for name, left in ((3, 3), (33, 2)):
        translator.apply(decode(msgspec.msgpack.encode([1.0, [["BlockRemoved", [name], "GPU"]]])), 3)
        assert len(translator.held()) == left
    assert translator.oddities() == {}


@pytest.mark.parametrize("tokens", [[[1, 2], 3], [[1], [2]], [[1, 2, 3]], [[]]])
def test_other_nestings_are_no_tokens(tokens: list[Any]) -> None:
    with pytest.raises(BadBatch):
        decode(batch([1], tokens))


def test_only_stores_none_of_which_fits_are_more_than_a_detail() -> None:
    translator = Translator("a", 4, {"gpu": 8})
    for tokens in ([1, 2, 3], ["a", "b", "c", "d"], [-1, 2, 3, 4]):
        assert translator.misfits() == ""
        translator.apply(decode(batch([1], tokens)), 0)
    assert translator.misfits().startswith("none of the engine's last 3 stores of blocks could be understood")
    translator.apply(decode(batch([1], [1, 2, 3, 4])), 0)
    translator.apply(decode(batch([2], [1, 2, 3])), 0)
    assert translator.misfits() == ""


async def test_an_engine_of_which_nothing_is_understood_is_not_ready(fleet: Fleet) -> None:
    await fleet.coordinator()
    engine = FakeEngine()
    logs.configure("info")
    with capture_logs() as lines:
        async with running(engine), attaching(fleet, engine.url) as live:
            await live.member()
            (adapter,) = live.service.adapters
            await until(lambda: adapter.published.live)

            async def publish(payload: bytes) -> None:
                number = len(engine.cache.buffer)
                engine.cache.buffer.append((number, payload))
                engine.cache.sequence = number + 1
                await engine._pub.send_multipart([engine.topic, number.to_bytes(8, "big"), payload])

            with anyio.fail_after(30):
                while not live.service.readiness().reason:
                    await publish(batch([1], [1, 2, 3]))
                    await anyio.sleep(0.05)
            assert "stores of blocks could be understood: their tokens are not those of blocks of 4" in (
                live.service.readiness().reason
            )
            await until(lambda: any(line["event"] == "not_understood" for line in lines))
            with anyio.fail_after(30):
                while adapter.track.unreadable < MISFITS:
                    await publish(b"\xc1")
                    await anyio.sleep(0.05)
            assert "batches could be decoded" in live.service.readiness().reason
            with anyio.fail_after(30):
                while live.service.readiness().reason:
                    await publish(batch([1], [1, 2, 3, 4]))
                    await anyio.sleep(0.05)
