"""What is wrong with a fleet, as far as it can be seen from outside: findings, each with what to do.

`examine` asks everything that answers; `judge` decides, without asking anybody.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import anyio
from msgspec import Struct
from nats.errors import Error as NatsError

from events.errors import LogError, LogUnavailable
from events.log.snapshots import SnapshotStore
from events.log.stream import open_stream
from events.subjects import stream_name
from services import api
from services.client import ask, instances
from services.compaction import SNAPSHOT_COMMITS
from services.errors import ServiceFault

if TYPE_CHECKING:
    from nats.aio.client import Client

ANSWER_SECONDS = 0.5
"""How long everybody has to say that they are there."""
LAG_COMMITS = 1000
SKEW_SECONDS = 1.0
TRIES = 20
"""How often replicas are asked until all of them answer for one sequence."""

Level = Literal["ok", "warning", "problem"]


class Finding(Struct, frozen=True):
    """One thing that was looked at."""

    level: Level
    what: str
    said: str


class Examined(Struct, kw_only=True):
    """What was found out."""

    log: dict[str, Any] | None = None
    log_error: str = ""
    now: float = 0.0
    routers: list[dict[str, Any]] = []
    coordinators: list[dict[str, Any]] = []
    nodes: list[dict[str, Any]] = []
    history: dict[str, Any] | None = None
    snapshots: list[int] = []


async def examine(client: Client, fleet: str) -> Examined:
    """Ask everything that answers."""
    found = Examined(now=time.time())
    js = client.jetstream()
    try:
        state = await open_stream(js, fleet)
        newest = 0.0
        if state.messages:
            message = await js.get_msg(stream_name(fleet), state.last_seq)
            newest = message.time.timestamp() if message.time is not None else 0.0
        found.log = {"first": state.first_seq, "last": state.last_seq, "bytes": state.bytes, "newest": newest}
    except LogError as error:
        found.log_error = str(error)
        return found
    writers = await _instances(client, "kvplane-router", fleet)
    coordinators = await _instances(client, "kvplane-coordinator", fleet)
    for _ in range(TRIES):
        found.routers = [
            status for writer in writers if (status := await _status(client, f"kv.{fleet}.router.{writer}.status"))
        ]
        found.coordinators = [
            status
            for writer in coordinators
            if (status := await _status(client, f"kv.{fleet}.coordinator.{writer}.status"))
        ]
        if len({status["sequence"] for status in (*found.routers, *found.coordinators)}) < 2:
            break
        await anyio.sleep(0.1)
    try:
        answer: dict[str, Any] = await ask(client, f"kv.{fleet}.coordinator.node.list", api.ListRequest(), seconds=5)
        found.nodes = answer["nodes"]
    except ServiceFault:
        found.nodes = []
    found.history = await _status(client, f"kv.{fleet}.history.status")
    try:
        found.snapshots = await SnapshotStore(client, fleet).sequences()
    except LogUnavailable:
        found.snapshots = []
    return found


async def _status(client: Client, subject: str) -> dict[str, Any] | None:
    try:
        status: dict[str, Any] = await ask(client, subject, api.StatusRequest(digest=True), seconds=10)
    except ServiceFault:
        return None
    return status


async def _instances(client: Client, service: str, fleet: str) -> list[str]:
    """Writers of all instances of a service that answer for the fleet."""
    found: list[dict[str, str]] = []
    with suppress(NatsError, TimeoutError):
        found = await instances(client, service, seconds=ANSWER_SECONDS)
    return [metadata["writer"] for metadata in found if metadata.get("fleet") == fleet]


def judge(found: Examined) -> list[Finding]:
    """What is wrong, and what is not."""
    if found.log is None:
        return [Finding("problem", "log", found.log_error)]
    findings = [Finding("ok", "log", f"{found.log['last']:,} commits, from {found.log['first']:,} on, nothing missing")]
    ahead = found.log["newest"] - found.now
    if ahead > SKEW_SECONDS:
        findings.append(
            Finding(
                "problem",
                "clock",
                f"the log's newest commit is {ahead:.1f} s in the future; set the clocks right (NTP)",
            )
        )
    return [
        *findings, *_replicas(found, found.log["last"]), *_digests(found), *_skipped(found), *_nodes(found),
        *_history(found, found.log["last"]), *_snapshots(found, found.log["last"]),
    ]  # fmt: skip


def _replicas(found: Examined, last: int) -> list[Finding]:
    findings = []
    for name, statuses, start in (
        ("routers", found.routers, "kvplane router"), ("coordinators", found.coordinators, "kvplane coordinator"),
    ):  # fmt: skip
        if not statuses:
            findings.append(Finding("problem", name, f"none answers; start one with `{start}`"))
            continue
        behind = max(last - status["sequence"] for status in statuses)
        level: Level = "problem" if behind > LAG_COMMITS else "ok"
        findings.append(
            Finding(level, name, f"{len(statuses)} answer, at most {max(0, behind):,} commits behind the log")
        )
    for status in found.routers:
        who = status["writer"]
        if status["degraded"]:
            findings.append(
                Finding("problem", who, "its decisions are not recorded at the moment; can it reach the log?")
            )
        if status["unrecorded"]:
            findings.append(
                Finding("problem", who, f"{status['unrecorded']:,} decisions were dropped while the log was away")
            )
        if status["policy_failures"]:
            findings.append(
                Finding(
                    "problem", who, f"the policy failed {status['policy_failures']:,} times: {status['policy_failure']}"
                )
            )
    return findings


def _digests(found: Examined) -> list[Finding]:
    at: dict[int, set[str]] = {}
    for status in (*found.routers, *found.coordinators):
        at.setdefault(status["sequence"], set()).add(status["digest"])
    forked = [sequence for sequence, digests in at.items() if len(digests) > 1]
    if forked:
        said = f"replicas differ at sequence {forked[0]:,}; do all run the same kvplane? Restart them, and report it"
        return [Finding("problem", "digests", said)]
    if len(at) > 1:
        return [Finding("warning", "digests", "replicas never came to one sequence while they were asked; ask again")]
    return [Finding("ok", "digests", "all replicas that answer hold the same state")] if at else []


def _skipped(found: Examined) -> list[Finding]:
    skipped: dict[str, int] = next((status["skipped"] for status in (*found.coordinators, *found.routers)), {})
    if not skipped:
        return []
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    hint = "; `kvplane sql 'SELECT * FROM skipped_commits'` says whose"
    return [Finding("problem" if "defect" in skipped else "warning", "skipped commits", said + hint)]


def _nodes(found: Examined) -> list[Finding]:
    if not found.nodes:
        return [Finding("warning", "nodes", "none is registered")]
    lost = [f"{row['node']} ({row['reason']})" for row in found.nodes if row["state"] == "lost"]
    up = sum(row["state"] == "up" for row in found.nodes)
    findings = [Finding("ok" if up else "problem", "nodes", f"{up} of {len(found.nodes)} take requests")]
    if lost:
        findings.append(Finding("warning", "nodes", f"lost: {', '.join(lost[:5])}"))
    return findings


def _history(found: Examined, last: int) -> list[Finding]:
    if found.history is None:
        return [Finding("warning", "history", "no historian answers; `kvplane historian` keeps one")]
    if not found.history["healthy"]:
        return [Finding("problem", "history", found.history["failure"] or "the historian does not hear from the log")]
    behind = max(0, last - found.history["stored"])
    return [Finding("problem" if behind > LAG_COMMITS else "ok", "history", f"{behind:,} commits behind the log")]


def _snapshots(found: Examined, last: int) -> list[Finding]:
    newest = found.snapshots[0] if found.snapshots else 0
    if last - newest > 2 * SNAPSHOT_COMMITS:
        said = f"the newest is {last - newest:,} commits old; do coordinators run, and is there room on the servers' disks?"
        return [Finding("warning", "snapshots", said)]
    return [Finding("ok", "snapshots", f"{len(found.snapshots)}, {last - newest:,} commits since")]
