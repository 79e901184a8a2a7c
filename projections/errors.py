"""Errors of projections. For no commit the fold raises one: it skips and counts."""

from __future__ import annotations

from kvplane.events.errors import KvplaneError


class Unusable(KvplaneError):
    """This process failed while it applied a commit. Its state may hold half of it; only the log has all of it."""

    code = "unusable_state"

    def __init__(self, sequence: int, cause: BaseException) -> None:
        failed = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        remedy = "give it more memory and" if isinstance(cause, MemoryError) else "see what its machine lacks, and"
        super().__init__(
            f"this process failed while it applied commit {sequence} ({failed}), and other processes may not have: what it "
            f"knows of the fleet is of no use any more; {remedy} start it again, it then reads the log anew"
        )


class BadSnapshot(KvplaneError):
    """Bytes that are no snapshot which can be used here, or a state that none can be made of. The log has everything."""

    code = "bad_snapshot"


class BadHistory(KvplaneError):
    """The history's file can't be opened, read or written."""

    code = "bad_history"


class HistoryFull(BadHistory):
    """The disk of the history has no space left."""

    code = "history_full"
