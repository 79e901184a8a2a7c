"""Requests that wait for a place on a node."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kvplane.services.roles.places import Places

pytestmark = pytest.mark.anyio


async def test_a_place_is_the_first_one_s_of_each_model_it_is_for() -> None:
    places, order = Places(), list[str]()

    async def waits(name: str, model: str) -> None:
        await places.wait(model)
        order.append(name)

    async with anyio.create_task_group() as group:
        for name, model in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("c1", "c")):
            group.start_soon(waits, name, model)
            await checkpoint()
        places.free(["a", "b"])
        await checkpoint()
        await checkpoint()
        assert sorted(order) == ["a1", "b1"]
        places.free(["a", "unknown"])
        places.free(["c"])
    assert order[2:] == ["a2", "c1"]
    assert not places


async def test_who_leaves_takes_no_place() -> None:
    places, done = Places(), list[str]()

    async def waits(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            await places.wait("m")
            done.append(name)

    scopes = {name: anyio.CancelScope() for name in ("gone", "next")}
    async with anyio.create_task_group() as group:
        for name, scope in scopes.items():
            group.start_soon(waits, name, scope)
            await checkpoint()
        scopes["gone"].cancel()
        await checkpoint()
        places.free(["m"])
    assert done == ["next"]
    assert not places
    with anyio.move_on_after(0):
        await places.wait("m")
    assert not places
