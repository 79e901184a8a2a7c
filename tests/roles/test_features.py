"""The classic features, end to end over a real server: each step of the demonstration, and what it leaves out."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.follow import replay
from kvplane.projections.digest import digest
from kvplane.services.control import commands
from kvplane.services.demo.features import FEATURES
from kvplane.services.demo.fleet import ANSWER_SECONDS
from kvplane.services.demo.stage import Stage
from kvplane.services.demo.traffic import Traffic
from kvplane.services.demo.workload import conversations, round_robin_hit_rate
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import NoAnswer
from kvplane.services.roles.router import Router
from kvplane.services.routing.policies import allow
from kvplane.services.rpc.client import instances
from kvplane.services.simulation.simnode import NodeConfig, run_nodes
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from nats.aio.client import Client

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

PLACEMENT = ["capacity tracking", "least-loaded placement", "best-fit placement", "LRU eviction", "protected blocks"]
MODEL = "org/model-8B.v2"
FAST: dict[str, Any] = {"model": MODEL, "prefill_speed": 200_000, "decode_speed": 20_000, "pulse_seconds": 0.2}


@pytest.fixture
async def stage(fleet: Fleet, client: Client) -> AsyncIterator[Stage]:
    await fleet.coordinator()
    await fleet.router()
    await fleet.router()
    await fleet.nodes(
        NodeConfig(name="managed one", cache_mode="managed", **FAST),
        NodeConfig(name="reported.1", **FAST),
        NodeConfig(name="reported.2", **FAST),
    )
    found = Stage(client, cast("Any", fleet), Traffic(client, fleet.name, MODEL), 16)
    async with anyio.create_task_group() as group:
        group.start_soon(found.follower.run)
        await found.follower.caught_up.wait()
        # The nodes are 25 times as fast as those that the defaults fit.
        policy = messages.PolicyRequest(
            policy="ttft", parameters={"active_seconds": 0.00008, "decode_seconds": 0, "session_seconds": 0.02}
        )
        await fleet.ask("coordinator.policy.set", policy)
        await found.seen(types.PolicyChanged)
        yield found
        group.cancel_scope.cancel()


@pytest.mark.parametrize(("name", "feature"), FEATURES, ids=[name for name, _ in FEATURES])
async def test_feature(stage: Stage, name: str, feature: Callable[[Stage], Awaitable[str]]) -> None:
    if name in PLACEMENT:
        # These build on one another; what came before must hold first.
        for earlier in PLACEMENT[: PLACEMENT.index(name)]:
            await dict(FEATURES)[earlier](stage)
    assert await feature(stage)


async def test_a_session_moves_when_its_node_is_lost(stage: Stage, fleet: Fleet) -> None:
    async with anyio.create_task_group() as group:
        doomed = await fleet.connect("doomed")
        await group.start(run_nodes, doomed, fleet.name, [NodeConfig(name="doomed", **FAST)])
        traffic = stage.traffic
        others = ["managed one", "reported.1", "reported.2"]
        work = conversations(sessions=1, turns=1)[0]
        first = await traffic.route(work, exclude=others)
        await traffic.serve(first, work)
        assert (first.node, first.session) == ("doomed", "new")
        await until(lambda: stage.state.caches.held(stage.state.nodes["doomed"]) > 0)
        # Its process is gone from one moment to the next: no goodbye, no last heartbeat.
        group.cancel_scope.cancel()
    lost_at, event = await stage.seen(types.NodeLost, seconds=10)
    assert (event.node, stage.state.caches.held(stage.state.nodes["doomed"])) == ("doomed", 0)
    assert stage.state.sessions.on_node("doomed") == 0
    again = await traffic.route(work)
    assert (again.session, again.moved_from) == ("moved", "doomed")
    assert again.node != "doomed"
    _, moved = await stage.seen(types.SessionAssigned, after=lost_at)
    assert (moved.node, moved.reason) == (again.node, "from doomed")


async def test_a_lost_node_that_is_heard_again_comes_back_with_its_cache(stage: Stage, fleet: Fleet) -> None:
    await stage.traffic.send(conversations(sessions=1, turns=1)[0])
    victim = next(name for name, node in stage.state.nodes.items() if stage.state.caches.held(node))
    held = stage.state.caches.held(stage.state.nodes[victim])
    # Another coordinator that was cut off concludes it lost, although it is not.
    await fleet.ask("coordinator.node.list", messages.ListRequest())
    coordinator = await fleet.coordinator()
    await coordinator.commit(commands.lost, messages.NodeRequest(node=victim, reason="a mistake"), victim)
    await stage.seen(types.NodeLost, lambda event: event.node == victim)
    epoch = stage.state.nodes[victim].epoch
    await until(lambda: stage.state.nodes[victim].epoch != epoch and stage.state.nodes[victim].available)
    if not stage.state.nodes[victim].managed:
        await until(lambda: stage.state.caches.held(stage.state.nodes[victim]) == held)


async def test_replicas_agree_and_hit_more_than_round_robin(stage: Stage, fleet: Fleet) -> None:
    work = conversations(sessions=20, turns=4, prompts=3)
    await stage.traffic.run(work, concurrency=8, progress=lambda: None)
    totals = stage.traffic.totals
    assert (totals.requests, totals.failed) == (len(work), 0)
    assert totals.hit_rate > round_robin_hit_rate(work, nodes=3, capacity_blocks=4096, block_size=16)
    routers = await fleet_routers(fleet)
    for writer in routers:
        await fleet.ask(f"router.{writer}.flush", messages.StatusRequest())
    with anyio.fail_after(10):
        while True:
            # At rest they come to one sequence; until then the nodes still report.
            statuses = [await fleet.ask(f"router.{w}.status", messages.StatusRequest(digest=True)) for w in routers]
            if {status["sequence"] for status in statuses} == {stage.state.sequence}:
                break
            await anyio.sleep(0.02)
    assert {status["digest"] for status in statuses} == {digest(stage.state)}
    assert all(status["unrecorded"] == 0 for status in statuses)


async def fleet_routers(fleet: Fleet) -> list[str]:
    answers = await instances(fleet.client, "kvplane-router", seconds=ANSWER_SECONDS, enough=2)
    return [metadata["writer"] for metadata in answers]


async def test_the_services_are_seen_as_micro_services(stage: Stage, fleet: Fleet) -> None:
    await stage.traffic.route(conversations(sessions=1, turns=1)[0])
    answer = await fleet.client.request("$SRV.STATS.kvplane-coordinator", timeout=2)
    stats = msgspec.json.decode(answer.data)
    assert {endpoint["name"] for endpoint in stats["endpoints"]} >= {"node_register", "cache_admit", "policy_set"}
    info = msgspec.json.decode((await fleet.client.request("$SRV.INFO.kvplane-router", timeout=2)).data)
    route = next(endpoint for endpoint in info["endpoints"] if endpoint["name"] == "route")
    assert (route["subject"], route["queue_group"]) == ("kv.default.route", "q")


async def test_the_policy_changes_on_every_router_at_one_sequence(stage: Stage, fleet: Fleet) -> None:
    answer = await fleet.ask("coordinator.policy.set", messages.PolicyRequest(policy="least_loaded"))
    await until(lambda: stage.state.sequence >= answer["sequence"])
    work = conversations(sessions=1, turns=1)[0]
    policies = set()
    for _ in range(8):
        policies.add((await stage.traffic.route(work)).policy)
        await anyio.sleep(0.01)
    assert policies == {"least_loaded"}


async def test_a_router_whose_policy_fails_goes_on_counts_it_and_says_so(fleet: Fleet) -> None:
    allow(["tests.support.odd_policies"])
    await fleet.coordinator()
    router = await fleet.router()
    await fleet.nodes(NodeConfig(name="a"))
    await fleet.ask("coordinator.policy.set", messages.PolicyRequest(policy="tests.support.odd_policies:raises"))
    await until(lambda: router.state.policy == "tests.support.odd_policies:raises" and "a" in router.state.nodes)
    logs.configure("warning")
    with capture_logs() as logged:
        for count in (1, 2):
            answer = await fleet.ask("route", messages.RouteRequest(model="sim", prompt="hello"), messages.RouteAnswer)
            assert (answer.node, answer.policy) == ("a", "least_loaded")
            status = await router.status(messages.StatusRequest())
            assert (status.policy_failures, status.policy_failure) == (count, "ZeroDivisionError: ")
    warnings = [entry for entry in logged if entry["event"] == "policy_failed"]
    assert [(entry["policy"], entry["instead"]) for entry in warnings] == [
        ("tests.support.odd_policies:raises", "least_loaded")
    ]


async def test_the_router_goes_on_while_the_log_is_away(fleet: Fleet, client: Client) -> None:
    """The log answers no more, the connection does: a stream that is gone stands for any outage behind the server."""
    await fleet.coordinator()
    router = await fleet.router()
    await fleet.ask(
        "coordinator.node.register",
        messages.RegisterRequest(node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 8}),
    )
    await until(lambda: "a" in router.state.nodes)
    await client.jetstream().delete_stream("KV_default")
    request = messages.RouteRequest(model="m", hashes=pack_hashes([1, 2]))
    await fleet.ask("route", request, messages.RouteAnswer)
    await until(lambda: router.degraded)
    answer = await fleet.ask("route", request, messages.RouteAnswer)
    assert (answer.node, answer.degraded) == ("a", True)
    status = await router.status(messages.StatusRequest())
    assert status.waiting == 2
    assert status.unrecorded == 0


async def test_each_decision_is_recorded_behind_its_answer_though_nothing_comes_after_it(fleet: Fleet) -> None:
    await fleet.coordinator()
    router = await fleet.router()
    register = messages.RegisterRequest(node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 8})
    await fleet.ask("coordinator.node.register", register)
    for _ in range(3):
        answer = await fleet.ask("route", messages.RouteRequest(model="m", hashes=pack_hashes([1])))
        await until(lambda: answer["request"] in router.state.load.running)  # noqa: B023 - awaited at once


async def test_a_router_that_is_stopped_leaves_nothing_unrecorded(fleet: Fleet, client: Client) -> None:
    await fleet.coordinator()
    register = messages.RegisterRequest(node="a", address="x", models=["m"], block_size=16, capacity_blocks={"gpu": 8})
    await fleet.ask("coordinator.node.register", register)
    answered: list[str] = []

    async def ask_on() -> None:
        with suppress(NoAnswer):
            while True:
                answer = await fleet.ask(
                    "route", messages.RouteRequest(model="m", hashes=pack_hashes([1]), session="s")
                )
                answered.append(answer["request"])

    router = Router(await fleet.connect("router"), fleet.name)
    async with anyio.create_task_group() as group:
        await group.start(router.run)
        async with anyio.create_task_group() as askers:
            for _ in range(16):
                askers.start_soon(ask_on)
            await until(lambda: len(answered) > 300)
            group.cancel_scope.cancel()
    recorded = set()

    def collect(message: codec.Message) -> None:
        for event in codec.decode(fleet.name, message).events:
            recorded.add(getattr(event, "request", ""))

    await replay(client, fleet.name, collect)
    assert set(answered) <= recorded
