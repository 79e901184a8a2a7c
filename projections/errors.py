"""Errors of projections. The fold itself raises none: it skips and counts."""

from __future__ import annotations

from kvplane.events.errors import KvplaneError


class BadSnapshot(KvplaneError):
    """Bytes that are no snapshot which can be used here, or a state that none can be made of. The log has everything."""

    code = "bad_snapshot"


class BadHistory(KvplaneError):
    """The history's file can't be opened, read or written."""

    code = "bad_history"


class HistoryFull(BadHistory):
    """The disk of the history has no room."""

    code = "history_full"
