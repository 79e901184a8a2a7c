"""What services say of themselves when they are asked for their `status`.

Fields that came later have a default: a reader may meet a service of an earlier version.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType


class ReplicaStatus(Struct, frozen=True, kw_only=True):
    """What a service that folds the log is and knows."""

    fleet: str = ""
    writer: str
    version: str = "unknown"
    clock: float = 0.0
    """Its clock when it answered, in unix seconds; 0 is unknown."""
    ready: bool = True
    """Whether the log has been read to where its end was at the start."""
    healthy: bool = True
    """Whether it hears from the log."""
    began: int = 0
    """Sequence of the snapshot that it began with; 0 when it began with the log."""
    checkpoints: dict[str, str] = {}
    """Digests at the last checkpoints, by sequence."""
    differs: int = 0
    """The newest checkpoint at which it was not with the majority; 0 for none."""
    mismatches: int = 0
    """How many checkpoints found it so."""
    sequence: int
    """Last sequence of the log that is applied."""
    digest: str | UnsetType = UNSET
    """Digest of the state at `sequence`, when it was asked for."""
    commits: int = 0
    nodes: int = 0
    available: int = 0
    """Nodes that a request may be sent to."""
    memberships: int = 0
    """Blocks, counted once for each node and tier that holds them."""
    sessions: int = 0
    active: int = 0
    """Requests that run."""
    format: int = 1
    """Format of the log in force."""
    policy: str = ""
    parameters: dict[str, float] = {}
    skipped: dict[str, int] = {}
    """Commits that changed nothing, by reason."""
    skipped_before: dict[str, float] = {}
    """For each reason a time in unix seconds after which there was no such commit."""
    ignored: dict[str, int] = {}
    """Events that changed nothing, by reason, in commits that were applied."""


class RouterStatus(ReplicaStatus, frozen=True, kw_only=True):
    """Answer of kv.<fleet>.router.<writer>.status, and of `flush` there."""

    degraded: bool = False
    """Whether decisions can't be recorded at the moment."""
    decisions: dict[str, int] = {}
    """Decisions by kind, and those that were refused."""
    policy_failures: int = 0
    policy_failure: str = ""
    """The policy's last error."""
    recorded: int = 0
    waiting: int = 0
    unrecorded: int = 0
    """Decisions that are on the log, that wait for it, and that were dropped while it was away."""


class ServerStatus(Struct, frozen=True, kw_only=True):
    """What only the process that runs a server can see of it. Sizes are bytes."""

    name: str
    url: str
    sync_always: bool
    """Whether it forces what it acknowledges to the disk."""
    max_storage: int
    """What all its streams may take."""
    disk_free: int
    full: bool = False
    """Whether the disk has no room, so that nothing is acknowledged."""
    restarts: int = 0


class CoordinatorStatus(ReplicaStatus, frozen=True, kw_only=True):
    """Answer of kv.<fleet>.coordinator.status, and of one coordinator's own."""

    races_lost: int = 0
    most_tries: int = 0
    """How often the unluckiest decision was made."""
    server: ServerStatus | None = None
    """The server that this process runs, as `kvplane up` does."""
    log_created: float = 0.0
    """When its log was created, in unix seconds: two logs of one fleet differ in it."""


class HistoryStatus(Struct, frozen=True, kw_only=True):
    """Answer of kv.<fleet>.history.status, and of one historian's own."""

    fleet: str = ""
    historian: str
    version: str = "unknown"
    clock: float = 0.0
    healthy: bool
    """Whether it hears from the log and can store."""
    works: bool = True
    """False when it can't work at all, for `failure`: how far the history is, is not known then."""
    failure: str = ""
    """Why nothing is stored at the moment."""
    log: int = 0
    """Last sequence on the log."""
    applied: int = 0
    stored: int
    """Sequence up to which the history is complete."""
    archived: int = 0
    live_bytes: int = 0
    archive_files: int = 0
    archive_bytes: int = 0
    archive_days: list[str] = []
    """First and last day of the archive; none when it is empty."""
    snapshots: list[int] = []
    """Sequences of which it has a snapshot, oldest first."""
    queries: int = 0
    """Results of which pages are still to be asked for."""
