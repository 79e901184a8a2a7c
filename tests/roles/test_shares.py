"""One client that routes and never completes: others keep their places, and memory has an end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events import types
from kvplane.events.hashing import pack_hashes
from kvplane.projections import load
from kvplane.projections.snapshot import dump
from kvplane.projections.snapshot import load as loaded
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import Overloaded, Refused
from kvplane.services.roles import shares
from kvplane.services.roles.shares import Shares
from kvplane.services.routing import overlay as overlays
from kvplane.services.routing.overlay import Overlay
from kvplane.services.routing.roster import Roster
from kvplane.services.rpc.client import ask
from tests.support.fold_given import SECOND, START, Given, registered
from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.services.roles.router import Router
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def route(client: Client, **fields: Any) -> messages.RouteAnswer:
    fields = {"hashes": pack_hashes([1, 2, 3])} | fields
    request = messages.RouteRequest(model="m", **fields)
    return await ask(client, "kv.default.route", request, messages.RouteAnswer)


def is_running(router: Router, request: str) -> bool:
    return request in router.state.load.running


async def fill(client: Client) -> int:
    """Route until no place is left; how many there were."""
    for count in range(100):
        try:
            await route(client)
        except Refused:
            return count
    return 100


async def insist(client: Client) -> None:
    """Route as a client that is told to try again later."""
    for _ in range(500):
        try:
            await route(client)
        except Refused:
            await anyio.sleep(0.02)
        else:
            return
    raise AssertionError("it never had a place")


async def with_places(fleet: Fleet, places: int) -> None:
    await fleet.coordinator()
    await fleet.ask(
        "coordinator.node.register",
        messages.RegisterRequest(
            node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 100_000}, max_active=places
        ),
    )


async def test_who_never_completes_takes_no_place_from_others(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "UNHEARD_SECONDS", 0.0)
    monkeypatch.setattr(shares, "LOOK_SECONDS", 0.0)
    await with_places(fleet, 16)
    router = await fleet.router()
    greedy, other = await fleet.connect("greedy"), await fleet.connect("other")
    # While it is alone it may have all of them.
    assert await fill(greedy) == 16
    with pytest.raises(Refused):
        await route(other)
    # A part of what it has was given up for the other one.
    await until(lambda: len(router.state.load.running) == 14)
    assert router.shares.given_up == 2
    assert (await route(other)).node == "a"
    assert (await route(other)).node == "a"
    # Now others ask, so it leaves them some.
    with pytest.raises(Refused, match="you run 14 requests of model 'm', as many as one may while others ask"):
        await route(greedy)
    for _ in range(4):
        await insist(other)
    # No more than half was taken.
    counts = sorted(share.count for share in router.shares._shares.values())
    assert counts[0] == 6
    assert counts[1] >= 7


async def test_long_requests_are_recorded_while_there_is_room(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "RUNNING_BYTES", 4 * 800)
    monkeypatch.setattr(shares, "BYTES_OF_ONE", 2 * 800)
    await with_places(fleet, 0)
    router = await fleet.router()
    clients = [await fleet.connect(f"c{number}") for number in range(3)]
    recorded: dict[str, int] = {}
    for at, client in enumerate(clients):
        for number in range(3):
            hashes = pack_hashes(range(1000 * (3 * at + number), 1000 * (3 * at + number) + 100))
            answer = await route(client, hashes=hashes, request=f"c{at}-{number}")
            await until(partial(is_running, router, answer.request))
            running = router.state.load.running[answer.request]
            assert running.blocks == 100
            recorded[answer.request] = len(running.hashes)
    # Two of each, and four of all.
    assert [name for name, size in recorded.items() if size] == ["c0-0", "c0-1", "c1-0", "c1-1"]
    assert router.state.load.running_bytes == 4 * 800
    for name in ("c0-0", "c0-1"):
        await fleet.ask("complete", messages.CompleteRequest(request=name, node="a"))
    await until(lambda: router.state.load.running_bytes == 2 * 800)
    answer = await route(clients[2], hashes=pack_hashes(range(50_000, 50_100)), request="again")
    await until(lambda: "again" in router.state.load.running)
    assert len(router.state.load.running["again"].hashes) == 800


async def test_what_no_node_can_hold_is_not_recorded(fleet: Fleet) -> None:
    await with_places(fleet, 0)
    await fleet.ask(
        "coordinator.node.register",
        messages.RegisterRequest(
            node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 10}, replace=True
        ),
    )
    router = await fleet.router()
    for name, blocks, kept in (("short", 20, 160), ("long", 21, 0)):
        assert (await route(fleet.client, hashes=pack_hashes(range(blocks)), request=name)).blocks == blocks
        await until(partial(is_running, router, name))
        assert len(router.state.load.running[name].hashes) == kept


def test_bytes_of_running_requests_are_those_of_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RUNNING_LIMIT", 4)
    given = Given()
    given.node(registered("a", capacity=100))
    given.node(registered("b", capacity=100))

    def right() -> int:
        state = given.state.load
        assert state.running_bytes == sum(len(active.hashes) for active in state.running.values())
        return state.running_bytes

    for number in range(6):
        given.routes(f"q{number}", "ab"[number % 2], *range(number + 1))
        right()
    given.routes("q5", "a", 1, 2, 3)
    assert right() > 0
    assert loaded("f", dump(given.state)).load.running_bytes == right()
    given.put("access", "r", types.RequestCompleted("q4", "a"))
    right()
    given.put("node", "a", types.NodeLost("a"))
    right()
    given.put("node", "b", types.NodeRemoved("b"))
    assert right() == 0


def test_what_was_heard_of_stays_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "LOOK_SECONDS", 0.0)
    given = Given()
    given.node(registered("a", capacity=100, most=4))
    held = Shares(given.state, Overlay())
    for number in range(4):
        given.routes(f"q{number}", "a", 10 * number, 10 * number + 1)
        held.add(f"q{number}", "greedy", "m", START + number * SECOND, "a", 16)
    given.stores("a", 0, 1)
    now = START + 10 * SECOND
    # Of the first one its prompt was stored.
    assert held.surplus("other", "m", now) == ["q1"]
    assert held.surplus("greedy", "m", now) == []
    assert held.surplus("other", "another model", now) == []
    assert held.surplus("other", "m", START + int(shares.HEARD_SECONDS + 1) * SECOND) == ["q0"]
    # What ended without a word is no longer counted.
    roster = Roster(given.state, "m")
    held.check("other", "m", roster, now)
    with pytest.raises(Overloaded):
        held.check("greedy", "m", roster, now)
    given.put("access", "r", types.RequestCompleted("q3", "a"), types.RequestCompleted("q2", "a"))
    held.check("greedy", "m", roster, now)
    # Nobody else has asked for long.
    given.routes("q4", "a", 1)
    held.check("greedy", "m", roster, now + int(shares.OTHERS_SECONDS + 1) * SECOND)


def test_predictions_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "PREDICTED_BYTES", 100 * 8)
    overlay = Overlay()
    period = int(overlays.PREDICTION_SECONDS) * SECOND
    for number in range(20):
        overlay.predict("m", "a", 0, pack_hashes(range(100 * number, 100 * number + 10)), 10 * period)

    def predicted(number: int, now: int) -> bool:
        overlay.expire(now)
        return overlay.lift("m", pack_hashes([100 * number]), 1, [0])

    assert [predicted(number, 10 * period) for number in (0, 9, 10, 19)] == [True, True, False, False]
    overlay.predict("m", "a", 0, pack_hashes([9999]), 11 * period)
    assert overlay.lift("m", pack_hashes([9999]), 1, [0])
    assert predicted(9, 11 * period)
    assert not predicted(9, 12 * period)
