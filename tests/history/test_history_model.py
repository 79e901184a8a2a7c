"""The history against the log, over random logs: the log can be made of it again, however it was written and archived."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from kvplane.projections.history import archive
from kvplane.projections.history.replay import messages
from kvplane.projections.history.store import Store
from tests.support.fold_machine import FoldMachine
from tests.support.history_stores import write_history

if TYPE_CHECKING:
    from kvplane.projections.history.rows import Waiting


class HistoryMachine(FoldMachine):
    """The rules of the fold's model, and what a historian does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, str]] = []

    @rule(step=st.sampled_from(["write", "write", "write", "crash", "archive"]))
    def historian(self, step: str) -> None:
        self.steps.append((len(self.messages), step))

    def teardown(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._compare(Path(folder))

    def _compare(self, folder: Path) -> None:
        store = Store(folder / "one", "f")
        last = len(self.messages)
        for upto, step in [*self.steps, (last, "write")]:
            if step == "crash":
                store.close()
                store = Store(folder / "one", "f")
            elif step == "archive":
                _archive(store)
            else:
                write_history(store, self.messages, upto)
        fold = FleetState("f")
        for message in messages(store.fetch, "f", 0, last, step=7):
            fold.apply(message)
        assert digest(fold) == digest(self.state)
        assert store.checkpoint.sequence == last
        once = Store(folder / "once", "f")
        write_history(once, self.messages, last)
        assert store.content() == once.content()
        _archive(once)
        archive.sweep(once)
        assert store.content() == once.content()
        assert _waiting(once.waiting()) == _waiting(store.waiting())
        once.close()
        (folder / "once" / "history.duckdb").unlink()
        again = Store(folder / "once", "f")
        assert archive.recover(again) == last
        assert again.content() == store.content()
        assert again.checkpoint[0] == store.checkpoint[0]
        again.close()
        store.close()


def _waiting(waiting: Waiting) -> object:
    return {request: routed._replace(time=routed.time // 1000) for request, routed in waiting._decisions.items()}


def _archive(store: Store) -> None:
    checkpoint = store.checkpoint
    if checkpoint.sequence > checkpoint.archived:
        part = archive.Part("1970-01-01", checkpoint.archived, checkpoint.sequence)
        archive.adopt(store, part, archive.export(store, part, store.cursor()))


TestHistory = HistoryMachine.TestCase
TestHistory.settings = settings(
    max_examples=15,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
