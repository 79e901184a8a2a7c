"""What is wrong with a fleet: findings, each with what to do. `judge` decides from what `services.diagnosis.examine` saw."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from msgspec import UNSET, Struct, field

from kvplane.events.log.stream import MESSAGE_BYTES
from kvplane.services.replication.checkpoints import odd
from kvplane.services.replication.compaction import SNAPSHOT_COMMITS
from kvplane.services.rpc.client import captured

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvplane.services.diagnosis.examine import Examined, Plain

LAG_COMMITS = 1000
SAME_SECONDS = 0.001
"""Times of creation that are so near are those of one log."""
SKEW_SECONDS = 1.0
SILENT_SECONDS = 4.0
"""Servers get news of each other's copies every second; that one is offline they report much later."""
SKIPPED_SECONDS = 24 * 3600.0
"""What was skipped longer ago is no warning any more."""
FULL = 0.8
"""Storage of which more is used will soon be full."""

LEAST_FREE = 1 << 30
"""Bytes that should be free on the disk of a server."""

Level = Literal["ok", "unseen", "warning", "problem"]


class Finding(Struct, frozen=True):
    """One thing that was looked at. `unseen` is what can't be seen from here, and so may be wrong."""

    level: Level
    what: str
    message: str = field(name="said")


def judge(found: Examined) -> list[Finding]:
    """What is wrong, and what is not."""
    durable = list(_servers(found.servers))
    log = found.log
    if log is None:
        return [Finding("problem", "log", found.log_error), *durable]
    last = log["state"]["last_seq"]
    return [
        _whole(log), *_one_log(found, log),
        *_captured(found), *durable, *_copies(found, log), *_room(found, log), *_messages(found), *_clocks(found, log),
        *_replicas(found, last),
        *_versions(found), *_digests(found), *_skipped(found), *_nodes(found), *_histories(found, last),
        *_snapshots(found, log["state"]),
    ]  # fmt: skip


def _whole(log: Plain) -> Finding:
    """Whether nothing is missing inside the log."""
    state = log["state"]
    first, last, gone = state["first_seq"], state["last_seq"], state.get("num_deleted", 0)
    if not gone:
        return Finding("ok", "log", f"{last:,} commits, from {first:,} on, nothing missing")
    return Finding(
        "problem", "log", f"stream {log['config']['name']} has {gone:,} deleted messages between {first:,} and {last:,}: it "
        "was purged by subject, or otherwise by hand. What runs knows them: `kvplane snapshot take`, then `kvplane compact`, "
        "before it ends; if nothing runs any more, restore the log from a backup",
    )  # fmt: skip


def _one_log(found: Examined, log: Plain) -> Iterator[Finding]:
    """Whether coordinators have the log that is seen from here."""
    if "created" not in log:
        return
    own = datetime.fromisoformat(log["created"]).timestamp()
    elsewhere = [c.writer for c in found.coordinators if c.log_created and abs(c.log_created - own) > SAME_SECONDS]
    if elsewhere:
        yield Finding(
            "problem", "log", f"the fleet has two: {', '.join(elsewhere)} has another one than the server that was asked here. "
            "A server with a JetStream domain of its own, such as a leaf node, keeps streams that others do not see: have all "
            "services connect to one side (--server), and delete the other's log",
        )  # fmt: skip


def _servers(servers: list[Plain]) -> Iterator[Finding]:
    """Whether acknowledged means on disk."""
    if not servers:
        message = (
            "whether servers force what they acknowledge to the disk can't be seen by a client, and the one who runs them "
            "(`kvplane up`) does not answer; --monitor URL asks them"
        )
        yield Finding("unseen", "durability", message)
    for server in servers:
        if "error" in server:
            yield Finding("problem", "durability", f"{server['url']} does not answer: {server['error']}")
        elif "config" not in server:
            yield Finding("warning", "durability", f"server {server['name']} has no JetStream")
        elif not server["config"].get("sync_always"):
            seconds = server["config"].get("sync_interval", 0) / 1e9
            message = (
                f"server {server['name']} loses what it acknowledged in the last {seconds:g} s when the power fails"
            )
            yield Finding("problem", "durability", f"{message}; set sync_interval: always")
        else:
            yield Finding("ok", "durability", f"server {server['name']} forces what it acknowledges to the disk")


def _captured(found: Examined) -> Iterator[Finding]:
    for stream, subject in found.captured.items():
        yield Finding("problem", "requests", captured(stream, subject))


def _copies(found: Examined, log: Plain) -> Iterator[Finding]:
    """Whether the log's copies are there and at the same place."""
    config, cluster = log["config"], log.get("cluster") or {}
    if not cluster.get("leader"):
        yield Finding("problem", "copies", "the log has no leader, so nothing can be written; are most servers up?")
    others = cluster.get("replicas") or []
    current = 0
    for copy in others:
        silent = copy.get("active", 0) / 1e9
        if copy.get("offline") or silent > SILENT_SECONDS:
            message = f"server {copy['name']} has a copy of the log, and was last heard {silent:.0f} s ago; is it up?"
            yield Finding("problem", "copies", message)
        elif not copy.get("current"):
            yield Finding("warning", "copies", f"the copy on server {copy['name']} is behind by {copy.get('lag', 0):,}")
        else:
            current += 1
    copies = config["num_replicas"]
    if copies == 1 and cluster.get("name"):
        message = f"one, though cluster {cluster['name']} has several servers; when that server is lost, so is the log"
        yield Finding("warning", "copies", f"{message}. `kvplane copies 3` makes it three")
    stream = found.snapshots_stream
    if stream is not None and stream["config"]["num_replicas"] < copies:
        yield Finding("warning", "copies", f"snapshots have {stream['config']['num_replicas']}, the log has {copies}")
    if current == len(others) and cluster.get("leader"):
        yield Finding("ok", "copies", f"{copies} of the log, all current")


def _room(found: Examined, log: Plain) -> Iterator[Finding]:
    """Whether storage is full soon: then nobody can write."""
    config, state = log["config"], log["state"]
    limits = [
        ("the log's max_bytes", state["bytes"], config.get("max_bytes", -1)),
        ("the log's max_msgs", state["messages"], config.get("max_msgs", -1)),
        ("the account's storage", found.account.get("storage", 0), found.account.get("limits", {}).get("max_storage", -1)),
        *(
            (f"storage of server {server['name']}", _used(found, server), server["config"]["max_storage"])
            for server in found.servers
            if "config" in server
        ),
    ]  # fmt: skip
    for server in found.servers:
        if server.get("full"):
            message = (
                f"the disk of server {server['name']} is full, and nothing is acknowledged; free some space, "
                "and it goes on by itself"
            )
            yield Finding("problem", "room", message)
        elif server.get("disk_free", LEAST_FREE) < LEAST_FREE:
            message = f"the disk of server {server['name']} has {server['disk_free'] / 1e6:,.0f} MB left; free some space soon"
            yield Finding("warning", "room", message)
    near = [(what, used, limit) for what, used, limit in limits if limit > 0 and used > FULL * limit]
    for what, used, limit in near:
        message = (
            f"{used / limit:.0%} of {what} is used; `kvplane compact` purges the log below the snapshots, or raise "
            "the limit"
        )
        yield Finding("problem" if used >= 0.95 * limit else "warning", "room", message)
    if not near:
        known = sum(limit > 0 for _, _, limit in limits)
        level: Level = "ok" if known else "unseen"
        yield Finding(
            level, "room", f"{known} limits, none is near" if known else "no limit can be seen; --monitor URL asks"
        )


def _used(found: Examined, server: Plain) -> int:
    """Bytes that a server's streams take; that of `up` has one account."""
    used: int = server["stats"]["storage"] if "stats" in server else found.account.get("storage", 0)
    return used


def _messages(found: Examined) -> Iterator[Finding]:
    """Whether messages may be as large as commits and questions are."""
    most = found.max_payload
    if most >= MESSAGE_BYTES:
        yield Finding("ok", "messages", f"they may have {most:,} bytes")
    elif most:
        message = (
            f"they may have {most:,} bytes, less than {MESSAGE_BYTES:,}: events are cut, hashes of long prompts are not "
            "recorded, and large admissions are refused; set `max_payload: 8MB` on the servers"
        )
        yield Finding("warning", "messages", message)


def _clocks(found: Examined, log: Plain) -> Iterator[Finding]:
    """Clocks beside that of the log's leader: the log's time is what the fold goes by, and overlays compare it with theirs."""
    server = log["skew"]
    ahead = log["newest"] - log["clock"]
    remedy = "set the clocks right (NTP)"
    historians = {history.historian for history in found.histories}
    wrong = [
        (f"historian {who}" if who in historians else who, skew - server) for who, skew in found.skews.items()
    ]  # fmt: skip
    wrong.append(("this machine", -server))
    wrong = [(who, skew) for who, skew in wrong if abs(skew) > SKEW_SECONDS]
    for who, skew in wrong:
        where = "ahead of" if skew > 0 else "behind"
        yield Finding("problem", "clock", f"{who} is {abs(skew):.1f} s {where} the log's server; {remedy}")
    if ahead > SKEW_SECONDS:
        yield Finding("problem", "clock", f"the log's newest commit is {ahead:.1f} s in its server's future; {remedy}")
    if not wrong and ahead <= SKEW_SECONDS:
        yield Finding("ok", "clock", f"no clock is more than {SKEW_SECONDS:g} s off")


def _replicas(found: Examined, last: int) -> Iterator[Finding]:
    for name, statuses, start in (
        ("routers", found.routers, "kvplane router"), ("coordinators", found.coordinators, "kvplane coordinator"),
    ):  # fmt: skip
        if not statuses:
            yield Finding("problem", name, f"none answers; start one with `{start}`")
            continue
        behind = max(last - status.sequence for status in statuses)
        level: Level = "problem" if behind > LAG_COMMITS else "ok"
        yield Finding(level, name, f"{len(statuses)} answer, at most {max(0, behind):,} commits behind the log")
    for status in found.routers:
        who = status.writer
        if status.degraded:
            yield Finding("problem", who, "its decisions are not recorded at the moment; can it reach the log?")
        if status.unrecorded:
            yield Finding("problem", who, f"{status.unrecorded:,} decisions were dropped while the log was away")
        if status.policy_failures:
            message = f"the policy failed {status.policy_failures:,} times: {status.policy_failure}"
            yield Finding("problem", who, message)
    for coordinator in found.coordinators:
        if not coordinator.healthy:
            yield Finding("problem", coordinator.writer, "it does not hear from the log; can it reach the servers?")


def _versions(found: Examined) -> Iterator[Finding]:
    by_version: dict[str, list[str]] = {}
    for replica in found.replicas:
        by_version.setdefault(replica.version, []).append(replica.writer)
    for history in found.histories:
        by_version.setdefault(history.version, []).append("a historian")
    if len(by_version) > 1:
        message = "; ".join(
            f"{version}: {', '.join(sorted(services)[:5])}" for version, services in sorted(by_version.items())
        )
        yield Finding("warning", "versions", f"services are of several, end the upgrade: {message}")


def _digests(found: Examined) -> Iterator[Finding]:
    """Compare at checkpoints, and at the sequences that replicas were at when they were asked."""
    reported: dict[int, dict[str, str]] = {}
    for status in found.replicas:
        known = {int(sequence): digest for sequence, digest in status.checkpoints.items()}
        if status.digest is not UNSET:
            known[status.sequence] = status.digest
        for sequence, digest in known.items():
            reported.setdefault(sequence, {})[status.writer] = digest
    deciding = {status.writer for status in found.coordinators}
    forked = [
        (sequence, others)
        for sequence, digests in sorted(reported.items())
        if (others := odd(digests, deciding & digests.keys()))
    ]
    remedy = "Restart them; if they differ again, report it with the log"
    if forked:
        sequence, others = forked[-1]
        every = len(others) == len(reported[sequence])
        who = (
            f"{', '.join(sorted(others))} differ, and nobody has a majority" if every else f"{', '.join(others)} differ"
        )
        yield Finding("problem", "digests", f"at sequence {sequence:,} {who}. {remedy}")
        return
    claims = [status for status in found.replicas if status.differs]
    for status in claims:
        message = f"{status.writer} found itself to differ at checkpoint {status.differs:,}. {remedy}"
        yield Finding("problem", "digests", message)
    common = [sequence for sequence, digests in reported.items() if len(digests) == len(found.replicas)]
    if claims or not found.replicas:
        return
    if not common:
        yield Finding(
            "warning", "digests", "replicas have no sequence in common yet; ask again after some more commits"
        )
    elif len(found.replicas) == 1:
        yield Finding("ok", "digests", "there is one replica, and nothing to compare it with")
    else:
        yield Finding("ok", "digests", f"{len(found.replicas)} replicas had the same state at sequence {max(common):,}")


def _skipped(found: Examined) -> Iterator[Finding]:
    statuses = [*found.coordinators, *found.routers]
    skipped: dict[str, int] = next((status.skipped for status in statuses), {})
    recent: dict[str, int] = {}
    old: dict[str, int] = {}
    for reason, count in sorted(skipped.items()):
        # Each replica knows a time after which there was none: exactly, or as that of the snapshot that it began with.
        last = min((status.skipped_before.get(reason, found.now) for status in statuses), default=found.now)
        (old if found.now - last > SKIPPED_SECONDS else recent)[reason] = count
    hint = "; `kvplane sql 'SELECT * FROM skipped_commits'` says whose"
    if recent:
        message = ", ".join(f"{count:,} {reason}" for reason, count in recent.items())
        yield Finding("problem" if "defect" in recent else "warning", "skipped commits", message + hint)
    elif old:
        message = ", ".join(f"{count:,} {reason}" for reason, count in old.items())
        yield Finding("ok", "skipped commits", f"{message}, none in the last {SKIPPED_SECONDS / 3600:g} h{hint}")


def _nodes(found: Examined) -> Iterator[Finding]:
    if not found.nodes:
        yield Finding("warning", "nodes", "none is registered")
        return
    lost = [f"{row['node']} ({row['reason']})" for row in found.nodes if row["state"] == "lost"]
    up = sum(row["state"] == "up" for row in found.nodes)
    yield Finding("ok" if up else "problem", "nodes", f"{up} of {len(found.nodes)} take requests")
    unheard = [row["node"] for row in found.nodes if row.get("unheard")]
    if unheard:
        message = (
            f"nothing is heard of the cache of {', '.join(unheard[:5])}, which serves: start vLLM or SGLang with "
            "--kv-events-config, as `kvplane attach vllm --help` shows, or give attach --events where it publishes"
        )
        yield Finding("problem", "nodes", message)
    for why, names in _by(found.nodes, "inexact").items():
        yield Finding("warning", "nodes", f"{', '.join(names[:5])}: {why}")
    if lost:
        yield Finding("warning", "nodes", f"lost: {', '.join(lost[:5])}")


def _by(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[str]]:
    """Names of nodes by what their rows say in a field, where they say anything."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.get(field):
            names.setdefault(row[field], []).append(row["node"])
    return names


def _histories(found: Examined, last: int) -> Iterator[Finding]:
    if not found.histories:
        yield Finding("warning", "history", "no historian answers; `kvplane historian` keeps one")
    if len(found.histories) > 1:
        message = (
            f"{len(found.histories)} historians answer, each with a history of its own: questions go to any of them"
        )
        yield Finding("warning", "history", message)
    for history in found.histories:
        if not history.healthy:
            yield Finding("problem", "history", history.failure or "the historian does not hear from the log")
            continue
        if history.stored + 1 < found.first:
            message = (
                f"it has stored {history.stored:,} commits, and the log begins at {found.first:,}: what is between is lost to "
                "it; begin another with --history, which starts from a snapshot"
            )
            yield Finding("problem", "history", message)
            continue
        behind = max(0, last - history.stored)
        yield Finding("problem" if behind > LAG_COMMITS else "ok", "history", f"{behind:,} commits behind the log")


def _snapshots(found: Examined, log: Plain) -> Iterator[Finding]:
    newest = found.snapshots[0] if found.snapshots else 0
    first, last = log["first_seq"], log["last_seq"]
    if first > newest + 1:
        which = f"the newest is of {newest:,}" if newest else "there is none"
        remedy = (
            "`kvplane snapshot take` makes one"
            if found.coordinators
            else "start one that has all of it (`kvplane historian`), and then `kvplane coordinator --trust-history`"
        )
        yield Finding(
            "problem", "snapshots", f"the log was purged and begins at {first:,}, and no snapshot leads there ({which}), so "
            f"services that start again need a historian; {remedy}",
        )  # fmt: skip
    elif last - newest > 2 * SNAPSHOT_COMMITS:
        message = f"the newest is {last - newest:,} commits old; do coordinators run, and is there room on the servers' disks?"
        yield Finding("warning", "snapshots", message)
    else:
        yield Finding("ok", "snapshots", f"{len(found.snapshots)}, {last - newest:,} commits since")
