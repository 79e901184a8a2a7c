"""Every endpoint, and everything that is published, by its own schema: nothing that comes is a defect."""

from __future__ import annotations

import json
import random
from collections import Counter
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import anyio
import pytest

from kvplane.events import codec
from kvplane.events.log.follow import replay
from kvplane.events.log.stream import open_stream
from kvplane.events.types import FormatRaised, RequestCompleted
from kvplane.projections.digest import digest
from kvplane.services.history.historian import Historian
from kvplane.services.protocol.document import PUBLISHED
from kvplane.services.protocol.endpoints import ENDPOINTS
from kvplane.services.protocol.messages import ListRequest, PolicyRequest
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.hostile import Hostile, bodies
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvplane.events.codec import Message
    from kvplane.services.protocol.endpoints import Spec
    from kvplane.services.roles.coordinator import Coordinator
    from kvplane.services.roles.router import Router
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

ROUNDS = 8
"""Requests an endpoint, in JSON and in MessagePack each."""
SIDE_BY_SIDE = 32
KNOWN: dict[str, Any] = {
    "model": "sim", "node": "a", "models": ["sim"], "block_size": 16, "capacity_blocks": {"gpu": 64}, "address": "x",
    "tokens": [1, 2, 3], "request": "r", "session": "s", "at": 3, "first": 2, "second": 4, "sql": "SELECT 1", "policy": "ttft",
    "result": "none", "offset": 0, "epoch": 2, "table": "whatif_runs", "data": "", "exclude": [], "sequence": 2,
}  # fmt: skip
"""Values that are known to the fleet, so that requests get further than its first look."""


class Scene(NamedTuple):
    """One of every service, on one server, in this process."""

    fleet: Fleet
    coordinator: Coordinator
    router: Router
    historian: Historian

    def subjects(self) -> Iterator[tuple[Spec, str]]:
        """Every endpoint, and where it is asked."""
        names = {"router": self.router.writer, "coordinator": self.coordinator.writer, "historian": self.historian.id}
        for spec in ENDPOINTS:
            yield spec, spec.at(self.fleet.name, names.get(spec.server, "")).replace("*", "a")

    async def check_well(self) -> None:
        """All services go on, and have the same state."""
        services = (self.coordinator, self.router, self.historian)
        await self.fleet.ask("coordinator.node.list", ListRequest())
        assert [service.readiness().reason for service in services] == ["", "", ""]
        # A node may be about to change.
        await self.fleet.ask("coordinator.policy.set", PolicyRequest(policy="cascade"))
        await until(lambda: self.router.state.policy == self.coordinator.state.policy == "cascade")
        at = max(self.router.state.sequence, self.coordinator.state.sequence)
        await until(lambda: min(self.router.state.sequence, self.coordinator.state.sequence) >= at)
        if self.router.state.sequence == self.coordinator.state.sequence:
            assert digest(self.router.state) == digest(self.coordinator.state)


@pytest.fixture
async def scene(fleet: Fleet, tmp_path: Path) -> Scene:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    # As fast as an answer: what takes long is no defect here.
    fast: dict[str, Any] = {"prefill_speed": 1e12, "decode_speed": 1e12}
    await fleet.nodes(NodeConfig(name="a", **fast), NodeConfig(name="m", model="managed", cache_mode="managed", **fast))
    historian = Historian(await fleet.connect("historian"), fleet.name, tmp_path / "history", servers=[fleet.url])
    await fleet.start(historian.run)
    return Scene(fleet, coordinator, router, historian)


async def test_no_request_is_a_defect(scene: Scene) -> None:
    fleet, hostile = scene.fleet, Hostile(random.Random(7))
    asked = [
        (spec.name, subject, body)
        for spec, subject in scene.subjects()
        for _ in range(ROUNDS)
        for body in bodies(hostile.request(spec.request.__name__, KNOWN))
        if len(body) < fleet.client.max_payload
    ]
    hostile.rng.shuffle(asked)
    found = Counter[str]()
    defects: list[tuple[str, bytes, Any]] = []

    async def ask_some() -> None:
        while asked:
            name, subject, body = asked.pop()
            answer = await fleet.client.request(subject, body, timeout=60)
            status = (answer.headers or {}).get("Nats-Service-Error-Code", "")
            found[status] += 1
            if status == "500":
                defects.append((name, body[:300], answer.data))
            elif status:
                refused = json.loads(answer.data)
                assert len(refused["error"]) > 15, (name, refused)

    async with anyio.create_task_group() as group:
        for _ in range(SIDE_BY_SIDE):
            group.start_soon(ask_some)
    assert defects == []
    # Some went through, so that more than the readers of requests were attacked.
    assert found[""] > len(ENDPOINTS), found
    await scene.router.writers.flush()
    await scene.check_well()
    # What was taken is what every reader takes.
    assert set(scene.coordinator.state.skipped) <= {"stale"}, scene.coordinator.state.skipped
    log: list[Message] = []
    # One of the requests may have been to purge it.
    first = (await open_stream(fleet.client.jetstream(), fleet.name)).first_seq
    await replay(fleet.client, fleet.name, log.append, applied=first - 1)
    for message in log:
        if b"RequestCompleted" in message.body:
            for event in codec.decode(fleet.name, message).events:
                assert not isinstance(event, RequestCompleted) or isfinite(event.ttft + event.duration)


async def test_nothing_that_is_published_is_a_defect(scene: Scene) -> None:
    fleet, hostile = scene.fleet, Hostile(random.Random(7))
    names = {"{node}": "a", "{model}": "sim", "{writer}": "stranger"}
    count = scene.coordinator.state.sequence
    for each in PUBLISHED:
        subject = ".".join(names.get(word, word) for word in ("kv", fleet.name, *each.subject.split(".")))
        # A newer format ends those that don't know it, and is for those to say who may.
        kinds = [kind for kind in get_args(each.form) or (each.form,) if kind is not FormatRaised]
        for _ in range(4 * ROUNDS):
            one = hostile.request(hostile.rng.choice(kinds).__name__, KNOWN)
            for body in bodies([one] if each.stored else one):
                if len(body) < fleet.client.max_payload:
                    count += each.stored
                    await fleet.client.publish(subject, body)
    await until(lambda: scene.coordinator.state.sequence >= count, seconds=30)
    await scene.check_well()
    assert sum(scene.coordinator.state.skipped.values()) > count // 4
