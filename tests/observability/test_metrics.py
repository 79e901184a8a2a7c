"""Metrics of real services, scraped over HTTP: what they count is what the log says."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from prometheus_client.openmetrics import exposition
from prometheus_client.parser import text_string_to_metric_families as plain_families
from prometheus_client.registry import CollectorRegistry
from structlog.testing import capture_logs

from kvplane.events import codec, types
from kvplane.events.durations import MICRO, Durations
from kvplane.events.hashing import pack_hashes
from kvplane.events.log.connection import connected, errors_of
from kvplane.events.subjects import subject
from kvplane.projections.fleet import FleetState
from kvplane.services.cli import up
from kvplane.services.demo.workload import conversations
from kvplane.services.observability import catalog
from kvplane.services.observability.page import make
from kvplane.services.observability.scrape import Scrape
from kvplane.services.observability.web import observing
from kvplane.services.process import logs
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import HttpFailed
from kvplane.services.simulation.simnode import NodeConfig, SimNodes
from tests.support.historians import historian, messages_of, question
from tests.support.http_of_services import OPENMETRICS, Http, Metrics, observed
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from kvplane.services.embedded.server import Server
    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
FAST: dict[str, Any] = {"prefill_speed": 1e6, "decode_speed": 1e5, "pulse_seconds": 0.2}


async def work_through(fleet: Fleet) -> list[str]:
    """Conversations through router and nodes, a managed node filled, and requests that nobody serves; codes of the refusals."""
    for work in conversations(sessions=6, turns=3, seed=3):
        request = messages.RouteRequest(
            model="sim", hashes=work.hashes, tokens_count=work.tokens, session=work.session or ""
        )
        routed = await fleet.ask("route", request, messages.RouteAnswer)
        serve = messages.ServeRequest(request=routed.request, hashes=work.hashes, tokens=work.tokens, output_tokens=2)
        await fleet.ask(routed.address.removeprefix("kv.default."), serve, messages.ServeAnswer)
    small = pack_hashes(range(1, 9))
    for first in range(4):
        await fleet.ask(
            "coordinator.cache.admit", messages.AdmitRequest(model="small", hashes=pack_hashes([first + 1]))
        )
    refused = [
        await fleet.refused("route", messages.RouteRequest(model="nobody", tokens=[1])),
        await fleet.refused("route", messages.RouteRequest(model="sim")),
        await fleet.refused("coordinator.cache.admit", messages.AdmitRequest(model="small", hashes=small)),
    ]
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="node-2"))
    await fleet.client.publish("kv.default.cache.node-1", b"no commit")
    old = types.BlocksStored("node-1", 1 << 40, 1, small)
    await fleet.client.publish("kv.default.cache.node-1", codec.encode([old]))
    return refused


async def test_what_is_counted_is_what_the_log_says(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    nodes = SimNodes(
        [await fleet.connect("nodes")],
        fleet.name,
        [NodeConfig(name="node-1", **FAST), NodeConfig(name="node-2", **FAST)],
    )
    small = messages.RegisterRequest(
        node="small", address="x", models=["small"], block_size=16, capacity_blocks={"gpu": 3}, cache_mode="managed"
    )
    async with anyio.create_task_group() as group, historian(server.url, tmp_path / "history") as keeper:
        await group.start(nodes.run)
        await fleet.ask("coordinator.node.register", small)
        async with observed(coordinator, router, nodes, keeper) as http:
            refused = await work_through(fleet)
            await question(fleet.client, "sql", messages.SqlRequest(sql="SELECT 1"))
            with pytest.raises(Exception, match="SELECT"):
                await question(fleet.client, "sql", messages.SqlRequest(sql="DROP TABLE commits"))
            for writer in [*router.writers, *(writer for node in nodes.nodes for writer in node.writers)]:
                await writer.flush()
            log = await messages_of(fleet.client)
            await until(lambda: keeper.ingest.stored == coordinator.state.sequence == router.state.sequence == len(log))
            metrics = await http.metrics()
        group.cancel_scope.cancel()
    state = FleetState(fleet.name)
    applied = [state.apply(message) for message in log]
    events = [event for one in applied if one.commit is not None for event in one.commit.events]
    routed = [event for event in events if isinstance(event, types.RequestRouted)]
    assert len(routed) == 18
    assert state.skipped.keys() == {"invalid", "stale_epoch"}
    assert metrics("kvplane_router_decisions_total") == len(routed)
    assert metrics("kvplane_router_decision_seconds_count") == len(routed)
    assert metrics("kvplane_router_matched_blocks_total") == sum(event.match for event in routed) > 0
    most = [min(event.blocks, (event.tokens - 1) // 16) for event in routed]
    assert metrics("kvplane_router_asked_blocks_total") == sum(most)
    sessions = Counter(event.reason.split()[0] for event in events if isinstance(event, types.SessionAssigned))
    by_outcome = metrics.by("kvplane_router_session_decisions_total", "outcome")
    assert by_outcome.get("new", 0) == sessions["new"] == 6
    assert sum(by_outcome.values()) == len(routed)
    # Refusals and admissions, by outcome.
    assert refused == ["unknown_model", "bad_request", "no_room"]
    asked = {"service": "router", "endpoint": "route"}
    assert metrics.by("kvplane_requests_total", "outcome", **asked) == {"ok": 18, "unknown_model": 1, "bad_request": 1}
    assert metrics("kvplane_request_seconds_count", **asked) == 20
    assert metrics.by("kvplane_requests_total", "outcome", endpoint="cache_admit") == {"ok": 4, "no_room": 1}
    assert metrics.by("kvplane_requests_total", "outcome", endpoint="sql") == {"ok": 1, "bad_sql": 1}
    # The fold, alike on all three.
    for service in ("router", "coordinator", "historian"):
        assert metrics.by("kvplane_fold_skipped_commits_total", "reason", service=service) == state.skipped
        assert metrics("kvplane_fold_commits_total", service=service) == state.commits
        assert metrics("kvplane_log_applied_sequence", service=service) == len(log)
        assert metrics("kvplane_log_lag_commits", service=service) == 0
        assert metrics("kvplane_log_applied_timestamp_seconds", service=service) == log[-1].time / 1e9
    # Commits by who wrote them.
    writers = Counter(re.split("[^a-z]", message.headers["Kv-Writer"])[0] for message in log if message.headers)
    for service, role in (("router", "router"), ("coordinator", "coordinator"), ("simnode", "node")):
        assert metrics("kvplane_log_appended_commits_total", service=service) == writers[role] > 0
        assert metrics("kvplane_log_append_seconds_count", service=service) == writers[role]
    completed = sum(isinstance(event, types.RequestCompleted) for event in events)
    stored = sum(isinstance(event, types.BlocksStored | types.BlocksRemoved) for event in events)
    assert metrics("kvplane_log_appended_events_total", service="simnode") == completed + stored
    # Nodes and their caches.
    assert metrics.by("kvplane_fleet_nodes", "state", service="router") == {"up": 2, "cordoned": 1}
    assert metrics("kvplane_node_used_blocks", node="small", tier="gpu") == 3
    assert metrics("kvplane_node_capacity_blocks", node="small", tier="gpu") == 3
    for node in ("node-1", "node-2"):
        held = state.caches.held(state.nodes[node], "gpu")
        assert metrics("kvplane_node_used_blocks", node=node) == held
        assert metrics("kvplane_simnode_used_blocks", node=node) == held
    assert metrics("kvplane_historian_stored_sequence") == len(log)
    assert metrics("kvplane_historian_rows_total") == len(log) + len(events)
    assert metrics("kvplane_historian_disk_free_bytes") > 1 << 20
    assert metrics("process_resident_memory_bytes") > 1 << 20


async def test_names_and_values_follow_the_rules_in_both_formats(fleet: Fleet) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    await coordinator.compaction.take()
    async with observed(coordinator, router) as http:
        status, kind, text = await http.get("/metrics")
        assert (status, kind.split(";")[0]) == (200, "text/plain")
        plain = list(plain_families(text))
        _, kind, text = await http.get("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})
        assert kind.startswith("application/openmetrics-text")
        metrics = Metrics(text)
    own = [family for family in metrics.families if family.name.startswith("kvplane_")]
    assert {family.name for family in own} == {
        re.sub("_total$", "", family.name) for family in plain if family.name.startswith("kvplane_")
    }
    assert metrics("kvplane_snapshots_taken_total") == 1
    for family in own:
        assert re.fullmatch("[a-z][a-z0-9_]*", family.name)
        assert (family.unit or "none") in {"none", "seconds", "bytes"}
        # Base units only, and at the end.
        assert not re.search("_(ms|us|millis|micros|minutes|kb|mb|percent)(_|$)", family.name)
        assert not re.search("(seconds|bytes)_(?!total)", family.name)
        if family.type == "counter":
            assert {sample.name for sample in family.samples} == {f"{family.name}_total"}
        known = catalog.BY_NAME.get(family.name) or catalog.BY_NAME[f"{family.name}_total"]
        assert known.kind == family.type
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(known.labels)


def test_every_metric_is_documented() -> None:
    # Made again with: python -m kvplane.services.observability > docs/metrics.md
    assert make() == (ROOT / "docs" / "metrics.md").read_text()
    for family in catalog.BY_NAME.values():
        assert (family.kind == "counter") == family.name.endswith("_total")
        assert family.kind != "histogram" or family.name.endswith("_seconds")


def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads((ROOT / "compose" / "grafana" / "dashboards" / "kvplane.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 10
    suffixes = ("", "_bucket", "_sum", "_count")
    known = {
        family.name + suffix
        for family in catalog.BY_NAME.values()
        for suffix in (suffixes[1:] if family.kind == "histogram" else suffixes[:1])
    }
    for query in [*queries, board["templating"]["list"][1]["query"]]:
        used = set(re.findall(r"\bkvplane_\w+", query))
        assert used
        assert used <= known, query
    labels = {label for query in queries for label in re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", query)}
    assert labels <= {label for family in catalog.BY_NAME.values() for label in family.labels}


def test_what_is_not_in_the_catalog_is_not_told() -> None:
    scrape = Scrape({"fleet": "f", "service": "s"})
    with pytest.raises(KeyError):
        scrape.put("kvplane_other_total", 1)
    with pytest.raises(KeyError, match="color"):
        scrape.put("kvplane_ready", 1, color="red")


def test_a_histogram_counts_what_took_up_to_each_bound() -> None:
    durations = Durations(MICRO)
    for took in (0.0, MICRO[0], MICRO[0] * 1.01, MICRO[3], 0.7, 5.0):
        durations.add(took)
    scrape = Scrape({"fleet": "f", "service": "router"})
    scrape.put_durations("kvplane_router_decision_seconds", durations)

    class Once(CollectorRegistry):
        def collect(self) -> Any:
            return scrape.families()

    metrics = Metrics(exposition.generate_latest(Once()).decode())  # type: ignore[no-untyped-call]
    counts = metrics.by("kvplane_router_decision_seconds_bucket", "le")
    assert (counts["1e-05"], counts["2e-05"], counts["6e-05"], counts["1.0"], counts["+Inf"]) == (2, 3, 4, 5, 6)
    assert metrics("kvplane_router_decision_seconds_sum") == pytest.approx(5.7 + 2.01 * MICRO[0] + MICRO[3])


async def test_lag_is_what_is_on_the_log_and_not_applied(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    await fleet.coordinator()
    where = subject(fleet.name, "control")
    async with historian(server.url, tmp_path / "history") as keeper, observed(keeper) as http:
        # As when its disk is full: what comes now stays on the log.
        keeper.ingest.follower.pause()
        for _ in range(500):
            await fleet.client.publish(where, codec.encode([types.PolicyChanged("ttft", {})]))
        await fleet.client.flush()
        with anyio.fail_after(30):
            while (await http.metrics())("kvplane_log_lag_commits") != 500:
                await anyio.sleep(0.1)
        keeper.ingest.follower.resume()
        await until(lambda: keeper.ingest.stored == 500)
        metrics = await http.metrics()
        assert metrics("kvplane_log_lag_commits") == 0
        assert metrics("kvplane_historian_stored_sequence") == 500


async def test_what_the_server_reports_behind_ones_back_is_counted(server: Server) -> None:
    async with connected([server.url], "slow") as client:
        waiting = anyio.Event()

        async def slowly(_: object) -> None:
            await waiting.wait()

        await client.subscribe("much", cb=slowly, pending_msgs_limit=1)
        for _ in range(9):
            await client.publish("much", b"")
        await client.flush()
        await until(lambda: errors_of(client)["slow_consumer"] > 0)
        waiting.set()


def test_up_serves_metrics_where_it_is_told_and_says_when_the_port_is_taken(tmp_path: Path) -> None:
    port, http = free_port(), free_port()
    command = [sys.executable, "-m", "kvplane"]
    up = [
        *command,
        "up",
        "--data",
        str(tmp_path),
        "--port",
        str(port),
        "--simulate",
        "1",
        "--http",
        f"127.0.0.1:{http}",
    ]
    with subprocess.Popen(up, stderr=subprocess.DEVNULL) as process:
        try:
            for address, service in ((http, "simnode"), (http + 1, "historian")):
                site = Http(f"127.0.0.1:{address}")
                deadline = time.monotonic() + 120
                while site.ask("/readyz")[0] != 200:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                assert Metrics(site.ask("/metrics", OPENMETRICS)[2])("kvplane_ready", service=service) == 1
            taken = ["router", "--server", f"nats://127.0.0.1:{port}", "--http", f"127.0.0.1:{http}"]
            second = subprocess.run([*command, *taken], capture_output=True, text=True, check=False, timeout=30)
            assert second.returncode == 1
            assert second.stderr.splitlines()[-1] == (
                f"kvplane: --http 127.0.0.1:{http} can't be listened on (Address already in use); choose another, or stop "
                "what has it [http_failed]"
            )
        finally:
            process.terminate()
            process.wait(20)


async def test_a_port_that_nobody_asked_for_and_another_has_is_gone_on_without(fleet: Fleet) -> None:
    logs.configure("warning")
    coordinator = await fleet.coordinator()
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with capture_logs() as logged:
            async with observing(where, coordinator, optional=True) as observed_at:
                assert observed_at is None
        assert [line["address"] for line in logged if line["event"] == "http_taken"] == [where]
        with pytest.raises(HttpFailed, match="Address already in use"):
            async with observing(where, coordinator):
                pass
    async with observing(where, coordinator, optional=True) as observed_at:
        assert observed_at == where
        assert (await Http(where).state("/readyz"))[0] == 200


def test_ports_that_up_chooses_are_optional_and_others_not() -> None:
    assert up._up_http(None) == ("127.0.0.1:9464", "127.0.0.1:9465", True)
    assert up._up_http("[::1]:9000") == ("[::1]:9000", "[::1]:9001", False)
    assert up._up_http("off")[:2] == (None, None)


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", ":9464", "127.0.0.1:http", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_said_before_anything_starts(address: str) -> None:
    command = [sys.executable, "-m", "kvplane", "coordinator", "--http", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert f"--http is '{address}'; give HOST:PORT, such as 127.0.0.1:9464" in done.stderr
