"""The doctor finds what is wrong, says what to do, and finds nothing wrong where nothing is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from events import types
from events.log.append import Appender, new_writer
from services import api
from services.doctor import Examined, Finding, examine, judge
from services.history.historian import Historian
from services.simnode import NodeConfig
from tests.conftest import Fleet, until
from tests.test_cli import run

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

pytestmark = pytest.mark.anyio


def status(writer: str, sequence: int = 100, digest: str = "d", **facts: Any) -> dict[str, Any]:
    return {
        "writer": writer, "sequence": sequence, "digest": digest, "degraded": False, "unrecorded": 0, "policy_failures": 0,
        "policy_failure": "", "skipped": {}, **facts,
    }  # fmt: skip


WELL = Examined(
    log={"first": 1, "last": 100, "bytes": 1, "newest": 1000.0}, now=1000.0, routers=[status("r1"), status("r2")],
    coordinators=[status("c")], nodes=[{"node": "n", "state": "up", "reason": ""}],
    history={"healthy": True, "failure": "", "stored": 100}, snapshots=[50],
)  # fmt: skip


def wrong(found: Examined) -> set[tuple[str, str]]:
    return {(finding.level, finding.what) for finding in judge(found) if finding.level != "ok"}


def test_a_fleet_that_is_well_has_no_findings() -> None:
    assert wrong(WELL) == set()


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"log": None, "log_error": "x"}, ("problem", "log")),
        ({"now": 900.0}, ("problem", "clock")),
        ({"routers": []}, ("problem", "routers")),
        ({"coordinators": []}, ("problem", "coordinators")),
        ({"routers": [status("r1"), status("r2", digest="e")]}, ("problem", "digests")),
        ({"routers": [status("r1"), status("r2", sequence=99)]}, ("warning", "digests")),
        ({"routers": [status("r", degraded=True)]}, ("problem", "r")),
        ({"routers": [status("r", unrecorded=3)]}, ("problem", "r")),
        ({"routers": [status("r", policy_failures=2, policy_failure="ValueError")]}, ("problem", "r")),
        ({"coordinators": [status("c", skipped={"stale": 2})]}, ("warning", "skipped commits")),
        ({"coordinators": [status("c", skipped={"defect": 1})]}, ("problem", "skipped commits")),
        ({"nodes": []}, ("warning", "nodes")),
        ({"nodes": [{"node": "n", "state": "cordoned", "reason": ""}]}, ("problem", "nodes")),
        ({"history": None}, ("warning", "history")),
        ({"history": {"healthy": False, "failure": "disk full", "stored": 100}}, ("problem", "history")),
    ],
)
def test_what_is_wrong_is_found(change: dict[str, Any], finding: tuple[str, str]) -> None:
    assert finding in wrong(replace(WELL, **change))


def test_who_is_far_behind_is_found() -> None:
    log = {"first": 1, "last": 1_000_000, "bytes": 1, "newest": 1000.0}
    found = wrong(replace(WELL, log=log))
    assert found == {
        ("problem", "routers"), ("problem", "coordinators"), ("problem", "history"), ("warning", "snapshots"),
    }  # fmt: skip


async def test_a_real_fleet_is_examined(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.coordinator()
    await fleet.coordinator()
    await fleet.router()
    await fleet.router()
    await fleet.nodes(NodeConfig(name="n1"))
    history = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
    await fleet._group.start(history.run)
    await until(lambda: history.ingest.stored >= history.ingest.state.sequence)
    found = await examine(fleet.client, "default")
    assert (len(found.routers), len(found.coordinators)) == (2, 2)
    assert {status["writer"] for status in found.coordinators} & {status["writer"] for status in found.routers} == set()
    assert wrong(found) == set()
    # A stranger's bytes on the log.
    stranger = Appender(fleet.client, "default", new_writer("stranger"))
    await stranger.append("kv.default.node.n1", [types.NodeCordoned("n2")])
    await fleet.ask("coordinator.node.cordon", api.NodeRequest(node="n1"))
    assert wrong(await examine(fleet.client, "default")) == {("warning", "skipped commits"), ("problem", "nodes")}


async def test_a_log_without_anybody_and_no_log_at_all(client: Client) -> None:
    assert [finding.what for finding in judge(await examine(client, "nobody"))] == ["log"]
    findings: list[Finding] = judge(await examine(client, "nobody"))
    assert "has no log yet" in findings[0].said


def test_the_command_says_no_with_its_exit_code() -> None:
    done = run("doctor", "--server", "nats://127.0.0.1:1")
    assert done.returncode == 1
    assert "no NATS server answers" in done.stderr
