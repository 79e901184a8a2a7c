"""The doctor finds what is wrong, says what to do, and finds nothing wrong where nothing is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from kvplane.events import types
from kvplane.events.log.append import Appender, new_writer
from kvplane.services.diagnosis.doctor import Finding, judge
from kvplane.services.diagnosis.examine import Examined, examine
from kvplane.services.history.historian import Historian
from kvplane.services.protocol import messages
from kvplane.services.protocol.status import CoordinatorStatus, HistoryStatus, RouterStatus
from kvplane.services.simulation.simnode import NodeConfig
from tests.support.commands import run, up
from tests.support.findings import sentence, wrong
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio

D, E = "d" * 32, "e" * 32


def router(writer: str, sequence: int = 100, digest: str = D, **facts: Any) -> RouterStatus:
    return RouterStatus(writer=writer, sequence=sequence, digest=digest, **{"version": "1", **facts})


def coordinator(writer: str, sequence: int = 100, digest: str = D, **facts: Any) -> CoordinatorStatus:
    return CoordinatorStatus(writer=writer, sequence=sequence, digest=digest, **{"version": "1", **facts})


def history(**facts: Any) -> HistoryStatus:
    return HistoryStatus(**{"historian": "h", "healthy": True, "stored": 100, "version": "1", **facts})


def stream(last: int = 100, *, skew: float = 0.0, newest: float = 1000.0, **facts: Any) -> dict[str, Any]:
    return {
        "config": {"num_replicas": 1, "max_bytes": -1, "max_msgs": -1}, "newest": newest, "clock": 1000.0, "skew": skew,
        "state": {"first_seq": 1, "last_seq": last, "bytes": 900, "messages": last}, "cluster": {"leader": "s"}, **facts,
    }  # fmt: skip


def copies(*others: dict[str, Any], leader: str = "s1") -> dict[str, Any]:
    return {"cluster": {"name": "c", "leader": leader, "replicas": list(others)}}


def server(**config: Any) -> dict[str, Any]:
    return {
        "url": "u", "name": "s", "stats": {"storage": 900},
        "config": {"sync_always": True, "sync_interval": 1, "max_storage": 10_000, **config},
    }  # fmt: skip


WELL = Examined(
    log=stream(), routers=[router("r1"), router("r2")], coordinators=[coordinator("c")], histories=[history()], snapshots=[50],
    nodes=[{"node": "n", "state": "up", "reason": ""}], servers=[server()],
)  # fmt: skip


def test_a_fleet_that_is_well_has_no_findings() -> None:
    assert wrong(WELL) == set()
    assert {finding.level for finding in judge(WELL)} == {"ok"}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"log": None, "log_error": "x"}, ("problem", "log")),
        ({"log": stream(skew=5)}, ("problem", "clock")),
        ({"log": stream(newest=1100)}, ("problem", "clock")),
        ({"skews": {"r1": -3.0}}, ("problem", "clock")),
        ({"skews": {"h": 3.0}}, ("problem", "clock")),
        ({"routers": []}, ("problem", "routers")),
        ({"coordinators": []}, ("problem", "coordinators")),
        ({"coordinators": [coordinator("c", healthy=False)]}, ("problem", "c")),
        ({"routers": [router("r1"), router("r2", digest=E)]}, ("problem", "digests")),
        ({"routers": [router("r1", differs=1000), router("r2")]}, ("problem", "digests")),
        ({"routers": [router("r1"), router("r2", sequence=99)]}, ("warning", "digests")),
        ({"routers": [router("r1"), router("r2", version="2")]}, ("warning", "versions")),
        ({"routers": [router("r", degraded=True)]}, ("problem", "r")),
        ({"routers": [router("r", unrecorded=3)]}, ("problem", "r")),
        ({"routers": [router("r", policy_failures=2, policy_failure="ValueError")]}, ("problem", "r")),
        ({"coordinators": [coordinator("c", skipped={"stale": 2})]}, ("warning", "skipped commits")),
        ({"coordinators": [coordinator("c", skipped={"defect": 1})]}, ("problem", "skipped commits")),
        ({"nodes": []}, ("warning", "nodes")),
        ({"nodes": [{"node": "n", "state": "cordoned", "reason": ""}]}, ("problem", "nodes")),
        ({"nodes": [{"node": "n", "state": "up", "reason": "", "inexact": "why"}]}, ("warning", "nodes")),
        ({"histories": []}, ("warning", "history")),
        ({"histories": [history(), history()]}, ("warning", "history")),
        ({"histories": [history(healthy=False, failure="disk full")]}, ("problem", "history")),
        ({"servers": [server(sync_always=False)]}, ("problem", "durability")),
        ({"servers": [{"url": "u", "error": "refused"}]}, ("problem", "durability")),
        ({"servers": [server(max_storage=1000)]}, ("warning", "room")),
        ({"servers": [server(max_storage=901)]}, ("problem", "room")),
        ({"log": stream(config={"num_replicas": 1, "max_bytes": 900})}, ("problem", "room")),
        ({"log": stream(config={"num_replicas": 1, "max_msgs": 110})}, ("warning", "room")),
        ({"account": {"storage": 900, "limits": {"max_storage": 1000}}}, ("warning", "room")),
        ({"log": stream(**copies())}, ("warning", "copies")),
        ({"log": stream(**copies(leader=""))}, ("problem", "copies")),
        ({"log": stream(**copies({"name": "s2", "current": True, "offline": True}))}, ("problem", "copies")),
        ({"log": stream(**copies({"name": "s2", "current": True, "active": 5 * 10**9}))}, ("problem", "copies")),
        ({"log": stream(**copies({"name": "s2", "current": False}))}, ("warning", "copies")),
        ({"snapshots_stream": {"config": {"num_replicas": 0}}}, ("warning", "copies")),
    ],
)
def test_what_is_wrong_is_found(change: dict[str, Any], finding: tuple[str, str]) -> None:
    assert finding in wrong(replace(WELL, **change))


def test_who_is_far_behind_is_found() -> None:
    found = wrong(replace(WELL, log=stream(1_000_000)))
    assert found == {
        ("problem", "routers"), ("problem", "coordinators"), ("problem", "history"), ("warning", "snapshots"),
    }  # fmt: skip


def test_what_can_not_be_seen_is_said_to_be_so() -> None:
    unseen = {finding.what for finding in judge(replace(WELL, servers=[])) if finding.level == "unseen"}
    assert unseen == {"durability", "room"}


def test_replicas_are_compared_at_checkpoints_wherever_they_are_now() -> None:
    """Under load no two are at one sequence; the odd one is named."""
    common = {"1000": D, "2000": D}
    a, b = (router(name, at, name * 32, checkpoints=dict(common)) for at, name in enumerate("ab", 2001))
    c = coordinator("c", 2003, "c" * 32, checkpoints=common)
    routers = replace(WELL, routers=[a, b], coordinators=[c])
    assert wrong(routers) == set()
    b.checkpoints["2000"] = E
    assert wrong(routers) == {("problem", "digests")}
    assert sentence(routers, "digests").startswith("at sequence 2,000 b differ.")
    # Of two, nobody knows which is right.
    pair = replace(WELL, routers=[a], coordinators=[coordinator("b", 2002, checkpoints=b.checkpoints)])
    assert "a, b differ, and nobody has a majority" in sentence(pair, "digests")
    # One that has none of them says nothing about the others.
    b.checkpoints.clear()
    b.checkpoints["3000"] = E
    assert wrong(routers) == {("warning", "digests")}


async def test_a_real_fleet_is_examined(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.coordinator()
    await fleet.coordinator()
    await fleet.router()
    await fleet.router()
    await fleet.nodes(NodeConfig(name="n1"))
    kept = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
    await fleet._group.start(kept.run)
    await until(lambda: kept.ingest.stored >= kept.ingest.state.sequence)
    found = await examine(fleet.client, "default")
    assert (len(found.routers), len(found.coordinators), len(found.histories)) == (2, 2, 1)
    assert {status.writer for status in found.coordinators} & {status.writer for status in found.routers} == set()
    assert wrong(found) == set()
    # A stranger's bytes on the log, and a second history.
    stranger = Appender(fleet.client, "default", new_writer("stranger"))
    await stranger.append("kv.default.node.n1", [types.NodeCordoned("n2")])
    await fleet.ask("coordinator.node.cordon", messages.NodeRequest(node="n1"))
    second = Historian(await fleet.connect("historian"), "default", tmp_path / "second", servers=[fleet.url])
    await fleet._group.start(second.run)
    assert wrong(await examine(fleet.client, "default")) == {
        ("warning", "skipped commits"), ("problem", "nodes"), ("warning", "history"),
    }  # fmt: skip


async def test_a_log_without_anybody_and_no_log_at_all(client: Client) -> None:
    assert [finding.what for finding in judge(await examine(client, "nobody"))] == ["log", "durability"]
    findings: list[Finding] = judge(await examine(client, "nobody"))
    assert "has no log yet" in findings[0].message


def test_the_command_says_no_with_its_exit_code() -> None:
    done = run("doctor", "--server", "nats://127.0.0.1:1")
    assert done.returncode == 1
    assert "no NATS server answers" in done.stderr


DAY = 24 * 3600.0


@pytest.mark.parametrize(
    ("before", "level"),
    [
        ([{"stale": 10 * DAY - 60}, {}], "warning"),
        # Another replica began with a later snapshot, and only knows that it was before that.
        ([{"stale": 8 * DAY}, {"stale": 10 * DAY - 60}], "ok"),
        ([{"stale": 8 * DAY}, {"stale": 8 * DAY}], "ok"),
        # One of an earlier version does not say.
        ([{}, {}], "warning"),
    ],
)
def test_what_was_skipped_long_ago_is_no_warning(before: list[dict[str, float]], level: str) -> None:
    routers = [router(f"r{at}", skipped={"stale": 7}, skipped_before=known) for at, known in enumerate(before)]
    found = replace(WELL, routers=routers, coordinators=[], now=10 * DAY)
    (finding,) = [finding for finding in judge(found) if finding.what == "skipped commits"]
    assert (finding.level, "7 stale" in finding.message) == (level, True)


def test_the_disk_under_up_is_seen() -> None:
    embedded = {
        "name": "s",
        "config": {"sync_always": True, "max_storage": 10_000},
        "full": False,
        "disk_free": 1 << 40,
    }
    assert wrong(replace(WELL, servers=[embedded])) == set()
    assert wrong(replace(WELL, servers=[{**embedded, "disk_free": 1 << 20}])) == {("warning", "room")}
    assert wrong(replace(WELL, servers=[{**embedded, "full": True}])) == {("problem", "room")}
    full = replace(WELL, servers=[embedded], account={"storage": 9600})
    assert wrong(full) == {("problem", "room")}


def test_the_server_of_up_is_seen_without_its_monitor(tmp_path: Path) -> None:
    with up(tmp_path, "--no-history", "--http", "off") as (url, _):
        done = run("doctor", "--json", KVPLANE_SERVER=url)
        found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert found["durability"]["level"] == "ok", found
    assert found["room"]["level"] in {"ok", "warning"}
    text = (tmp_path / "nats-server.conf").read_text()
    assert found["durability"]["said"].split()[1] in text
    assert "sync_interval: always" in text
