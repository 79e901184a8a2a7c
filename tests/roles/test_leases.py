"""Requests that count for a while only: whoever asked for them may never send them, or may be killed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from kvplane.events.hashing import pack_hashes
from kvplane.services.protocol import messages
from kvplane.services.roles.leases import Leases
from kvplane.services.roles.router import Router
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.waiting import until

if TYPE_CHECKING:
    from kvplane.events import types
    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


def request(seconds: float, name: str = "") -> messages.RouteRequest:
    return messages.RouteRequest(model="sim", hashes=pack_hashes([1, 2, 3]), lease_seconds=seconds, request=name)


async def routed(fleet: Fleet, coordinator: Coordinator, seconds: float, name: str) -> messages.RouteAnswer:
    """A decision that the coordinator has read, too."""
    answer: messages.RouteAnswer = await fleet.ask("route", request(seconds, name), messages.RouteAnswer)
    await until(lambda: coordinator.state.load.recent_requests and sum(coordinator.state.load.recent_requests) > 0)
    return answer


async def test_load_that_nobody_takes_back_ends_with_its_lease(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    router = await fleet.router()
    answer = await routed(fleet, coordinator, 0.3, "left alone")
    await until(lambda: not coordinator.state.load.running and not router.state.load.running)
    load = coordinator.state.load.of(answer.node)
    assert load is not None
    assert (load.active, load.blocks, load.pending) == (0, 0, 0)
    assert len(router.leases) == 0


async def test_a_completion_ends_the_lease(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    router = await fleet.router()
    answer = await routed(fleet, coordinator, 600, "served")
    assert len(router.leases) == 1
    assert set(coordinator.state.load.running) == {"served"}
    await fleet.ask("complete", messages.CompleteRequest(request=answer.request, node=answer.node))
    await until(lambda: not coordinator.state.load.running)
    await until(lambda: len(router.leases) == 0)


async def test_without_a_lease_a_request_counts_until_its_completion(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    router = await fleet.router()
    await routed(fleet, coordinator, 0, "to be sent")
    assert len(router.leases) == 0
    # What is decided after it has come and gone, and it still runs.
    await fleet.ask("route", request(0.1, "lent"))
    await until(lambda: len(router.leases) == 0 and router.state.load.routed_recently == 2)
    await until(lambda: set(router.state.load.running) == {"to be sent"})


async def test_a_router_that_leaves_ends_its_leases(fleet: Fleet) -> None:
    coordinator = await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    client = await fleet.connect("leaving")
    async with anyio.create_task_group() as group:
        await group.start(Router(client, fleet.name).run)
        await routed(fleet, coordinator, 600, "lent")
        assert set(coordinator.state.load.running) == {"lent"}
        group.cancel_scope.cancel()
    await until(lambda: not coordinator.state.load.running)


async def test_more_leases_than_a_router_keeps_end_the_first() -> None:
    ended: list[types.RequestCompleted] = []
    leases = Leases(ended.append, limit=2)
    for name in ("one", "two", "one", "three", "four"):
        leases.add(name, "a", 60, "")
    assert [(event.request, event.node, event.status) for event in ended] == [
        ("two", "a", "abandoned"), ("one", "a", "abandoned"),
    ]  # fmt: skip
    leases.completed("three")
    leases.close()
    assert [event.request for event in ended[2:]] == ["four"]


async def test_leases_end_in_the_order_of_their_ends() -> None:
    ended: list[str] = []
    leases = Leases(lambda event: ended.append(event.request))
    async with anyio.create_task_group() as group:
        group.start_soon(leases.run)
        leases.add("late", "a", 0.4, "")
        await anyio.lowlevel.checkpoint()
        leases.add("soon", "a", 0.1, "")
        await until(lambda: len(ended) == 2)
        group.cancel_scope.cancel()
    assert ended == ["soon", "late"]


async def test_a_lease_that_was_given_again_ends_when_the_last_one_does() -> None:
    ended: list[tuple[str, str]] = []
    # More names of old ends than are kept, so that those are sorted out as well.
    leases = Leases(lambda event: ended.append((event.request, event.node)), limit=3)
    async with anyio.create_task_group() as group:
        group.start_soon(leases.run)
        for again in range(20):
            leases.add("longer", f"n{again}", 0.05 + again / 100, "")
            leases.add("shorter", f"n{again}", 600 - again * 31.57, "")
        leases.add("between", "b", 0.15, "")
        await until(lambda: len(ended) == 3)
        group.cancel_scope.cancel()
    assert ended == [("between", "b"), ("shorter", "n19"), ("longer", "n19")]
    assert len(leases) == 0


async def test_a_lease_is_no_longer_than_a_request_counts_anyway(fleet: Fleet) -> None:
    await fleet.coordinator()
    await fleet.nodes(NodeConfig(name="a"))
    await fleet.router()
    assert await fleet.refused("route", request(901)) == "bad_request"
