"""Who waits for a place gets the next one: tenants by turns, a tenant's own by urgency, and nobody beyond the bound."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kvplane.services.protocol.errors import NoNode, QueueFull
from kvplane.services.roles import places
from kvplane.services.roles.places import Places

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

pytestmark = pytest.mark.anyio


class Waiting:
    """Requests that wait, and the order in which they get their places. Of `taken` the first try is in vain."""

    def __init__(self, group: TaskGroup) -> None:
        self.places = Places()
        self.got: list[str] = []
        self.refused: list[str] = []
        self.taken: set[str] = set()
        self.failing: set[str] = set()
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._group = group

    async def add(self, name: str, model: str = "m", tenant: str = "", priority: int = 0, size: int = 0) -> None:
        self.scopes[name] = anyio.CancelScope()
        self._group.start_soon(self._wait, name, model, tenant, priority, size)
        await settled()

    async def _wait(self, name: str, model: str, tenant: str, priority: int, size: int) -> None:
        try:
            with self.scopes[name], self.places.turn(model, tenant, priority, size) as turn:
                await turn.mine()
                if name in self.failing:
                    raise NoNode  # noqa: TRY301 - as decisions do
                while name in self.taken:
                    self.taken.discard(name)
                    await turn.mine()
                self.got.append(name)
        except NoNode:
            pass
        except QueueFull:
            self.refused.append(name)

    async def free(self, count: int = 1, *models: str) -> None:
        for _ in range(count):
            self.places.free(models or ["m"])
            await settled()

    async def leave(self, name: str) -> None:
        self.scopes[name].cancel()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await checkpoint()


async def test_the_first_to_come_gets_the_next_place_of_its_model() -> None:
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        for name, model in (("one", "m"), ("two", "m"), ("other", "n"), ("three", "m")):
            await waiting.add(name, model)
        await waiting.free(1, "n", "unknown")
        assert waiting.got == ["other"]
        await waiting.leave("two")
        await waiting.free(3)
        assert waiting.got == ["other", "one", "three"]
        assert not waiting.places


async def test_a_flood_of_one_tenant_costs_another_one_place_a_round() -> None:
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        for at in range(100):
            await waiting.add(f"flood{at}", tenant="flood")
        await waiting.free(10)
        for at in range(3):
            await waiting.add(f"calm{at}", tenant="calm")
        await waiting.free(6)
        assert [name for name in waiting.got if name.startswith("calm")] == ["calm0", "calm1", "calm2"]
        assert waiting.got.index("calm2") <= 16
        # Who was away has saved nothing up.
        await waiting.free(20)
        for at in range(3, 9):
            await waiting.add(f"calm{at}", tenant="calm")
        before = len(waiting.got)
        await waiting.free(8)
        assert sum(name.startswith("calm") for name in waiting.got[before:]) == 4
        group.cancel_scope.cancel()


async def test_priority_orders_a_tenants_own_requests_and_nobody_elses() -> None:
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        for name, tenant, priority in (
            ("later", "a", 5), ("plain", "a", 0), ("of b", "b", 0), ("urgent", "a", -9), ("of b too", "b", 3),
            ("plain too", "a", 0),
        ):  # fmt: skip
            await waiting.add(name, tenant=tenant, priority=priority)
        await waiting.free(6)
        assert [name for name in waiting.got if not name.startswith("of b")] == [
            "urgent",
            "plain",
            "plain too",
            "later",
        ]
        assert set(waiting.got[:2]) == {"urgent", "of b"}
        assert set(waiting.got[2:4]) == {"plain", "of b too"}


async def test_whose_place_was_taken_by_another_router_is_still_the_next() -> None:
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        for name, tenant in (("one", "a"), ("two", "a"), ("three", "b"), ("four", "b")):
            await waiting.add(name, tenant=tenant)
        waiting.taken = {"one"}
        await waiting.free(1)
        assert not waiting.got
        await waiting.free(4)
        assert waiting.got == ["one", "three", "two", "four"]


async def test_a_turn_that_nobody_uses_goes_to_the_next() -> None:
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        await waiting.add("one")
        await waiting.add("two")
        # Its model's nodes are gone for it when its turn comes.
        waiting.failing = {"one"}
        await waiting.free(1)
        assert waiting.got == ["two"]


async def test_the_queue_never_grows_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WAITING_LIMIT", 8)
    monkeypatch.setattr(places, "WAITING_BYTES", 100)
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        for at in range(20):
            await waiting.add(f"flood{at}", tenant="flood")
            assert waiting.places.waiting <= 8
        assert waiting.refused == [f"flood{at}" for at in range(8, 20)]
        # Who has fewer takes the place of the last of who has most, until they have as many.
        for at in range(6):
            await waiting.add(f"calm{at}", tenant="calm")
            assert waiting.places.waiting == 8
        assert waiting.refused[12:] == ["flood7", "flood6", "flood5", "flood4", "calm4", "calm5"]
        await waiting.free(8)
        assert sorted(waiting.got) == sorted([f"flood{at}" for at in range(4)] + [f"calm{at}" for at in range(4)])
        assert waiting.got[:2] == ["flood0", "calm0"]
        assert not waiting.places
        # Bytes are bounded as well; one alone may be as long as requests may be.
        await waiting.add("long", size=1000)
        await waiting.add("longer", size=1)
        assert waiting.refused[-1] == "longer"
        group.cancel_scope.cancel()


async def test_when_to_come_again_follows_from_how_fast_the_queue_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kvplane.services.roles.places.monotonic", lambda: now[0])
    async with anyio.create_task_group() as group:
        waiting = Waiting(group)
        assert waiting.places.expected("m") == 0
        for at in range(40):
            await waiting.add(f"r{at}", tenant="a")
        assert waiting.places.expected("m", "a") == 0
        for _ in range(20):
            now[0] += 0.5
            await waiting.free(1)
        # Two a second; twenty of its own are before it, or as many of others as it has.
        assert waiting.places.expected("m", "a") == pytest.approx(10.5)
        assert waiting.places.expected("m", "b") == pytest.approx(1.0)
        with suppress(QueueFull):
            raise waiting.places.told(QueueFull("x"), "m", "a")
        assert waiting.places.told(QueueFull("x"), "m", "a").retry_after == 11
        group.cancel_scope.cancel()
