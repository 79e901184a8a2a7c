"""Data-parallel ranks: each becomes a node, all by one adapter, or each by one of its own with credentials of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from kvplane.services.dataplane.complete import Completer
from kvplane.services.engines.attachment import Attachment
from kvplane.services.engines.facts import Engine, Facts, Source
from kvplane.services.protocol.errors import EngineUnfit
from tests.support.fake_ranks import Rank, ranks
from tests.support.waiting import until
from tests.support.with_credentials import NAME, guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvplane.services.embedded.server import Server
    from kvplane.services.roles.coordinator import Coordinator
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def attached(*options: str, log: Path) -> AsyncIterator[None]:
    """The command; it must not end by itself."""
    command = [sys.executable, "-m", "kvplane", "attach", "vllm", "--pulse-seconds", "0.2", *options]
    with log.open("ab") as output:
        process = await anyio.open_process(command, stdout=output, stderr=output, env={**os.environ, "NO_COLOR": "1"})
    try:
        yield
        assert process.returncode is None, log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def held(coordinator: Coordinator, node: str) -> set[int]:
    if node not in coordinator.state.nodes:
        return set()
    found = coordinator.state.nodes[node]
    return set(coordinator.state.caches.index(found.model).held(found.slots["gpu"]))


async def traffic(coordinator: Coordinator, of: dict[str, Rank]) -> None:
    """Each rank caches something else, and its node is known to hold that."""
    for number, rank in enumerate(of.values()):
        for prompt in range(3):
            rank.cache.request([10 * number + prompt] * 3 * rank.cache.size)
            await rank.publish()
    for node, rank in of.items():
        await until(lambda node=node, rank=rank: held(coordinator, node) == rank.cache.held(), 60)  # type: ignore[misc]


async def router_sends(fleet: Fleet, api: Rank, *, rank: str) -> None:
    """A request names the rank that it is for."""
    await fleet.router()
    asked = api.api.requests
    asked.clear()
    async with Completer(fleet.client, fleet.name) as completer:
        done = await completer.complete({"model": "m", "prompt": [1, 2, 3]})
    assert (done.decision.node, done.decision.rank) == ("second", rank)
    assert [headers["X-data-parallel-rank"] for _, headers in asked] == [rank]


async def test_all_ranks_become_nodes_or_the_one_that_is_named(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    coordinator = await fleet.coordinator()
    log = tmp_path / "attach.log"
    async with ranks(2) as engine:
        where = ("--engine", engine[0].url, "--server", server.url)
        async with attached(*where, "--node", "e", log=log):
            await traffic(coordinator, {"e-dp0": engine[0], "e-dp1": engine[1]})
        async with attached(*where, "--node", "second", "--rank", "1", log=log):
            await traffic(coordinator, {"second": engine[1]})
            assert coordinator.state.nodes["second"].registered.labels["rank"] == "1"
            # The load is that of the rank, too.
            await until(lambda: coordinator.liveness.heartbeats["second"].active == 50)
            others = [node for name, node in coordinator.state.nodes.items() if name != "second"]
            await until(lambda: all(node.lost for node in others), 30)
            await router_sends(fleet, engine[0], rank="1")
        ends = ("--events", engine[1].endpoint, "--replay", engine[1].replay_endpoint)
        async with attached(*where, "--node", "third", "--rank", "1", *ends, log=log):
            await traffic(coordinator, {"third": engine[1]})
            await until(lambda: coordinator.liveness.heartbeats["third"].active == 50)
    assert set(coordinator.state.nodes) == {"e-dp0", "e-dp1", "second", "third"}


async def test_each_rank_has_an_adapter_with_credentials_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "attach.log"
    async with guarded(tmp_path) as fleet, ranks(2) as engine:
        coordinator = await fleet.coordinator()
        common = ("--engine", engine[0].url, "--fleet", NAME, "--server", fleet.url, "--ca", str(fleet.held.ca))

        def login(node: str) -> tuple[str, ...]:
            return *common, "--node", node, "--credentials", str(fleet.held.seed_file(NAME, "node", node))

        async with (
            attached(*login("node-a"), "--rank", "0", log=log),
            attached(*login("node-b"), "--rank", "1", log=log),
        ):
            await traffic(coordinator, {"node-a": engine[0], "node-b": engine[1]})
        command = [sys.executable, "-m", "kvplane", "attach", "vllm", *login("node-a")]
        refused = await anyio.run_process(command, check=False, stderr=subprocess.PIPE)
        assert refused.returncode == 1
        assert b"data-parallel ranks 0, 1" in refused.stderr
        assert (
            b"start one adapter a rank, each with --rank, and with --node and --credentials of its own"
            in refused.stderr
        )
        assert coordinator.state.skipped == {}
        assert "iolation" not in log.read_text() + fleet.server.log.read_text()


async def test_what_is_said_of_a_rank_and_can_not_be_is_refused() -> None:
    async with ranks(3) as engine, Engine("vllm", engine[0].url) as http:
        facts = await http.facts()
    assert [source.rank for source in facts.sources] == [0, 1, 2]
    with pytest.raises(EngineUnfit, match="no data-parallel rank 3; it has 0, 1, 2: give --rank"):
        Attachment(node="n", rank=3).sources(facts)
    with pytest.raises(EngineUnfit, match="no data-parallel rank 3"):
        Attachment(node="n", rank=3, events="tcp://*:1").sources(facts)
    with pytest.raises(EngineUnfit, match="--replay is the endpoint of one rank, and the engine has 0, 1, 2"):
        Attachment(node="n", replay="tcp://*:2").sources(facts)
    [one] = Attachment(node="n", rank=2, replay="tcp://*:2", one_login=True).sources(facts)
    assert one == Source(rank=2, events=engine[2].endpoint, replay="tcp://*:2")


def test_an_engine_that_does_not_tell_its_ranks_is_believed() -> None:
    """As those before `/kv_event_sources` do."""
    wanted = Attachment(node="n", rank=1, events="tcp://*:5558", replay="tcp://*:5568", one_login=True)
    assert wanted.sources(Facts(models=["m"])) == [Source(rank=1, events="tcp://*:5558", replay="tcp://*:5568")]
