"""Ctrl-C while a worker is being started: it waits until the worker has its orders."""

from __future__ import annotations

import signal
import socket
import threading
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.services.process.workers import _submit

if TYPE_CHECKING:
    from collections.abc import Callable


class Interrupted(Executor):
    """The signal comes in the middle of a start, to a thread that does not block it, and has come when the start goes on."""

    def __init__(self, thread: int, arrived: socket.socket) -> None:
        self.thread = thread
        self.arrived = arrived
        self.started: list[str] = []

    def submit(self, function: Callable[..., Any], /, *_: Any, **__: Any) -> Future[Any]:
        signal.pthread_kill(self.thread, signal.SIGINT)
        # Nothing of it may be left for later: it would end the tests themselves.
        assert self.arrived.recv(1) == bytes([signal.SIGINT])
        # The interpreter runs handlers between these steps, if one is due.
        for part in ("process", "orders"):
            self.started.append(part)
        future: Future[Any] = Future()
        future.set_result(function())
        return future


def test_an_interrupt_waits_until_a_worker_has_its_orders() -> None:
    arrived, noted = socket.socketpair()
    noted.setblocking(False)  # noqa: FBT003 - a name is not taken
    over = threading.Event()
    other = threading.Thread(target=over.wait, daemon=True)
    other.start()
    assert other.ident
    executor = Interrupted(other.ident, arrived)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = signal.set_wakeup_fd(noted.fileno())
    try:
        with pytest.raises(KeyboardInterrupt):
            _submit(executor, int)  # type: ignore[arg-type]
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, before)
        over.set()
        other.join()
        arrived.close()
        noted.close()
    assert executor.started == ["process", "orders"]
