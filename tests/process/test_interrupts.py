"""Ctrl-C while a worker is being started: it waits until the worker has its orders."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.services.process.workers import _submit

if TYPE_CHECKING:
    from collections.abc import Callable


class Interrupted(Executor):
    """The signal comes in the middle of a start."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def submit(self, function: Callable[..., Any], /, *_: Any, **__: Any) -> Future[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        # The interpreter runs handlers between these steps, if one is due.
        for part in ("process", "orders"):
            self.started.append(part)
        future: Future[Any] = Future()
        future.set_result(function())
        return future


def test_an_interrupt_waits_until_a_worker_has_its_orders() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    over = threading.Event()
    # The signal is blocked in this thread; that of an executor takes it.
    other = threading.Thread(target=over.wait)
    other.start()
    executor = Interrupted()
    try:
        with pytest.raises(KeyboardInterrupt):
            _submit(executor, int)  # type: ignore[arg-type]
    finally:
        over.set()
        other.join()
        signal.signal(signal.SIGINT, before)
    assert executor.started == ["process", "orders"]
