"""What was acknowledged to clients and done to the fleet: one JSON object a line, written by the process that nobody kills.

Every entry has `kind` and `at`, seconds of the run. Kinds, and what they hold beside these:

    tried     writer subject counter crc          a commit was begun
    acked     writer subject counter sequence     the log acknowledged it, the first time or again
    given_up  writer subject counter              its writer no longer waits for it
    flushed   writer subject events               so many events of a group writer were acknowledged, from the first on
    answered  action node sequence changed ...    a coordinator's answer
    routed    request node model applied degraded a router's answer
    sent      request process                     a client sent a request to a gateway
    got       request process outcome detail      how its answer ended: `whole`, `error`, `broken`, or what may not be
    life      process number writer pid           a process became ready; `writer` of routers and coordinators
    end       process number how                  it was killed, stopped, or ended by itself
    unrecorded writer events                      what a router said that it could not record
    fault     what target seconds                 a fault began
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Entry = dict[str, Any]


class Ledger:
    """Entries in the order in which they were written, in memory and in a file."""

    def __init__(self, file: Path | None = None) -> None:
        self.entries: list[Entry] = []
        self._begin = time.monotonic()
        self._out = file.open("a", buffering=1) if file is not None else None

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._begin

    def note(self, kind: str, **fields: Any) -> None:
        """Write an entry."""
        entry: Entry = {"kind": kind, "at": round(self.now, 4), **fields}
        self.entries.append(entry)
        if self._out is not None:
            self._out.write(json.dumps(entry) + "\n")

    def of(self, kind: str) -> list[Entry]:
        """Entries of one kind."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def close(self) -> None:
        """Close the file."""
        if self._out is not None:
            self._out.close()


def read(file: Path) -> Ledger:
    """The ledger of a run that is over."""
    ledger = Ledger()
    ledger.entries = [json.loads(line) for line in file.read_text().splitlines()]
    return ledger
