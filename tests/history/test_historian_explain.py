"""Every decision of real routers, made again from the log, is the one that was recorded; a changed policy is found out."""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events import codec, types
from kvplane.projections.fleet import FleetState
from kvplane.services.demo.workload import conversations
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import ServiceFault
from kvplane.services.routing import policies
from kvplane.services.routing.explain import Past
from kvplane.services.rpc.client import ask, instances
from kvplane.services.simulation.simnode import NodeConfig, run_nodes
from tests.support.historians import historian, messages_of, question

if TYPE_CHECKING:
    from pathlib import Path

    from kvplane.events.codec import Message
    from kvplane.services.embedded.server import Server
    from kvplane.services.routing.explain import Explanation
    from kvplane.services.simulation.trace import Work
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

NODE = {"prefill_speed": 20_000.0, "decode_speed": 1000.0, "capacity_blocks": 700, "pulse_seconds": 0.1}
POLICIES: list[tuple[str, dict[str, float]]] = [
    ("cascade", {}),
    ("threshold", {}),
    ("ttft", {"session_seconds": 0.2}),
    ("e2", {}),
    ("ttft", {}),
    ("blocks", {}),
]


def config(name: str, **changed: Any) -> NodeConfig:
    return NodeConfig(name=name, **{**NODE, **changed})


class Clients:
    """Clients that ask routers, run what they were told, and sometimes ask again."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.rng = random.Random(seed)
        self.served = 0

    async def one(self, work: Work) -> None:
        rng = self.rng
        exclude = rng.sample(["node-1", "node-2", "node-3", "who"], 2) if rng.random() < 0.15 else []
        request = messages.RouteRequest(
            model="sim", hashes=work.hashes, tokens_count=work.tokens, session=work.session or "", exclude=exclude,
            dry_run=rng.random() < 0.05,
        )  # fmt: skip
        for _ in range(3):
            with suppress(ServiceFault):
                answer = await self.fleet.ask("route", request, messages.RouteAnswer)
                if request.dry_run:
                    return
                run = messages.ServeRequest(
                    request=answer.request, hashes=work.hashes, tokens=work.tokens, output_tokens=work.output_tokens
                )
                # A node that was killed gives no answer; then another one is asked for, as the same request.
                with suppress(ServiceFault):
                    await ask(self.fleet.client, answer.address, run, messages.ServeAnswer, seconds=1)
                    self.served += 1
                    return
                request = messages.RouteRequest(
                    model="sim", hashes=work.hashes, tokens_count=work.tokens, session=work.session or "",
                    exclude=[answer.node], request=answer.request,
                )  # fmt: skip
            await anyio.sleep(0.02)

    async def burst(self, work: list[Work]) -> None:
        async with anyio.create_task_group() as group:
            for each in work:
                group.start_soon(self.one, each)
                if self.rng.random() < 0.3:
                    await anyio.sleep(self.rng.random() / 50)


async def live(fleet: Fleet, *, seed: int) -> Clients:
    """A few hundred requests in bursts, while a node is killed, another cordoned, and the policy changed again and again."""
    await fleet.coordinator()
    await fleet.router()
    await fleet.router()
    await fleet.nodes(config("node-1"), config("node-2", max_active=3), config("node-4", cache_mode="managed"))
    clients = Clients(fleet, seed)
    work = conversations(sessions=40, turns=6, prompts=4, seed=seed)
    async with anyio.create_task_group() as group:
        doomed = anyio.CancelScope()

        async def run_doomed(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            with doomed:
                await run_nodes(await fleet.connect("doomed"), fleet.name, [config("node-3")], task_status=task_status)

        await group.start(run_doomed)
        bursts = [work[at : at + 12] for at in range(0, len(work), 12)]
        for number, burst in enumerate(bursts):
            if number % 3 == 1:
                name, parameters = POLICIES[number // 3 % len(POLICIES)]
                await fleet.ask("coordinator.policy.set", messages.PolicyRequest(policy=name, parameters=parameters))
            if number == len(bursts) // 2:
                doomed.cancel()
            if number == len(bursts) // 2 + 3:
                await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="node-2", reason="test"))
            if number == len(bursts) // 2 + 5:
                await fleet.ask("coordinator.node.uncordon", messages.NodeRequest(node="node-2"))
            await clients.burst(burst)
    return clients


class Judge:
    """Explains all decisions of one router on one way along the log."""

    def __init__(self, router: str, own: list[types.RequestRouted]) -> None:
        self.past = Past(FleetState("default"), router, [*own, own[-1]])
        self.past._own = []
        self.own = own
        self.found: list[tuple[types.RequestRouted, Explanation]] = []

    def explain_here(self) -> None:
        """Explain what was decided at this sequence, and count it afterwards, as the router did."""
        past = self.past
        while len(self.found) < len(self.own) and self.own[len(self.found)].applied <= past.state.sequence:
            past.event = self.own[len(self.found)]
            self.found.append((past.event, past.explain()))
            past._own.append(past.event)

    def read(self, message: Message) -> None:
        self.explain_here()
        self.past.apply(message)


def judged(log: list[Message]) -> list[tuple[types.RequestRouted, Explanation]]:
    """All decisions of a log, with what comes of them now."""
    own: dict[str, list[types.RequestRouted]] = {}
    for message in log:
        if ".access." in message.subject:
            commit = codec.decode("default", message)
            decisions = [event for event in commit.events if isinstance(event, types.RequestRouted)]
            if decisions:
                own.setdefault(commit.place.name, []).extend(decisions)
    found = []
    for router, decisions in own.items():
        judge = Judge(router, decisions)
        for message in log:
            judge.read(message)
        judge.explain_here()
        assert len(judge.found) == len(decisions)
        found += judge.found
    return found


async def test_every_decision_of_a_lively_fleet_agrees(server: Server, fleet: Fleet, tmp_path: Path) -> None:
    clients = await live(fleet, seed=3)
    for router in await instances(fleet.client, "kvplane-router", seconds=5, enough=2):
        await fleet.ask(f"router.{router['writer']}.flush", messages.StatusRequest())
    log = await messages_of(fleet.client)
    found = judged(log)
    differing = [(event, explanation.differences) for event, explanation in found if explanation.differences]
    assert differing == []
    # Or little would have been made again.
    assert len(found) > 200
    assert clients.served > 150
    assert {event.policy for event, _ in found} >= {name for name, _ in POLICIES}
    assert any(event.exclude for event, _ in found)
    assert len({event.request for event, _ in found}) < len(found), "no request was sent twice"
    assert any(weight.on_the_way for _, explanation in found for weight in explanation.candidates)
    assert any(weight.match > weight.match_on_log for _, explanation in found for weight in explanation.candidates)
    state = FleetState("default")
    for message in log:
        state.apply(message)
    assert state.nodes["node-3"].lost is not None
    # The historian's own way there gives the same.
    async with historian(server.url, tmp_path / "h"):
        for event, explanation in random.Random(1).sample(found, 8):
            answer = await question(fleet.client, "explain", messages.ExplainRequest(request=event.request))
            assert answer["verdict"] == "agrees"
            if answer["applied"] == event.applied and len(answer["decisions"]) == 1:
                again = answer["recomputed"]
                assert (again["node"], again["policy"]) == (explanation.node, explanation.policy)
                assert [weight["cost"] for weight in again["candidates"]] == pytest.approx(
                    [weight.cost for weight in explanation.candidates]
                )


async def test_a_policy_that_was_changed_since_is_found_out(
    server: Server, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "modules" / "planted_for_test.py"
    module.parent.mkdir()
    module.write_text("def score(view, request, parameters):\n    return view.active * 10.0 + view.match * 0.0 + 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.setattr(policies, "_allowed", {"planted_for_test"})
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    await fleet.coordinator()
    await fleet.router()
    await fleet.nodes(config("node-1"), config("node-2"))
    await fleet.ask("coordinator.policy.set", messages.PolicyRequest(policy="planted_for_test:score"))
    clients = Clients(fleet, 1)
    await clients.burst(conversations(sessions=10, turns=1, prompts=1, seed=1))
    log = await messages_of(fleet.client)
    found = judged(log)
    assert len(found) >= 8
    assert not any(explanation.differences for _, explanation in found)
    event = next(event for event, _ in found if len({candidate.cost for candidate in event.candidates}) == 2)
    other = next(candidate.node for candidate in event.candidates if candidate.node != event.node)
    costs = {candidate.node: candidate.cost for candidate in event.candidates}
    options = {"modules": ["planted_for_test"]}
    async with historian(server.url, tmp_path / "h", **options):
        answer = await question(fleet.client, "explain", messages.ExplainRequest(request=event.request))
        assert answer["verdict"] == "agrees"
    # Now it prefers what is busy.
    module.write_text("def score(view, request, parameters):\n    return 1000.0 - view.active * 10.0\n")
    async with historian(server.url, tmp_path / "h", **options):
        answer = await question(fleet.client, "explain", messages.ExplainRequest(request=event.request))
        assert answer["verdict"] == "differs"
        differences = {
            each["what"]: (each["recorded"], each["recomputed"]) for each in answer["recomputed"]["differences"]
        }
        assert differences["node"] == (event.node, other)
        assert differences[f"cost of {event.node}"] == (costs[event.node], 1001.0 - costs[event.node])
        assert differences[f"cost of {other}"] == (costs[other], 1001.0 - costs[other])
        assert set(differences) - {"match"} == {"node", f"cost of {event.node}", f"cost of {other}"}
    # And now it can't be run any more.
    module.write_text("def score(view, request, parameters):\n    raise ValueError('gone')\n")
    async with historian(server.url, tmp_path / "h", **options):
        answer = await question(fleet.client, "explain", messages.ExplainRequest(request=event.request))
        assert answer["verdict"] == "differs"
        assert answer["recomputed"]["failure"] == "ValueError: gone"
        differences = {
            each["what"]: (each["recorded"], each["recomputed"]) for each in answer["recomputed"]["differences"]
        }
        assert differences["policy"] == ("planted_for_test:score", "least_loaded")
