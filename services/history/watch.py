"""The clock beside running queries: it stops those whose time is up."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Protocol

TICK = 0.05  # seconds between two looks
PAGE = os.sysconf("SC_PAGE_SIZE")
STATM = Path("/proc/self/statm")


class Work(Protocol):
    """What can be stopped from another thread."""

    def interrupt(self) -> None:
        """Ask it to stop; asked again until it did."""


class Watch:
    """Stops work with a reason: `time`, or the caller's own.

    DuckDB forgets an interruption that comes between two of its calls, so it is repeated until the work has ended.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadlines: dict[Work, float] = {}
        self._reasons: dict[Work, str] = {}
        self._ended = False
        self._thread: threading.Thread | None = None

    def begin(self, work: Work, deadline: float) -> None:
        """Watch `work` until `deadline` (monotonic seconds)."""
        with self._changed:
            self._deadlines[work] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="query-watch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def finish(self, work: Work) -> str:
        """No more interruptions for `work`. Gives why it was stopped, or nothing."""
        with self._changed:
            self._deadlines.pop(work, None)
            return self._reasons.pop(work, "")

    def stop(self, reason: str, work: Work | None = None) -> int:
        """Stop `work`, or all, if it runs now. Gives how many were."""
        with self._changed:
            chosen = [other for other in self._deadlines if work is None or other is work]
            for other in chosen:
                self._reasons.setdefault(other, reason)
                other.interrupt()
            return len(chosen)

    def end(self) -> None:
        """Stop watching, for good."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or bool(self._deadlines))
                if self._ended:
                    return
                now = time.monotonic()
                for work, deadline in self._deadlines.items():
                    if now >= deadline:
                        self._reasons.setdefault(work, "time")
                    if work in self._reasons:
                        work.interrupt()
            time.sleep(TICK)


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(STATM.read_text(encoding="ascii").split()[1]) * PAGE
